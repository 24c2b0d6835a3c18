"""A whole training run, from the configuration to the exit code."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from tracknet.data.build import Datasets
from tracknet.data.leaks import log_leaks
from tracknet.data.loader import EpochLoader
from tracknet.errors import ConfigError, UserError
from tracknet.schema.root import Config
from tracknet.training.accelerator import start_accelerator
from tracknet.training.build import (
    build_batches,
    build_data,
    build_network,
    build_state,
    build_trainer,
    check_sources,
)
from tracknet.training.checkpoint import BEST, inspect_checkpoint, linked_step, load_checkpoint, saved_steps
from tracknet.training.farewell import leaving_with_a_word
from tracknet.training.launch import reshard_after_forward, sharding_requested
from tracknet.training.plan import plan_steps, restored_position
from tracknet.training.provenance import warn_of_known_games
from tracknet.training.ranks import Ranks
from tracknet.training.restart import launcher_of
from tracknet.training.resume import ResumePoint, check_same_run, find_own_run, find_resume
from tracknet.training.sharding import shard_with_twin
from tracknet.training.signals import EXIT_INTERRUPTED, StopRequest
from tracknet.training.size_note import read_size_note
from tracknet.training.state import TrainingState
from tracknet.training.tracking import Tracker
from tracknet.training.trainer import Ending
from tracknet.utils.config import typed, with_run_identity
from tracknet.utils.logging import FILE_ONLY, setup_logging
from tracknet.utils.run_directory import RunDirectory

log = logging.getLogger("tracknet")

LENGTH_KEYS = ("training.epochs:", "training.max_steps:", "training.early_stopping.")
TIMESTAMP_FORMAT = "%Y%m%d-%H%M%S"
ENDINGS = {Ending.FINISHED: "finished", Ending.STOPPED: "stopped by a signal and saved; --resume continues it"}


@dataclass(frozen=True)
class Continuation:
    """A run that goes on.

    Attributes:
        point: its checkpoint and its name.
        wandb_id: of its W&B run.
        changes: settings that differ from when it was saved, in words.
        is_in_place: whether it goes on in the folder that has its checkpoint, as the main rank sees it.
    """

    point: ResumePoint
    wandb_id: str | None
    changes: list[str]
    is_in_place: bool

    @property
    def is_over(self) -> bool:
        """Whether the run ended by itself and this launch asks for no other length."""
        return self.point.finished and not any(line.startswith(LENGTH_KEYS) for line in self.changes)


def train(cfg: DictConfig, resume: str | None) -> int:
    """Trains a run to its end, or until a signal asks it to stop. All ranks of the run call this.

    Args:
        cfg: from `build_cfg`; run id and timestamp become those of the main rank, or those of the run that is continued.
        resume: None starts afresh, `auto` continues the newest run of the same names and seed, anything else is the checkpoint to continue.
            A launcher's restart goes on with the run that it began, whatever this says, once that has a checkpoint.

    Returns:
        The exit code: 0 done, 75 stopped by SIGTERM and saved, 130 stopped by Ctrl-C and saved.

    Raises:
        UserError: a mistake outside the program.
    """
    accelerator, precision = start_accelerator(typed(cfg).training)
    if threads := typed(cfg).training.num_threads:
        torch.set_num_threads(threads)
    try:
        with leaving_with_a_word():
            code = _train(cfg, resume, accelerator, precision)
    except UserError:
        accelerator.end_training()  # gloo's threads must not outlive the interpreter: they would abort, and the exit code be lost
        raise
    accelerator.end_training()
    return code


def _train(cfg: DictConfig, resume: str | None, accelerator: Accelerator, precision: str) -> int:
    ranks = Ranks(accelerator)
    setup_logging(ranks.is_main, None)
    continuation: Continuation | None = ranks.from_main(ranks.on_main(lambda: _find_continuation(cfg, resume)))
    if continuation and continuation.is_over:
        log.info("%s is finished; nothing to do", continuation.point.run_id)
        return 0
    datasets, batches, state = _build_state(typed(cfg), continuation, ranks, precision)
    total_steps = plan_steps(typed(cfg), state.position, batches)
    _name_run(cfg, continuation, ranks)
    run, tracker = _open_run(cfg, continuation, ranks, state)
    with _recorded_ending(run, tracker, ranks) as outcome, StopRequest() as stop:
        warn_of_known_games(state.model.config.trained_on)
        ranks.on_main(lambda: log_leaks(datasets, lambda: stop.requested))
        trainer = build_trainer(
            typed(cfg),
            _plain(cfg),
            accelerator=accelerator,
            ranks=ranks,
            datasets=datasets,
            batches=batches,
            total_steps=total_steps,
            state=state,
            tracker=tracker,
            stop_requested=lambda: stop.requested,
        )
        # a run has a checkpoint from its first moment on, so that whatever kills it, it can be found and resumed
        ending = trainer.fit(save_first=not (continuation and continuation.is_in_place))
        outcome.code, outcome.message = _exit_code(ending, stop, ranks), ENDINGS[ending]
        if ending is Ending.STOPPED:
            _mark_preempted(run, outcome.code, state.position.step, ranks)
    log.info("%s; %s", outcome.message, run.path)
    return outcome.code


@dataclass
class Outcome:
    """How a launch ends: exit code and one line."""

    code: int = 1
    message: str = "ended by an error of the program; its traceback is on the console"


@contextmanager
def _recorded_ending(run: RunDirectory, tracker: Tracker, ranks: Ranks) -> Iterator[Outcome]:
    """Whatever happens inside, W&B is told and `run.json` and `train.log` say how the launch ended."""
    outcome, at_once = Outcome(), False
    try:
        yield outcome
    except UserError as error:
        outcome.code, outcome.message = error.exit_code, str(error)
        log.error(outcome.message, extra={FILE_ONLY: True})
        raise
    except KeyboardInterrupt:
        at_once = True
        outcome.code, outcome.message = EXIT_INTERRUPTED, "interrupted twice: left at once, without saving"
        raise
    finally:
        if not at_once:
            tracker.finish(outcome.code)
        if ranks.is_main:
            try:
                run.record_exit(outcome.code, outcome.message)
            except UserError as error:  # it must not stand in front of what ended the run
                log.warning("the ending is not in run.json: %s", error)


def _mark_preempted(run: RunDirectory, exit_code: int, step: int, ranks: Ranks) -> None:
    """Leaves word in the run's folder."""
    name = "SIGINT" if exit_code == EXIT_INTERRUPTED else "SIGTERM"
    if ranks.is_main:
        try:
            run.mark_preempted(exit_code, name, step)
        except UserError as error:  # all is saved, and the exit code says the same
            log.warning("PREEMPTED is not in the run's folder: %s", error)


def _find_continuation(cfg: DictConfig, resume: str | None) -> Continuation | None:
    """For the main rank."""
    config = typed(cfg)
    ckpt_dir = Path(config.runtime.ckpt_dir)
    launcher = launcher_of(os.environ)
    point = find_own_run(launcher, ckpt_dir) if launcher else None
    point = point or find_resume(resume, ckpt_dir, config)
    if point is None:
        return None
    info = inspect_checkpoint(point.checkpoint)
    saved = info.state
    if info.format_version == 1 and saved["config"]["training"].get("batch_size") != config.training.batch_size:
        raise ConfigError("--resume: the checkpoint is of an older version, and its run cannot go on with another training.batch_size")
    own_folder = ckpt_dir / point.run_id
    is_in_place = point.checkpoint.parent == own_folder.resolve()
    if not is_in_place and own_folder.exists() and saved_steps(own_folder):
        raise ConfigError(
            f"--resume: {point.checkpoint} would go on in {own_folder}, which has checkpoints of its own; give it another --output-dir"
        )
    return Continuation(point, saved["wandb_id"], check_same_run(saved["config"], _plain(cfg)), is_in_place)


def _build_state(
    config: Config, continuation: Continuation | None, ranks: Ranks, precision: str
) -> tuple[Datasets, EpochLoader, TrainingState]:
    """Data and model, as they are at the start or as the checkpoint has them. All ranks call this."""
    starts_from = None if continuation or config.training.init_from is None else Path(config.training.init_from)
    ranks.together(lambda: check_sources(config, starts_from))
    datasets = build_data(config, ranks)
    batches = build_batches(config, datasets, ranks)
    model, twin = build_network(config, datasets, ranks, starts_from), None
    if sharding_requested(os.environ):
        twin = shard_with_twin(model, ranks, reshard_after_forward=reshard_after_forward(os.environ))
    state = build_state(config, model, precision, twin)
    if continuation:
        ranks.together(lambda: _restore(state, continuation, batches))
        _take_noted_sizes(state, continuation, ranks)
        if not _has_best(state, continuation, ranks):
            state.position.best_f1 = -1.0
    return datasets, batches, state


def _has_best(state: TrainingState, continuation: Continuation, ranks: Ranks) -> bool:
    """Whether the best checkpoint that the state speaks of is there.

    It is not in another folder, nor where `best` is of a later step: of a future that this run will not have, or will have again.
    """
    best_step = ranks.from_main(ranks.on_main(lambda: linked_step(continuation.point.checkpoint.parent, BEST)))
    return continuation.is_in_place and best_step is not None and best_step <= state.position.step


def _take_noted_sizes(state: TrainingState, continuation: Continuation, ranks: Ranks) -> None:
    """Takes the micro-batch sizes that the run ended with, if it ran out of memory after the checkpoint. All ranks call this."""
    run_folder = continuation.point.checkpoint.parent
    noted = ranks.from_main(ranks.on_main(lambda: read_size_note(run_folder, state.micro_batch_sizes)))
    for phase, size in state.micro_batch_sizes.items():
        before = size.value
        if noted and size.restore(noted[phase]) and size.value < before:
            log.info("memory ran out after the checkpoint; going on with micro-batches of %d (%s)", size.value, phase.replace("_", " "))


def _restore(state: TrainingState, continuation: Continuation, batches: EpochLoader) -> None:
    checkpoint = load_checkpoint(continuation.point.checkpoint)
    state.position = restored_position(checkpoint.state["position"], batches)
    state.restore(checkpoint)
    if state.position.finished:  # and yet it goes on: its length or its patience has changed
        state.position = replace(state.position, finished=False, stale_evaluations=0)
    log.info("continuing %s after step %d", continuation.point.run_id, state.position.step)
    for line in continuation.changes:
        log.info("changed since it was saved: %s", line)


def _name_run(cfg: DictConfig, continuation: Continuation | None, ranks: Ranks) -> None:
    """Gives all ranks one run id: that of the run that is continued, else the main rank's, whose folder is then made."""

    def reserve() -> str:
        timestamp = datetime.strptime(cfg.runtime.timestamp, TIMESTAMP_FORMAT)
        while True:
            with_run_identity(cfg, timestamp.strftime(TIMESTAMP_FORMAT))
            try:
                (Path(cfg.runtime.log_dir) / cfg.runtime.run_id).mkdir(parents=True)
            except FileExistsError:
                timestamp += timedelta(seconds=1)  # another launch of this second has it
            except OSError as error:
                raise UserError(f"cannot make a run folder in {cfg.runtime.log_dir}: {error.strerror}; see --output-dir") from error
            else:
                return str(cfg.runtime.timestamp)

    with_run_identity(cfg, continuation.point.timestamp if continuation else ranks.from_main(ranks.on_main(reserve)))


def _open_run(cfg: DictConfig, continuation: Continuation | None, ranks: Ranks, state: TrainingState) -> tuple[RunDirectory, Tracker]:
    """The run's folder, with what is known at its start, and the tracker that writes into it. All ranks call this."""
    run = RunDirectory(Path(cfg.runtime.log_dir) / cfg.runtime.run_id)

    def write() -> None:
        setup_logging(True, run.log_file)
        run.write_config(OmegaConf.to_yaml(cfg))
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else str(ranks.device)
        run.write_run_info(run_id=cfg.runtime.run_id, seed=cfg.runtime.seed, world_size=ranks.size, device=device)
        run.clear_preempted()
        run.truncate_metrics_after(state.position.step)
        log.info("run folder %s", run.path)

    ranks.on_main(write)
    tracker = Tracker(
        run,
        typed(cfg).training.tracking,
        _plain(cfg),
        is_main=ranks.is_main,
        run_id=cfg.runtime.run_id,
        wandb_id=continuation.wandb_id if continuation and continuation.is_in_place else None,  # elsewhere it is a fork
    )
    return run, tracker


def _plain(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _exit_code(ending: Ending, stop: StopRequest, ranks: Ranks) -> int:
    """The same on all ranks: Ctrl-C to any of them counts before SIGTERM."""
    return 0 if ending is Ending.FINISHED else int(max(ranks.gather([stop.exit_code or 0])))

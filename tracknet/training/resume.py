"""Where a run goes on: which checkpoint `--resume` means, and whether the configuration still fits it."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracknet.errors import ConfigError, UserError, shown
from tracknet.schema.root import Config
from tracknet.schema.runtime import RuntimeConfig
from tracknet.training.checkpoint import (
    LAST,
    STATE_FILE,
    CheckpointError,
    CheckpointInfo,
    inspect_checkpoint,
    linked_step,
    saved_steps,
    verify_checkpoint,
)
from tracknet.training.restart import same_launcher
from tracknet.training.saved_state import check_saved_state

log = logging.getLogger("tracknet")

AUTO = "auto"
LISTED_RUNS = 10
_RUN_ID = re.compile(r"run-([0-9]{8}-[0-9]{6})-s([0-9]+)")


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        checkpoint: folder of a checkpoint that was found whole.
        run_id: of the run, which keeps it.
        timestamp: of the run's launch, `YYYYMMDD-HHMMSS`.
        finished: the run has ended by itself and there is nothing left to do.
    """

    checkpoint: Path
    run_id: str
    timestamp: str
    finished: bool


def find_resume(resume: str | None, ckpt_dir: Path, config: Config) -> ResumePoint | None:
    """The checkpoint that `--resume` means. For one process: another one may see the folder a moment later.

    `auto` takes the newest run under `ckpt_dir` that was started with the same data, model and training names and the same seed.
    These are read from the configuration in its checkpoint's state.

    Args:
        resume: None, `auto`, or a path to a run's folder or to one of its checkpoints (`last` and `best` included).
        ckpt_dir: holds a folder per run.
        config: of this launch.

    Returns:
        None where the run starts afresh; with `auto` the log says so.

    Raises:
        ConfigError: there is no checkpoint at the path (the message lists the runs that exist), or a folder cannot be read.
        UserError: the checkpoint is damaged or of a newer version of TrackNet.
    """
    if resume is None:
        return None
    try:
        return _newest_run(ckpt_dir, config.runtime) if resume == AUTO else _at_path(resume, ckpt_dir)
    except OSError as error:
        raise ConfigError(f"--resume {resume}: {error.filename}: {error.strerror}") from error


def find_own_run(launcher: object, ckpt_dir: Path) -> ResumePoint | None:
    """The run that a launcher has begun and starts again after a failure. For one process, as `find_resume`.

    Args:
        launcher: from `restart.launcher_of`; a checkpoint's state has that of the process that wrote it.
        ckpt_dir: holds a folder per run.

    Returns:
        None where it has saved nothing yet.

    Raises:
        ConfigError: a folder cannot be read.
    """
    try:
        for folder in _run_folders(ckpt_dir):
            if _was_begun_by(launcher, folder) and (info := _newest_good(folder)):
                return _resume_point(info)
    except OSError as error:
        raise ConfigError(f"restart: {error.filename}: {error.strerror}") from error
    return None


def _was_begun_by(launcher: object, run_folder: Path) -> bool:
    """By any of its checkpoints; those that are damaged or of another version show nothing."""
    for path in _newest_first(run_folder):
        with contextlib.suppress(UserError):
            return same_launcher(inspect_checkpoint(path).state.get("launcher"), launcher)
    return False


def _newest_run(ckpt_dir: Path, runtime: RuntimeConfig) -> ResumePoint | None:
    wanted = {key: getattr(runtime, key) for key in ("data_name", "model_name", "training_name", "seed")}
    for folder in _run_folders(ckpt_dir):
        if _is_run_of(wanted, folder) and (info := _newest_good(folder)):
            return _resume_point(info)
    log.info("nothing to resume under %s: starting afresh", ckpt_dir)
    return None


def _is_run_of(wanted: Mapping[str, Any], run_folder: Path) -> bool:
    """By any of its checkpoints, without reading their tensors; where all are damaged it may be one."""
    for path in _newest_first(run_folder):
        with contextlib.suppress(CheckpointError):
            info = inspect_checkpoint(path)
            check_saved_state(info)
            return wanted.items() <= dict(info.state["config"]["runtime"]).items()
    return True


def _at_path(resume: str, ckpt_dir: Path) -> ResumePoint:
    try:
        path = Path(resume).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"--resume {resume}: {error}") from error
    if (path / STATE_FILE).exists() or Path(os.path.realpath(path)).name.startswith("step-"):
        if path.exists():
            return _resume_point(_verified(path))
    elif path.is_dir() and (info := _newest_good(path)):
        return _resume_point(info)
    raise ConfigError(f"--resume {resume}: there is no checkpoint; {_existing(ckpt_dir)}")


def _run_folders(ckpt_dir: Path) -> list[Path]:
    """The folders of runs, the newest launch first."""
    if not ckpt_dir.is_dir():
        return []
    return sorted((entry for entry in ckpt_dir.iterdir() if _RUN_ID.fullmatch(entry.name) and entry.is_dir()), reverse=True)


def _newest_good(run_folder: Path) -> CheckpointInfo | None:
    """What `last` points to; if that is not whole, the newest checkpoint that is, and the log says so."""
    passed_over = 0
    for path in _newest_first(run_folder):
        try:
            info = _verified(path)
        except CheckpointError as error:
            log.warning("passing over %s: %s", path, error)
            passed_over += 1
            continue
        if passed_over:
            log.warning("going on from %s, the newest good checkpoint", info.path)
        return info
    return None


def _verified(path: Path) -> CheckpointInfo:
    info = verify_checkpoint(path)
    check_saved_state(info)
    return info


def _newest_first(run_folder: Path) -> Iterator[Path]:
    """`last`, then all steps: those up to `last` from the newest down, then later ones, which a resume at an earlier step has overtaken."""
    if (run_folder / LAST).is_symlink():
        yield run_folder / LAST
    last = linked_step(run_folder, LAST)
    steps = saved_steps(run_folder)
    for step in sorted(steps, key=lambda step: (last is not None and step > last, -step)):
        yield steps[step]


def _resume_point(info: CheckpointInfo) -> ResumePoint:
    run_id = info.path.parent.name
    if not (match := _RUN_ID.fullmatch(run_id)):
        raise ConfigError(f"--resume: {info.path} is not inside a run's folder (run-<timestamp>-s<seed>); move it into one")
    return ResumePoint(info.path, run_id, match[1], info.state["position"]["finished"])


def _existing(ckpt_dir: Path) -> str:
    """The runs that can be resumed, in words."""
    runs = [str(folder) for folder in _run_folders(ckpt_dir) if saved_steps(folder)]
    if not runs:
        return f"none exists under {ckpt_dir} either"
    more = f" and {len(runs) - LISTED_RUNS} older ones" if len(runs) > LISTED_RUNS else ""
    return "there are " + ", ".join(runs[:LISTED_RUNS]) + more


# Keys (with all below them) that a checkpoint's tensors, its position in the epoch or its hyper-parameters depend on.
_FIXED = (
    "model",
    "data.background",
    "data.cache_form",
    "data.licence",  # of what it was trained on already
    "data.preprocess",
    "data.sequence",
    "data.split",
    "data.synthetic",
    "runtime.seed",
    "training.data_loader.drop_last",
    "training.init_from",
    "training.optimizer",  # the saved state brings its hyper-parameters along
    "training.seed",
)
_FREE = ("model.backbone.device_map", "model.backbone.local_files_only")  # exceptions: where weights come from and lie
_BEFORE_THE_KEY = {"data.cache_form": "raw"}  # what a run did that was saved before there was the key
_OF_THE_LAUNCH = "runtime"  # paths, names and times; only the seed says something about the run
_ABSENT = "(absent)"


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compares the configuration of a run with that of the launch that resumes it.

    Args:
        saved: the run's resolved configuration, as plain dicts and lists.
        current: that of this launch.

    Returns:
        A line for the log for each key that changed and is honoured from here on: `training.epochs: 10 -> 20`.

    Raises:
        ConfigError: keys changed that the saved state depends on; names each with both values.
    """
    broken: list[tuple[str, Any, Any]] = []
    honoured: list[tuple[str, Any, Any]] = []
    for key, old, new in _differences(saved, current):
        if key == "training.seed" and "runtime" in saved and "runtime" in current:
            continue  # --seed may have overruled it: runtime.seed is the one that counts
        if key != "runtime.seed" and _below(key, _OF_THE_LAUNCH):
            continue
        (broken if _breaks(key, old, new) else honoured).append((key, old, new))
    if broken:
        listed = "; ".join(f"{shown(key)} was {shown(old)} and is now {new}" for key, old, new in broken)
        raise ConfigError(f"--resume: the saved run cannot go on with other settings: {listed}; set them back, or start a new run")
    return [f"{shown(key)}: {shown(old)} -> {new}" for key, old, new in honoured]


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, current value) of all that differs; `_ABSENT` stands for a key that a side does not know."""
    for name in sorted({*saved, *current}):
        old = saved.get(name, _ABSENT)
        new = current.get(name, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif _plain(old) != _plain(new):
            yield f"{prefix}{name}", old, new


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(parent + ".")


def _breaks(key: str, old: Any, new: Any) -> bool:
    if old == _ABSENT and key in _BEFORE_THE_KEY:
        return bool(new != _BEFORE_THE_KEY[key])
    if _ABSENT in (old, new):
        return False  # a version of TrackNet knows the key and the other does not
    if key == "training.ema_decay":
        return bool(old) != bool(new)  # the decay may change, but averages must be there or not
    return any(_below(key, fixed) for fixed in _FIXED) and not any(_below(key, free) for free in _FREE)

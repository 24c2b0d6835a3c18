"""Builds the parts of a run from its configuration; the trainer only receives them."""

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tracknet.data.build import Datasets, build_datasets
from tracknet.data.formats import check_root
from tracknet.data.loader import EpochLoader
from tracknet.data.sampler import EpochBatchSampler
from tracknet.evaluation.detection import Preview
from tracknet.losses import frame_losses
from tracknet.models import TrackNetModel, build_model, check_init_from, check_pretrained, load_weights_from
from tracknet.schema.root import Config
from tracknet.schema.training import TrainingConfig, gradient_bound
from tracknet.schema.validation import check_sizes
from tracknet.training.checkpoint import MANIFEST_FILE, verify_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.ema import Ema
from tracknet.training.gradient import SummedLoss
from tracknet.training.launch import world_from_environment
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimization import LearningRate, build_optimizer
from tracknet.training.plan import schedule_steps
from tracknet.training.previews import draw_previews
from tracknet.training.progress import Progress
from tracknet.training.provenance import provenance_of
from tracknet.training.ranks import Ranks
from tracknet.training.restart import launcher_of
from tracknet.training.saver import BackgroundSaver
from tracknet.training.saving import Saving
from tracknet.training.sharded_step import ShardedStep
from tracknet.training.size_note import remove_size_note, write_size_note
from tracknet.training.state import EVALUATION, FROZEN_BACKBONE, WHOLE_MODEL, TrainingState
from tracknet.training.step import TrainingStep
from tracknet.training.tracking import Tracker
from tracknet.training.trainer import SELECTION_METRIC, Step, Trainer
from tracknet.training.validation import Validation

log = logging.getLogger("tracknet")


def check_sources(config: Config, starts_from: Path | None) -> None:
    """Whether the data set and the weights that the run starts from are there: asked before hours of decoding, not after.

    Args:
        config: of the run.
        starts_from: `training.init_from`; None also where a checkpoint brings the weights.

    Raises:
        ConfigError: `data.root`, `training.init_from` or `model.pretrained_model_name` is not there or does not fit, or a name cannot
            stand in a card.
        CheckpointError: `training.init_from` is a damaged checkpoint.
    """
    if config.data.root is not None:
        check_root(Path(config.data.root))
    check_pretrained(config.model)
    if starts_from is not None:
        check_init_from(starts_from)
        if (starts_from / MANIFEST_FILE).exists():
            verify_checkpoint(starts_from)
    provenance_of(config, None, starts_from)


def build_data(config: Config, ranks: Ranks) -> Datasets:
    """Both sides of the split, decoded by all processes of a machine together. All ranks call this."""
    _, _, local_rank, local_world_size = world_from_environment(os.environ)
    datasets = build_datasets(config.data, config.runtime.seed, share=(local_rank, local_world_size), gather=ranks.gather)
    check_sizes(config.data, config.model, datasets.input_wh)  # where resize is null, the clips have decided it
    for side, dataset in (("train", datasets.train), ("val", datasets.val)):
        index = dataset.index
        log.info("%s: %d games, %d clips, %d frames, %d windows", side, len(index.games), len(index.clips), len(index), len(dataset))
    return datasets


def build_network(config: Config, datasets: Datasets, ranks: Ranks, starts_from: Path | None) -> TrackNetModel:
    """The model on this rank's device, with the main rank's weights; `starts_from` as in `check_sources`. All ranks call this."""

    def build() -> TrackNetModel:
        model = build_model(config.model, config.data, datasets.input_wh)
        if starts_from is not None:
            load_weights_from(model, starts_from)
        provenance = provenance_of(config, model.config.pretrained, starts_from)
        model.config.pretrained, model.config.trained_on = provenance.pretrained, provenance.trained_on
        return model

    model = ranks.together(build)
    model.freeze_backbone(backbone_frozen_epochs(config) > 0)
    module: nn.Module = model  # transformers' own `to` hides these types
    module.to(ranks.device)
    model.use_channels_last(config.training.channels_last)
    ranks.copy_from_main_([*model.parameters(), *model.buffers()])
    count = sum(p.numel() for p in model.parameters())
    log.info("%s: %.2f M parameters, on %s", config.model.model_name, count / 1e6, ranks.device)
    return model


def backbone_frozen_epochs(config: Config) -> float:
    """For how many epochs the backbone is frozen."""
    return math.inf if config.model.backbone.freeze else config.training.backbone_freeze_epochs


def build_state(config: Config, model: TrackNetModel, precision: str, twin: TrackNetModel | None) -> TrainingState:
    """What the run carries from step to step; `precision` is fp32, fp16 or bf16, `twin` the same unsharded where the model is sharded."""
    never_trained = set(model.backbone_parameters()) if config.model.backbone.freeze else set()
    optimizer = build_optimizer(config.training.optimizer, [p for p in model.parameters() if p not in never_trained])
    scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")
    ema = Ema(model, config.training.ema_decay) if config.training.ema_decay > 0 else None
    training = config.training
    start = training.micro_batch_size or training.batch_size
    sizes = {
        FROZEN_BACKBONE: MicroBatchSize(start, training),
        WHOLE_MODEL: MicroBatchSize(start, training),
        EVALUATION: MicroBatchSize(evaluation_batch_size(training), training, evaluation=True),
    }
    return TrainingState(model, optimizer, scaler, ema, sizes, twin)


def evaluation_batch_size(training: TrainingConfig) -> int:
    """Windows per process."""
    return training.evaluation.batch_size or training.batch_size


def build_batches(config: Config, datasets: Datasets, ranks: Ranks) -> EpochLoader:
    """This rank's training batches.

    Raises:
        ConfigError: no step is left in an epoch.
    """
    training = config.training
    count, seed = len(datasets.train), config.runtime.seed
    drop_last = training.data_loader.drop_last
    sampler = EpochBatchSampler(count, training.batch_size, ranks.rank, ranks.size, seed, shuffle=True, drop_last=drop_last)
    return EpochLoader(datasets.train, sampler, training.data_loader)


def build_trainer(
    config: Config,
    saved_config: dict[str, Any],
    *,
    accelerator: Accelerator,
    ranks: Ranks,
    datasets: Datasets,
    batches: EpochLoader,
    total_steps: int,
    state: TrainingState,
    tracker: Tracker,
    stop_requested: Callable[[], bool],
) -> Trainer:
    """Puts the parts together.

    Args:
        config: of the run.
        saved_config: the same as plain dicts and lists, for the checkpoints.
        accelerator: for the precision of the forward pass.
        ranks: the processes of the run.
        datasets: both sides of the split.
        batches: this rank's training batches.
        total_steps: updates of the whole run.
        state: model, optimizer and position.
        tracker: where metrics and previews go.
        stop_requested: whether this rank was asked to stop.
    """
    training = config.training
    progress = Progress(total_steps, state.position.step, ranks.is_main, training.tracking.log_every_steps)
    log.info(
        "%d steps, %d per epoch; %d samples a step: %d x %d processes, in micro-batches of %d",
        *(total_steps, len(batches), training.batch_size * ranks.size, training.batch_size, ranks.size, state.micro_batch_size.value),
    )

    return Trainer(
        training,
        state=state,
        training_step=_training_step(config, accelerator, ranks, datasets, state),
        learning_rate=LearningRate(
            training.scheduler,
            state.optimizer,
            base=training.optimizer.lr,
            total_steps=schedule_steps(training, len(batches)),
            steps_per_epoch=len(batches),
        ),
        batches=batches,
        total_steps=total_steps,
        backbone_frozen_epochs=backbone_frozen_epochs(config),
        evaluate=_evaluation(config, accelerator, ranks, datasets, state, tracker, stop_requested),
        saving=_saving(config, saved_config, ranks, state, tracker),
        log_metrics=tracker.log,
        settle_previews=tracker.settle_previews,
        progress=progress,
        stop_requested=stop_requested,
    )


def _validation_batches(config: Config, datasets: Datasets, ranks: Ranks) -> EpochLoader:
    count, batch_size = len(datasets.val), evaluation_batch_size(config.training)
    sampler = EpochBatchSampler(count, batch_size, ranks.rank, ranks.size, config.runtime.seed, shuffle=False, drop_last=False)
    return EpochLoader(datasets.val, sampler, config.training.data_loader)


def _training_step(config: Config, accelerator: Accelerator, ranks: Ranks, datasets: Datasets, state: TrainingState) -> Step:
    training = config.training
    summed_loss = SummedLoss(
        state.model,
        lambda logits, target: frame_losses(logits, target, training.loss),
        nominal_frames=training.batch_size * datasets.train.window_frames,
        sigma=config.model.heatmap.sigma,
        seed=config.runtime.seed,
        autocast=accelerator.autocast,
        scaler=state.scaler,
        device=ranks.device,
    )
    make_step: Callable[..., Step] = TrainingStep
    if state.is_sharded:
        keep_sizes = partial(write_size_note, _run_folder(config), state.micro_batch_sizes)
        make_step = partial(ShardedStep, keep_sizes=keep_sizes)
    return make_step(
        summed_loss,
        state.optimizer,
        ranks=ranks,
        micro_batch=state.micro_batch_size,
        clip_norm=gradient_bound(training),
        describe=datasets.train.describe,
    )


def _evaluation(
    config: Config,
    accelerator: Accelerator,
    ranks: Ranks,
    datasets: Datasets,
    state: TrainingState,
    tracker: Tracker,
    stop_requested: Callable[[], bool],
) -> Callable[[int], dict[str, float] | None]:
    """The validation of a run, with a line in the log."""
    settings = config.training.evaluation

    def show_previews(step: int, previews: list[Preview]) -> None:
        tracker.log_previews(step, lambda: draw_previews(previews, datasets.val.index, settings.threshold))

    validation = Validation(
        state,
        _validation_batches(config, datasets, ranks),
        ranks=ranks,
        threshold=settings.threshold,
        previews=config.training.tracking.previews if ranks.is_main else 0,
        autocast=accelerator.autocast,
        show_previews=show_previews,
        stop_requested=stop_requested,
    )

    def evaluate(step: int) -> dict[str, float] | None:
        metrics = validation(step)
        if metrics is None:
            log.info("step %d: the evaluation was cut short; a resumed run makes it first", step)
            return None
        log.info("step %d: %s", step, "  ".join(f"{name} {metrics[name]:.4f}" for name in (SELECTION_METRIC, "val/f1_wasb")))
        return metrics

    return evaluate


def _saving(config: Config, saved_config: dict[str, Any], ranks: Ranks, state: TrainingState, tracker: Tracker) -> Saving:
    """Writes checkpoints that a later launch can recognise as this run's."""
    run_folder = _run_folder(config)
    store = CheckpointStore(run_folder, config.training.checkpoint.keep_last)
    saver = BackgroundSaver(
        store,
        after=lambda step: remove_size_note(run_folder, step),  # the checkpoint has the sizes
        before=tracker.wait_for_previews,  # a run that goes on from it evaluates no more at that step
    )
    if ranks.is_main:
        saver.reserve(state.bytes_to_save(), pinned=ranks.device.type == "cuda")
    constant = {"config": saved_config, "launcher": launcher_of(os.environ)}
    return Saving(saver, constant, tracker.state, ranks=ranks)


def _run_folder(config: Config) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.runtime.ckpt_dir) / config.runtime.run_id

"""One network trained on the same batches in memory by four loops: a bare one, this package's, Hugging Face's and Lightning's.

Each takes `Timed` batches, which note when they are asked for, so that setting up and ending count for none of them.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from tracknet.data.batch import Batch
from tracknet.geometry import resize_points
from tracknet.heatmap import render_heatmaps
from tracknet.losses import frame_losses
from tracknet.models import TrackNetModel, build_model
from tracknet.models.layers import PerSampleConv1x1
from tracknet.schema.root import Config
from tracknet.schema.training import gradient_bound
from tracknet.training.build import build_state
from tracknet.training.gradient import SummedLoss
from tracknet.training.optimization import LearningRate, build_optimizer
from tracknet.training.progress import Progress
from tracknet.training.ranks import Ranks
from tracknet.training.state import TrainingState
from tracknet.training.step import TrainingStep
from tracknet.training.tracking import Tracker
from tracknet.training.trainer import Trainer
from tracknet.utils.config import build_cfg, typed
from tracknet.utils.run_directory import RunDirectory

WIDE = "model.backbone.channels=[64,128,288,608]"  # 14.1 M parameters
TINY = ("model.backbone.channels=[8]", "data.augment.crop=[32,32]", "training.batch_size=1")
EVERY_STEPS = 10  # between two lines of metrics
UNTIMED_STEPS = 3  # at the start of each loop


class Timed:
    """The same batches again and again, and when each was asked for."""

    def __init__(self, batches: Sequence[Any], steps: int) -> None:
        self._batches, self.steps = batches, steps
        self.asked: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.steps):
            self.asked.append(time.perf_counter())
            yield self._batches[step % len(self._batches)]

    @property
    def per_step_s(self) -> float:
        """Mean time from one batch to the next, without the first steps and the last."""
        return (self.asked[-1] - self.asked[UNTIMED_STEPS]) / (len(self.asked) - 1 - UNTIMED_STEPS)


Loop = Callable[[TrackNetModel, Timed], None]  # trains a copy of the network on all batches


def recipe(*overrides: str) -> Config:
    """The tennis recipe without average, as the other loops keep none."""
    fixed = ["training.ema_decay=0", f"training.tracking.log_every_steps={EVERY_STEPS}", "training.checkpoint.every_steps=0"]
    return typed(build_cfg("tennis", "unet", "tennis", overrides=[*fixed, *overrides], dry_run=True))


def network(config: Config) -> TrackNetModel:
    """The recipe's, with random weights."""
    input_wh = config.data.preprocess.resize_wh
    assert input_wh is not None
    model = build_model(config.model, config.data, input_wh)
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def random_batch(config: Config, seed: int) -> Batch:
    """A batch of crops in host memory as the loader gives it, every frame labelled."""
    size, frames = config.training.batch_size, config.data.sequence.window_frames
    given_wh = config.data.augment.crop or config.data.preprocess.resize_wh
    assert given_wh is not None
    width, height = given_wh
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (size, frames, height, width, 3), dtype=torch.uint8, generator=generator)
    background = torch.randint(0, 256, (size, height, width, 3), dtype=torch.uint8, generator=generator)
    return Batch(
        frames=pictures.permute(0, 1, 4, 2, 3),
        background=background.permute(0, 3, 1, 2),
        xy_input=torch.rand(size, frames, 2, generator=generator) * torch.tensor([width, height]),
        visible=torch.ones(size, frames, dtype=torch.bool),
        labeled=torch.ones(size, frames, dtype=torch.bool),
        sample_index=torch.arange(size) + seed * size,
        frame_row=torch.zeros(size, frames, dtype=torch.int64),
        counted=torch.ones(size, frames, dtype=torch.bool),
    )


class NetworkWithLoss(nn.Module):
    """What one would hand to another trainer: the network without what only this package needs, and its mean loss."""

    def __init__(self, config: Config, model: TrackNetModel) -> None:
        super().__init__()
        self._config, self.model = config, copy.deepcopy(model)
        for module in self.model.modules():
            if isinstance(module, PerSampleConv1x1):
                module.__class__ = nn.Conv2d  # type: ignore[assignment]

    def forward(self, frames: Tensor, background: Tensor, xy_input: Tensor, visible: Tensor, labeled: Tensor) -> dict[str, Tensor]:
        """Mean loss of the labelled frames; shapes as in `Batch`."""
        logits = self.model(frames, background)
        (height, width), (rows, columns) = frames.shape[-2:], logits.shape[-2:]
        xy_heatmap = resize_points(xy_input, (width, height), (columns, rows))
        target = render_heatmaps(xy_heatmap, visible, (rows, columns), self._config.model.heatmap.sigma)
        return {"loss": frame_losses(logits, target, self._config.training.loss)[labeled].mean()}


def as_arguments(batch: Batch) -> dict[str, Tensor | None]:
    """What `NetworkWithLoss` takes of a batch."""
    return {name: getattr(batch, name) for name in ("frames", "background", "xy_input", "visible", "labeled")}


def bare(config: Config, model: TrackNetModel, batches: Timed) -> None:
    """The plainest loop that makes the same updates, straight from PyTorch's documentation; it logs nothing."""
    module = NetworkWithLoss(config, model).train()
    optimizer = build_optimizer(config.training.optimizer, module.parameters())
    for batch in batches:
        optimizer.zero_grad()
        module(**as_arguments(batch))["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), gradient_bound(config.training))
        optimizer.step()


class _InMemory:
    """In place of an `EpochLoader`: one epoch of the batches."""

    def __init__(self, batches: Timed, samples: int) -> None:
        self._batches, self._samples = batches, samples

    def __len__(self) -> int:
        return self._batches.steps

    def steps_left(self, windows_seen: int) -> int:
        return self._batches.steps - windows_seen // self._samples

    def epoch(self, epoch: int, windows_seen: int = 0) -> Iterator[Batch]:
        return iter(self._batches)


class _NoSaving:
    """In place of a `Saving`; the other loops save nothing either."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def training_step(config: Config, model: TrackNetModel, ranks: Ranks, accelerator: Accelerator) -> tuple[TrainingStep, TrainingState]:
    """This package's step, and what it changes; it trains a copy."""
    training, own = config.training, copy.deepcopy(model).train()
    state = build_state(config, own, "fp32", None)
    summed_loss = SummedLoss(
        own,
        lambda logits, target: frame_losses(logits, target, training.loss),
        nominal_frames=training.batch_size * config.data.sequence.window_frames,
        sigma=config.model.heatmap.sigma,
        seed=config.runtime.seed,
        autocast=accelerator.autocast,
        scaler=state.scaler,
        device=ranks.device,
    )
    step = TrainingStep(
        summed_loss, state.optimizer, ranks=ranks, micro_batch=state.micro_batch_size, clip_norm=gradient_bound(training), describe=str
    )
    return step, state


def ours(config: Config, model: TrackNetModel, batches: Timed, every: dict[str, Any] | None = None) -> None:
    """`Trainer.fit` with progress, position, schedule and metrics on the disk."""
    training, accelerator = config.training, Accelerator(cpu=True)
    step, state = training_step(config, model, Ranks(accelerator), accelerator)
    state.position.windows_per_step = training.batch_size
    count = batches.steps
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(RunDirectory(Path(folder)), training.tracking, {}, is_main=True, run_id="run", wandb_id=None)
        Trainer(
            training,
            state=state,
            training_step=step,
            learning_rate=LearningRate(
                training.scheduler, state.optimizer, base=training.optimizer.lr, total_steps=count, steps_per_epoch=count
            ),
            batches=_InMemory(batches, training.batch_size),  # type: ignore[arg-type]
            total_steps=count,
            backbone_frozen_epochs=0,
            evaluate=lambda step: None,
            saving=_NoSaving(),  # type: ignore[arg-type]
            log_metrics=tracker.log,
            settle_previews=tracker.settle_previews,
            progress=Progress(count, 0, True, training.tracking.log_every_steps),
            stop_requested=lambda: False,
        ).fit(save_first=False)
        tracker.finish(0)


def hugging_face(config: Config, model: TrackNetModel, batches: Timed) -> None:
    """`transformers.Trainer`."""

    class FromMemory(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return batches

    module = NetworkWithLoss(config, model)
    optimizer = build_optimizer(config.training.optimizer, module.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=batches.steps,
            per_device_train_batch_size=config.training.batch_size,
            max_grad_norm=gradient_bound(config.training),
            save_strategy="no",
            report_to="none",
            logging_steps=EVERY_STEPS,
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches.steps)
        FromMemory(module, arguments, train_dataset=[0], optimizers=(optimizer, schedule)).train()


def lightning(config: Config, model: TrackNetModel, batches: Timed) -> None:
    """`lightning.Trainer`."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = NetworkWithLoss(config, model)

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss = self.network(**batch)["loss"]
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = build_optimizer(config.training.optimizer, self.parameters())
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches.steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=batches.steps,
            max_epochs=1,
            gradient_clip_val=gradient_bound(config.training),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=EVERY_STEPS,
            default_root_dir=folder,
        )
        trainer.fit(Module(), batches)

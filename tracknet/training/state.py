"""What a run carries from one step to the next: all of it goes into a checkpoint and comes back out of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tracknet.models import TrackNetModel
from tracknet.training.checkpoint import Checkpoint
from tracknet.training.ema import Ema
from tracknet.training.last_word import last_word
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimizer_state import pack_optimizer, unpack_optimizer
from tracknet.training.sharding import as_sharded, full_tensors

# What memory is needed for, each with a micro-batch size of its own.
FROZEN_BACKBONE, WHOLE_MODEL, EVALUATION = "frozen_backbone", "whole_model", "evaluation"

OUT_OF_MEMORY_IN_GATHERING = (
    "out of memory while the slices of the model were put together, for which each process needs room for the whole; the last checkpoint"
    " is whole; use fewer processes per machine, or a smaller model"
)


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: updates made.
        steps_per_epoch: what an epoch means in steps; 0 before the first one.
        evaluated_step: updates made at the last evaluation.
        best_f1: highest val/f1_tracknetv2 so far; -1 before the first evaluation.
        patience_f1: what an evaluation must exceed by `early_stopping.min_delta` to count as better; -1 before the first one.
        stale_evaluations: evaluations since one was.
        finished: whether the run ended by itself, by its length or by early stopping.
    """

    step: int = 0
    steps_per_epoch: int = 0
    evaluated_step: int = 0
    best_f1: float = -1.0
    patience_f1: float = -1.0
    stale_evaluations: int = 0
    finished: bool = False


class TrainingState:
    """The parts of a run that change, and their way into a checkpoint and back."""

    def __init__(
        self,
        model: TrackNetModel,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        ema: Ema | None,
        micro_batch_sizes: Mapping[str, MicroBatchSize],
        twin: TrackNetModel | None = None,
    ) -> None:
        """Takes its parts.

        Args:
            model: what is trained.
            optimizer: over the model's parameters.
            scaler: of fp16.
            ema: average of the model's weights; None where none is kept.
            micro_batch_sizes: by phase: FROZEN_BACKBONE, WHOLE_MODEL and EVALUATION.
            twin: where the model is sharded, the same unsharded in host memory; see `sharding.shard_with_twin`.
        """
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.micro_batch_sizes = micro_batch_sizes
        self._twin = twin
        self.position = Position()

    @property
    def micro_batch_size(self) -> MicroBatchSize:
        """That of the present phase of training."""
        return self.micro_batch_sizes[FROZEN_BACKBONE if self.model.backbone_frozen else WHOLE_MODEL]

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a slice of the model."""
        return self._twin is not None

    def gather(self) -> None:
        """Prepares `finished_model` and `write_model`: brings the slices of a sharded model together. All ranks call this."""
        if self._twin:
            averages = self.ema.state_tensors() if self.ema else {}
            with last_word(lambda: OUT_OF_MEMORY_IN_GATHERING):
                self._twin.load_state_dict(full_tensors(self.model.state_dict() | averages, keep=True))

    @contextmanager
    def finished_model(self) -> Iterator[TrackNetModel]:
        """The model that a user is to have, for as long as it is entered: the averaged weights where there is an average.

        Call `gather` before. It is on the device; where the model is sharded, only while it is entered.
        """
        if self._twin:
            twin: nn.Module = self._twin  # transformers' own `to` hides these types
            twin.to(self.model.device)
            try:
                yield self._twin
            finally:
                twin.to("cpu")
        else:
            with self.ema.averaged() if self.ema else nullcontext():
                yield self.model

    def write_model(self, folder: Path) -> None:
        """Saves the model that a user is to have, as `finished_model`. Call `gather` before."""
        if self._twin:
            self._twin.save_pretrained(folder)
        else:
            with self.finished_model() as model:
                model.save_pretrained(folder)

    def tensors(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """What is saved beside the model, a file each. All ranks call this.

        Args:
            keep: whether this rank saves; where the model is sharded, the others get nothing.
        """
        tensors = {"optimizer": pack_optimizer(self.optimizer)[0]}
        if self.ema:
            tensors["weights"] = dict(self.model.state_dict())
        if self.is_sharded:
            with last_word(lambda: OUT_OF_MEMORY_IN_GATHERING):
                return {name: full_tensors(group, keep) for name, group in tensors.items()}
        return tensors

    def as_json(self) -> dict[str, Any]:
        """The rest of the state."""
        return {
            "position": asdict(self.position),
            "optimizer": pack_optimizer(self.optimizer)[1],
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "micro_batch_sizes": {phase: size.as_json() for phase, size in self.micro_batch_sizes.items()},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes everything back from a checkpoint of the same configuration."""
        saved_model = load_file(checkpoint.path / "model.safetensors")
        own = self.model.state_dict()
        weights = checkpoint.tensors["weights"] if self.ema else saved_model
        self.model.load_state_dict({name: as_sharded(tensor, own.get(name)) for name, tensor in weights.items()})
        if self.ema:
            self.ema.load(saved_model, checkpoint.state["ema_updates"])
        unpack_optimizer(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        scaler: Mapping[str, Any] = checkpoint.state["scaler"]
        if scaler and self.scaler.is_enabled():  # both in fp16; otherwise the scale starts anew
            self.scaler.load_state_dict(dict(scaler))
        for phase, size in checkpoint.state["micro_batch_sizes"].items():
            self.micro_batch_sizes[phase].restore(size)
        self.position = Position(**checkpoint.state["position"])

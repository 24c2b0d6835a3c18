"""What a run carries from one step to the next: all of it goes into a checkpoint and comes back out of it."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from tracknet.models import TrackNetModel
from tracknet.training.checkpoint import Checkpoint
from tracknet.training.ema import Ema
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimizer_state import pack_optimizer, unpack_optimizer

# What memory is needed for, each with a micro-batch size of its own.
FROZEN_BACKBONE, WHOLE_MODEL, EVALUATION = "frozen_backbone", "whole_model", "evaluation"


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
    ) -> None:
        """Takes its parts; `micro_batch_sizes` by phase: FROZEN_BACKBONE, WHOLE_MODEL and EVALUATION."""
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.micro_batch_sizes = micro_batch_sizes
        self.position = Position()

    @property
    def micro_batch_size(self) -> MicroBatchSize:
        """That of the present phase of training."""
        return self.micro_batch_sizes[FROZEN_BACKBONE if self.model.backbone_frozen else WHOLE_MODEL]

    def write_model(self, folder: Path) -> None:
        """Saves the model that a user is to have: the averaged weights where there is an average."""
        with self.ema.averaged() if self.ema else nullcontext():
            self.model.save_pretrained(folder)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is saved beside the model, a file each."""
        tensors = {"optimizer": pack_optimizer(self.optimizer)[0]}
        if self.ema:
            tensors["weights"] = dict(self.model.state_dict())
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
        self.model.load_state_dict(checkpoint.tensors["weights"] if self.ema else saved_model)
        if self.ema:
            self.ema.load(saved_model, checkpoint.state["ema_updates"])
        unpack_optimizer(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        scaler: Mapping[str, Any] = checkpoint.state["scaler"]
        if scaler and self.scaler.is_enabled():  # both in fp16; otherwise the scale starts anew
            self.scaler.load_state_dict(dict(scaler))
        for phase, size in checkpoint.state["micro_batch_sizes"].items():
            self.micro_batch_sizes[phase].restore(size)
        self.position = Position(**checkpoint.state["position"])

"""What a run carries from one step to the next: all of it goes into a checkpoint and comes back out of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracknet.errors import UserError, shown
from tracknet.models import TrackNetModel
from tracknet.training.checkpoint import Checkpoint
from tracknet.training.ema import Ema
from tracknet.training.last_word import last_word
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimization import state_tensors
from tracknet.training.optimizer_state import pack_optimizer, unpack_optimizer
from tracknet.training.position import Position
from tracknet.training.provenance import read_provenance
from tracknet.training.sharding import as_sharded, full_tensors

# What memory is needed for, each with a micro-batch size of its own.
FROZEN_BACKBONE, WHOLE_MODEL, EVALUATION = "frozen_backbone", "whole_model", "evaluation"

OUT_OF_MEMORY_IN_GATHERING = (
    "out of memory while the slices of the model were put together, for which each process needs room for the whole; the last checkpoint"
    " is whole; use fewer processes per machine, or a smaller model"
)


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

    @property
    def detection(self) -> dict[str, Any] | None:
        """The detection threshold of the last evaluation and how it was chosen, as in `TrackNetConfig`."""
        chosen: dict[str, Any] | None = self.model.config.detection
        return chosen

    @detection.setter
    def detection(self, chosen: dict[str, Any] | None) -> None:
        self.model.config.detection = chosen

    def model_texts(self) -> dict[str, str]:
        """What the texts of the model's folder hold at this step, by file name."""
        if self.model.config.trained_on:
            self.model.config.trained_on |= {"step": self.position.step}
        return self.model.model_texts()

    def gather(self) -> None:
        """Prepares `finished_model`: brings the slices of a sharded model together. All ranks call this."""
        if self._twin:
            with last_word(lambda: OUT_OF_MEMORY_IN_GATHERING):
                self._twin.load_state_dict(full_tensors(self._finished_weights(), keep=True))

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

    def tensors(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, a file each; `model` is what a user is to have. Not copied. All ranks call this.

        Args:
            keep: whether this rank saves; where the model is sharded, the others get nothing.
        """
        tensors = {"model": self._finished_weights(), "optimizer": pack_optimizer(self.optimizer)[0]}
        if self.ema:
            tensors["weights"] = dict(self.model.state_dict())
        if self.is_sharded:
            with last_word(lambda: OUT_OF_MEMORY_IN_GATHERING):
                return {name: full_tensors(group, keep) for name, group in tensors.items()}
        return tensors

    def bytes_to_save(self) -> int:
        """What `tensors` will hold once everything has been updated."""
        model: int = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        optimized = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = len([name for name in state_tensors(self.optimizer) if name != "step"])
        averages: int = kept * sum(p.numel() * p.element_size() for p in optimized)
        return (2 if self.ema else 1) * model + averages

    def _finished_weights(self) -> dict[str, Tensor]:
        """The averages where there are some, and all else as it is; not copied, and sharded as the model is."""
        weights: dict[str, Tensor] = dict(self.model.state_dict())
        averages = self.ema.state_tensors() if self.ema else {}
        return weights | {name: average.to(weights[name].dtype) for name, average in averages.items()}

    def as_json(self) -> dict[str, Any]:
        """The rest of the state."""
        return {
            "position": asdict(self.position),
            "optimizer": pack_optimizer(self.optimizer)[1],
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "micro_batch_sizes": {phase: size.as_json() for phase, size in self.micro_batch_sizes.items()},
            "detection": self.detection,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes everything back but the position, from a checkpoint of the same configuration.

        Raises:
            UserError: it is of another model, optimizer or average.
        """
        tensors, saved = checkpoint.tensors, checkpoint.state
        if self.ema and "weights" not in tensors:
            raise UserError(f"{checkpoint.path}: it lacks the weights that training.ema_decay averages; the checkpoint is damaged")
        self._check_fits(tensors["model"])
        self._restore_weights(tensors["weights"] if self.ema else tensors["model"])
        if self.ema:
            self.ema.load(tensors["model"], saved["ema_updates"])
        unpack_optimizer(self.optimizer, tensors["optimizer"], saved["optimizer"])
        if saved["scaler"] and self.scaler.is_enabled():  # both in fp16; otherwise the scale starts anew
            self.scaler.load_state_dict(dict(saved["scaler"]))
        for phase, size in saved["micro_batch_sizes"].items():
            self.micro_batch_sizes[phase].restore(size)
        if "detection" in saved:  # not in older checkpoints
            self.detection = saved["detection"]
        past = read_provenance(checkpoint.path)
        if past.trained_on is not None:  # nor is this; what was trained before is as it was, whatever this launch is told
            self.model.config.pretrained, self.model.config.trained_on = past.pretrained, past.trained_on

    def _restore_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._check_fits(weights)
        own = self.model.state_dict()
        self.model.load_state_dict({name: as_sharded(tensor, own[name]) for name, tensor in weights.items()})

    def _check_fits(self, weights: Mapping[str, Tensor]) -> None:
        own = self.model.state_dict()
        other = sorted({*own, *weights} - ({*own} & {*weights}))
        other += [name for name in own if name in weights and _form(own[name]) != _form(weights[name])]
        if other:
            raise UserError(f"the saved weights are of another model: {shown(other[0])} is not in both with one shape and type")


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype

"""One optimizer step over a batch: micro-batches, one decision of all ranks, one reduction, one update."""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracknet.data.batch import Batch
from tracknet.errors import UserError
from tracknet.geometry import resize_points
from tracknet.heatmap import render_heatmaps
from tracknet.training.microbatch import MicroBatchSize, is_out_of_memory, release_memory
from tracknet.training.ranks import Ranks

log = logging.getLogger("tracknet")


class FlatGradients:
    """The gradients of the trainable parameters as views of one buffer, so that all of them are reduced in one collective."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        first = self._parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in self._parameters), dtype=first.dtype, device=first.device)

    def zero_(self) -> None:
        """Sets all gradients to 0 and makes every `.grad` a view of the buffer (again)."""
        self.buffer.zero_()
        start = 0
        for parameter in self._parameters:
            # the parameter's own strides: a view laid out otherwise would be added to slowly
            parameter.grad = self.buffer[start : start + parameter.numel()].as_strided(parameter.shape, parameter.stride(), start)
            start += parameter.numel()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """For sums over many samples; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Sums:
    """What a rank found in its micro-batches; summed over the ranks, what the step decides by."""

    loss: float = 0.0
    labeled_frames: float = 0.0
    non_finite: float = 0.0  # samples
    out_of_memory: float = 0.0  # ranks
    stop: float = 0.0  # ranks that were asked to stop
    samples: float = 0.0

    def over(self, ranks: Ranks) -> "Sums":
        """The sums over all ranks. All ranks call this."""
        if ranks.size == 1:
            return self
        values = torch.tensor(astuple(self), dtype=accumulation_dtype(ranks.device), device=ranks.device)
        return Sums(*ranks.sum_(values).tolist())


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on all ranks.

    Attributes:
        loss: mean over the labelled frames of all ranks, before the update.
        grad_norm: global norm before clipping.
        skipped: whether fp16's gradients overflowed, so that the weights stayed as they were.
        samples: windows of all ranks.
        micro_batch_size: the size that fitted.
        retries: attempts that ran out of memory before.
        stop: whether any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    skipped: bool
    samples: int
    micro_batch_size: int
    retries: int
    stop: bool


class TrainingStep:
    """Updates the weights once per call. The gradient is that of the whole batch of all ranks, however small the micro-batches are:
    per-frame losses are summed, and the sum is divided by one count that all micro-batches and ranks share.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        frame_losses: Callable[[Tensor, Tensor], Tensor],
        *,
        ranks: Ranks,
        micro_batch: MicroBatchSize,
        nominal_frames: int,
        sigma: float,
        clip_norm: float,
        seed: int,
        describe: Callable[[int], str],
        autocast: Callable[[], AbstractContextManager[None]],
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Takes its parts.

        Args:
            model: `(frames, background, dropout_keys) -> logits`, see `tracknet.models`.
            optimizer: over the model's parameters.
            frame_losses: (logits, target) -> loss of each frame, (B, T).
            ranks: the processes that make this step together.
            micro_batch: the present size; lowered here when memory runs out.
            nominal_frames: frames of a full batch of one rank: summed losses are divided by it before the backward pass, which keeps
                fp16 in range, and multiplied by it afterwards.
            sigma: of the Gaussian targets, in heatmap cells.
            clip_norm: bound of the global gradient norm; 0 does not clip.
            seed: of the run, for dropout.
            describe: names a sample by its index, for messages.
            autocast: the precision that the forward pass runs in.
            scaler: of fp16's loss; disabled otherwise.
        """
        self._model, self._optimizer, self._frame_losses = model, optimizer, frame_losses
        self._ranks, self._micro_batch = ranks, micro_batch
        self._nominal_frames = nominal_frames
        self._sigma, self._clip_norm, self._seed = sigma, clip_norm, seed
        self._describe = describe
        self._autocast, self._scaler = autocast, scaler
        self.parameters_changed()

    def parameters_changed(self) -> None:
        """To be called when parameters were frozen or released."""
        self._optimizer.zero_grad(set_to_none=True)
        self._gradients = FlatGradients(self._model.parameters())

    def __call__(self, batch: Batch, step: int, stop: bool) -> StepResult:
        """Runs one step. All ranks call this.

        Args:
            batch: this rank's samples, in host memory; may be empty.
            step: the update's number in the run, from 0.
            stop: whether this rank was asked to stop.

        Raises:
            UserError: memory ran out at the smallest size allowed, or a loss is not finite; on all ranks alike.
        """
        retries = 0
        while True:
            size = self._micro_batch.value
            own, non_finite = self._accumulate(batch, step, size, stop)
            total = own.over(self._ranks)
            if not total.out_of_memory:
                break
            release_memory(self._ranks.device)
            self._micro_batch.back_off(retries)
            retries += 1
            log.warning(
                "step %d: out of memory at %d; now micro-batches of %d, the update is unchanged", step, size, self._micro_batch.value
            )
        if total.non_finite:
            self._refuse_non_finite(batch, non_finite, step)
        grad_norm, skipped = self._update(total.labeled_frames, step)
        loss = total.loss / max(1.0, total.labeled_frames)
        return StepResult(loss, grad_norm, skipped, int(total.samples), size, retries, bool(total.stop))

    def _accumulate(self, batch: Batch, step: int, size: int, stop: bool) -> tuple[Sums, Tensor]:
        """Adds up this rank's gradient of the summed loss, micro-batch by micro-batch; says so if memory runs out in between.

        Returns:
            the sums of this rank, and (B,) bool: the samples whose loss is not finite.
        """
        self._gradients.zero_()
        losses: list[Tensor] = []
        out_of_memory = False
        try:
            for part in batch.split(size):
                losses.append(self._backward(part, step))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        per_sample = torch.cat(losses).to(accumulation_dtype(self._ranks.device)) if losses else torch.zeros(0)
        non_finite = ~torch.isfinite(per_sample)
        loss, bad_samples = torch.stack(
            [per_sample.sum(), non_finite.sum()]
        ).tolist()  # one wait for the device, whatever the number of micro-batches
        sums = Sums(loss, float(batch.labeled.sum()), bad_samples, float(out_of_memory), float(stop), float(len(batch)))
        return sums, non_finite

    def _backward(self, batch: Batch, step: int) -> Tensor:
        """Forward and backward of one micro-batch; returns (b,), each sample's loss summed over its labelled frames."""
        keys = dropout_keys(self._seed, step, batch.sample_index)
        torch.manual_seed(int(keys[0]))  # for dropout inside a pretrained backbone, which takes no keys
        batch, keys = batch.to(self._ranks.device), keys.to(self._ranks.device)
        with self._autocast():
            logits = self._model(batch.frames, batch.background, keys)
        height, width = batch.frames.shape[-2:]
        size_hw = (logits.shape[-2], logits.shape[-1])
        xy_heatmap = resize_points(batch.xy_input, (width, height), (size_hw[1], size_hw[0]))
        losses = self._frame_losses(logits, render_heatmaps(xy_heatmap, batch.visible, size_hw, self._sigma))
        per_sample = torch.where(batch.labeled, losses, torch.zeros_like(losses)).sum(dim=1)
        torch.autograd.backward(self._scaler.scale(per_sample.sum() / self._nominal_frames))
        return per_sample.detach()

    def _refuse_non_finite(self, batch: Batch, non_finite: Tensor, step: int) -> NoReturn:
        """All ranks call this."""
        samples = self._ranks.gather([self._describe(int(index)) for index in batch.sample_index[non_finite.cpu()]])
        raise UserError(
            f"step {step}: the loss is not finite for {', '.join(samples)}; lower training.optimizer.lr, set or lower training.grad_clip,"
            " or set training.precision=fp32"
        )

    def _update(self, labeled_frames: float, step: int) -> tuple[float, bool]:
        """Reduces, divides, clips and steps. All ranks call this.

        Returns:
            the gradient's norm before clipping, and whether fp16's scaler skipped the update.
        """
        gradient = self._ranks.sum_(self._gradients.buffer)
        gradient.mul_(self._nominal_frames / max(1.0, labeled_frames))
        self._scaler.unscale_(self._optimizer)
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            raise UserError(f"step {step}: the gradient is not finite; lower training.optimizer.lr, or set or lower training.grad_clip")
        if self._clip_norm > 0:
            gradient.mul_(min(1.0, self._clip_norm / (norm + 1e-6)))  # 1e-6: as torch.nn.utils.clip_grad_norm_
        scale_before = self._scaler.get_scale()
        try:
            self._scaler.step(self._optimizer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # the weights may be half changed, so this step cannot be tried again
            raise UserError(
                f"step {step}: out of memory in the optimizer's update; choose a smaller model or training.optimizer.name"
            ) from error
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < 1:
            raise UserError(f"step {step}: fp16's gradients overflow at every loss scale down to 1; set training.precision=bf16 or fp32")
        return norm, self._scaler.get_scale() < scale_before


def dropout_keys(seed: int, step: int, sample_index: Tensor) -> Tensor:
    """A number for each sample that its dropout is drawn from: the same whatever the micro-batch, the rank or the attempt.

    Args:
        seed: of the run.
        step: the update's number.
        sample_index: (B,) int64.

    Returns:
        (B,) int64, >= 0, on the samples' device.
    """
    # odd multipliers (of splitmix64 and xxhash) spread neighbouring seeds, steps and samples; int64 wraps around
    base = (seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F) % 2**62
    return (sample_index * 0x165667B19E3779F9 + base) & (2**62 - 1)

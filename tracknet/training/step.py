"""One optimizer step over a batch: micro-batches, one decision of all ranks, one reduction, one update."""

import logging
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor
from torch.optim import Optimizer

from tracknet.data.batch import Batch
from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory, release_memory
from tracknet.training.failed_update import FailedUpdate
from tracknet.training.gradient import Gradients, SummedLoss, accumulation_dtype, refuse_batch_statistics, squared_norm
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.ranks import Ranks
from tracknet.training.refusals import fp16_overflows, gradient_is_not_finite, loss_is_not_finite, memory_ran_out, out_of_memory_in_update

log = logging.getLogger("tracknet")


@dataclass(frozen=True)
class Sums:
    """What a rank found in its micro-batches; summed over the ranks, what the step decides by."""

    loss: float = 0.0
    labeled_frames: float = 0.0
    non_finite: float = 0.0  # samples
    out_of_memory: float = 0.0  # ranks
    failed: float = 0.0  # ranks that cannot go on
    stop: float = 0.0  # ranks that were asked to stop
    samples: float = 0.0

    def over(self, ranks: Ranks, room: Tensor) -> "Sums":
        """The sums over all ranks. All ranks call this.

        Args:
            ranks: to sum over.
            room: (7,) on the ranks' device; allocated before memory is short.
        """
        if ranks.size == 1:
            return self
        return Sums(*ranks.sum_(room.copy_(torch.tensor(astuple(self), dtype=room.dtype))).tolist())


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
        summed_loss: SummedLoss,
        optimizer: Optimizer,
        *,
        ranks: Ranks,
        micro_batch: MicroBatchSize,
        clip_norm: float,
        describe: Callable[[int], str],
    ) -> None:
        """Takes its parts.

        Args:
            summed_loss: the gradient of a micro-batch.
            optimizer: over the model's parameters.
            ranks: the processes that make this step together.
            micro_batch: the present size; lowered here when memory runs out, and told of every step that passed.
            clip_norm: bound of the global gradient norm; 0 does not clip.
            describe: names a sample by its index, for messages.

        Raises:
            ConfigError: the model has layers whose output for a sample depends on the rest of its micro-batch.
        """
        self._summed_loss, self._scaler = summed_loss, summed_loss.scaler
        self._scale = self._scaler.get_scale()
        self._optimizer, self._ranks, self._clip_norm, self._describe = optimizer, ranks, clip_norm, describe
        self._sums = torch.zeros(len(fields(Sums)), dtype=accumulation_dtype(ranks.device), device=ranks.device)
        self.failed_update = FailedUpdate(ranks)
        self._begin(micro_batch)

    def begin_phase(self, micro_batch: MicroBatchSize) -> None:
        """To be called by all ranks when parameters were frozen or released, with the sizes that belong to what trains now."""
        self._gradients.close()
        self._begin(micro_batch)

    def _begin(self, micro_batch: MicroBatchSize) -> None:
        refuse_batch_statistics(self._summed_loss.model)
        self._micro_batch, self._is_trial = micro_batch, False
        self._optimizer.zero_grad(set_to_none=True)
        flat = self._ranks.size > 1
        self._gradients = self._ranks.together(lambda: Gradients(self._summed_loss.model.parameters(), flat=flat))
        if flat:
            # what the first reduction allocates is had now, where nothing needs to be retried
            self._ranks.sum_(self._gradients.tensors()[0])

    def __call__(self, batch: Batch | UserError, step: int, stop: bool) -> StepResult:
        """Runs one step. All ranks call this.

        Args:
            batch: this rank's samples, in host memory; may be empty. Or why it has none, which then ends the run on all ranks.
            step: the update's number in the run, from 0.
            stop: whether this rank was asked to stop.

        Raises:
            UserError: a rank has no batch, memory ran out at the smallest size allowed, or a loss is not finite; on all ranks alike.
        """
        if self._is_trial:
            log.info("step %d: trying micro-batches of %d again", step + 1, self._micro_batch.value)
        first_size, retries = self._micro_batch.value, 0
        while True:
            size = self._micro_batch.value
            own, bad_samples = self._accumulate(batch, step, size, stop)
            total = own.over(self._ranks, self._sums)
            if total.failed:
                self.failed_update.raise_on_all(batch if isinstance(batch, UserError) else None)
            if not total.out_of_memory:
                break
            largest = int(max(self._ranks.gather([own.samples])))
            try:
                self._micro_batch.back_off(retries, tried=largest)
            except UserError as reason:
                raise memory_ran_out(step, reason) from None
            retries += 1
        if total.non_finite:
            raise loss_is_not_finite(step, self._ranks.gather([self._describe(index) for index in bad_samples]))
        if retries:
            pieces = max(1, math.ceil(own.samples / size))
            now = f"{pieces} micro-batches of {size}" if pieces > 1 else f"1 micro-batch of {size}"
            log.warning("step %d: out of memory at %d; now %s, the update is unchanged", step + 1, first_size, now)
        grad_norm, skipped = self._update(total.labeled_frames, step)
        self._is_trial = not retries and self._micro_batch.passed(tried=math.ceil(total.samples / self._ranks.size))
        loss = total.loss / max(1.0, total.labeled_frames)
        return StepResult(loss, grad_norm, skipped, int(total.samples), size, retries, bool(total.stop))

    def _accumulate(self, batch: Batch | UserError, step: int, size: int, stop: bool) -> tuple[Sums, list[int]]:
        """Adds up this rank's gradient of the summed loss, micro-batch by micro-batch; says so if memory runs out in between.

        Returns:
            the sums of this rank, and the indices of the samples whose loss is not finite.
        """
        if self.failed_update.reason or isinstance(batch, UserError):
            return Sums(failed=1.0), []
        out_of_memory = False
        try:
            self._gradients.clear()
            losses = [self._summed_loss.backward(part, step) for part in batch.split(size)]
            per_sample = torch.cat(losses).to(accumulation_dtype(self._ranks.device)) if losses else torch.zeros(0)
            loss = per_sample.sum().item()  # one wait for the device, whatever the number of micro-batches
            bad = [] if math.isfinite(loss) else (~torch.isfinite(per_sample)).nonzero()[:, 0].tolist()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:  # not in the `except` block: the traceback keeps the tensors alive
            release_memory(self._ranks.device)
            return Sums(out_of_memory=1.0, samples=float(len(batch))), []
        sums = Sums(loss, float(batch.labeled.sum()), float(len(bad)), stop=float(stop), samples=float(len(batch)))
        return sums, batch.sample_index[bad].tolist() if bad else []

    def _update(self, labeled_frames: float, step: int) -> tuple[float, bool]:
        """Reduces, divides, clips and steps. All ranks call this.

        Returns:
            the gradient's norm before clipping, and whether fp16's scaler skipped the update.
        """
        if self._ranks.size > 1:
            self._ranks.sum_(self._gradients.tensors()[0])
        try:
            norm = self._apply(labeled_frames, step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # the weights may be half changed, so this step cannot be tried again; and the others do not know yet
            self.failed_update.reason = out_of_memory_in_update(step)
            return math.nan, True
        return norm, self._scaler.is_enabled() and self._adapt_scale(step)

    def _adapt_scale(self, step: int) -> bool:
        """Lets fp16's scale fall after an overflow, or rise; returns whether it fell."""
        before = self._scale
        self._scaler.update()
        self._scale = self._scaler.get_scale()  # waits for the device, so once a step
        if self._scale < 1:
            raise fp16_overflows(step)
        return self._scale < before

    def _apply(self, labeled_frames: float, step: int) -> float:
        """Divides the reduced gradient by its count, clips it and makes the update; returns its norm before clipping."""
        gradients = self._gradients.tensors()
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        factor = self._summed_loss.nominal_frames / max(1.0, labeled_frames)
        norm = math.sqrt(squared_norm(gradients)) * factor
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            raise gradient_is_not_finite(step)
        if self._clip_norm > 0:
            factor *= min(1.0, self._clip_norm / (norm + 1e-6))  # 1e-6: as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(gradients, factor)  # once for the mean and the clipping
        self._scaler.step(self._optimizer)
        return norm

"""One optimizer step over a batch where each process holds a slice of the model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tracknet.data.batch import Batch
from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory
from tracknet.training.failed_update import FailedUpdate
from tracknet.training.gradient import SummedLoss, accumulation_dtype, refuse_batch_statistics, squared_norm
from tracknet.training.last_word import last_word
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.ranks import Ranks
from tracknet.training.refusals import gradient_is_not_finite, loss_is_not_finite, memory_ran_out, out_of_memory_in_update
from tracknet.training.step import StepResult


class ShardedStep:
    """Updates the weights once per call, to what `TrainingStep` makes of the same batch.

    The ranks exchange parameters inside every forward and backward pass, so all of them run the same number of micro-batches, and a rank
    that runs out of memory leaves the others in the middle of a collective: the step cannot be tried again. The run then stops on all
    ranks with the same line, and a restart goes on from the last checkpoint at the next smaller size. For the same reason no larger
    size is tried again.
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
        keep_sizes: Callable[[int], None],
    ) -> None:
        """Takes its parts.

        Args:
            summed_loss: the gradient of a micro-batch of a model from `sharding`; its scaler is disabled.
            optimizer: over the model's parameters.
            ranks: the processes that share the model.
            micro_batch: the present size; lowered here when memory runs out.
            clip_norm: bound of the global gradient norm; 0 does not clip.
            describe: names a sample by its index, for messages.
            keep_sizes: writes the micro-batch sizes where a restart finds them; called with the updates made, where memory ran out.

        Raises:
            ConfigError: the model has layers whose output for a sample depends on the rest of its micro-batch.
        """
        self._summed_loss, self._optimizer, self._ranks = summed_loss, optimizer, ranks
        self._clip_norm, self._describe, self._keep_sizes = clip_norm, describe, keep_sizes
        self.failed_update = FailedUpdate(ranks)
        self.begin_phase(micro_batch)

    def begin_phase(self, micro_batch: MicroBatchSize) -> None:
        """To be called by all ranks when parameters were frozen or released, with the sizes that belong to what trains now."""
        refuse_batch_statistics(self._summed_loss.model)
        self._micro_batch = micro_batch
        self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: Batch | UserError, step: int, stop: bool) -> StepResult:
        """Runs one step. All ranks call this.

        Args:
            batch: this rank's samples, in host memory; may be empty. Or why it has none, which then ends the run on all ranks.
            step: the update's number in the run, from 0.
            stop: whether this rank was asked to stop.

        Raises:
            UserError: a rank has no batch, memory ran out, or a loss is not finite; on all ranks alike.
        """
        with last_word(lambda: self._give_up(step)):
            return self._step(batch, step, stop)

    def _give_up(self, step: int) -> str:
        """Notes the next smaller size for a restart; returns why this run stops."""
        size = self._micro_batch.value
        try:
            self._micro_batch.back_off(0)
        except UserError as error:
            return str(memory_ran_out(step, error))
        then = f"a restart goes on with {self._micro_batch.value}"
        try:
            self._keep_sizes(step)
        except UserError as error:
            then = f"restart it with training.micro_batch_size={self._micro_batch.value}, which could not be noted: {error}"
        reason = UserError(
            f"out of memory at micro-batches of {size} while the model is sharded, where a step cannot be tried again;"
            f" the last checkpoint is whole, and {then}"
        )
        return str(memory_ran_out(step, reason))

    def _step(self, batch: Batch | UserError, step: int, stop: bool) -> StepResult:
        failed = bool(self.failed_update.reason) or isinstance(batch, UserError)
        samples = 0 if isinstance(batch, UserError) else len(batch)
        labeled_here = 0.0 if isinstance(batch, UserError) else float(batch.labeled.sum())
        failures, stops, labeled_frames, *samples_of_ranks = self._announce(failed, stop, labeled_here, samples)
        if failures or isinstance(batch, UserError):
            self.failed_update.raise_on_all(batch if isinstance(batch, UserError) else None)
        assert isinstance(batch, Batch)
        size = self._micro_batch.value
        per_sample = self._accumulate(batch, step, max(1, math.ceil(max(samples_of_ranks) / size)))
        loss, grad_norm = self._agree(batch, step, per_sample, labeled_frames)
        self._update(step, grad_norm)
        loss /= max(1.0, labeled_frames)
        return StepResult(loss, grad_norm, False, int(sum(samples_of_ranks)), size, 0, bool(stops))

    def _announce(self, failed: bool, stop: bool, labeled_frames: float, samples: int) -> list[float]:
        """What must be known before the forward passes: failures, stops and labelled frames of all ranks, and the samples of each."""
        values = torch.zeros(3 + self._ranks.size, dtype=accumulation_dtype(self._ranks.device))
        values[:3] = torch.tensor([float(failed), float(stop), labeled_frames])
        values[3 + self._ranks.rank] = samples
        return [float(value) for value in self._ranks.sum_(values.to(self._ranks.device)).tolist()]

    def _accumulate(self, batch: Batch, step: int, micro_batches: int) -> Tensor:
        """Adds up the gradient, reduced over the ranks with every micro-batch, so that none holds more than its slice of the sum.

        Returns:
            (B,), each sample's loss summed over its labelled frames.
        """
        self._optimizer.zero_grad(set_to_none=True)
        own = list(batch.split(self._micro_batch.value))
        losses: list[Tensor] = []
        for number in range(micro_batches):
            if number < len(own):
                losses.append(self._summed_loss.backward(own[number], step))
            else:
                self._summed_loss.backward(batch.blank_window(), step)  # its gradient is 0
        dtype = accumulation_dtype(self._ranks.device)
        return torch.cat(losses).to(dtype) if losses else torch.zeros(0, dtype=dtype, device=self._ranks.device)

    def _agree(self, batch: Batch, step: int, per_sample: Tensor, labeled_frames: float) -> tuple[float, float]:
        """Divides the gradient and refuses what is not finite, on all ranks.

        Returns:
            the summed loss of all ranks, and the norm of the whole gradient.
        """
        gradients = self._local_gradients()
        # reducing has divided by the number of ranks
        torch._foreach_mul_(gradients, self._summed_loss.nominal_frames * self._ranks.size / max(1.0, labeled_frames))
        non_finite = ~torch.isfinite(per_sample)
        sums = torch.stack([per_sample.sum(), non_finite.sum().to(per_sample.dtype), squared_norm(gradients)])
        loss, bad_samples, squares = self._ranks.sum_(sums).tolist()
        if bad_samples:
            own = batch.sample_index[non_finite.cpu()].tolist()
            raise loss_is_not_finite(step, self._ranks.gather([self._describe(index) for index in own]))
        if not math.isfinite(squares):
            raise gradient_is_not_finite(step)
        return loss, math.sqrt(squares)

    def _update(self, step: int, grad_norm: float) -> None:
        if self._clip_norm > 0:
            # 1e-6: as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_(self._local_gradients(), min(1.0, self._clip_norm / (grad_norm + 1e-6)))
        try:
            self._optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # the weights may be half changed, so this step cannot be tried again; and the others do not know yet
            self.failed_update.reason = out_of_memory_in_update(step)

    def _local_gradients(self) -> list[Tensor]:
        """This rank's slices, not copied."""
        gradients: list[Tensor] = []
        for parameter in self._summed_loss.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:  # the loss does not depend on it
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad)
        return gradients

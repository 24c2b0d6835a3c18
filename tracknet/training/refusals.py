"""What a step says when it cannot go on: the same lines whether the model is sharded or not.

Steps count from 0 in the program, and from 1 here as on the display.
"""

from collections.abc import Sequence

from tracknet.errors import UserError


def loss_is_not_finite(step: int, samples: Sequence[str]) -> UserError:
    """Names the samples of all ranks."""
    return UserError(
        f"step {step + 1}: the loss is not finite for {', '.join(samples)}; lower training.optimizer.lr, set or lower training.grad_clip,"
        " or set training.precision=fp32"
    )


def gradient_is_not_finite(step: int) -> UserError:
    """The weights are as they were."""
    return UserError(f"step {step + 1}: the gradient is not finite; lower training.optimizer.lr, or set or lower training.grad_clip")


class HalfMadeUpdateError(UserError):
    """An update that failed: the weights of a rank may be half changed, and must not be saved."""


def out_of_memory_in_update(step: int) -> UserError:
    """The weights may be half changed."""
    return HalfMadeUpdateError(
        f"step {step + 1}: out of memory in the optimizer's update, which cannot be tried again;"
        " choose a smaller model or training.optimizer.name"
    )


def memory_ran_out(step: int, reason: UserError) -> UserError:
    """The weights are as they were; `reason` comes from `MicroBatchSize`."""
    return UserError(f"step {step + 1}: {reason}")


def fp16_overflows(step: int) -> UserError:
    """The weights are as they were."""
    return UserError(f"step {step + 1}: fp16's gradients overflow at every loss scale down to 1; set training.precision=bf16 or fp32")

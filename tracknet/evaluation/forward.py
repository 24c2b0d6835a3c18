"""Windows through a network, so many at once as is quickest where they are."""

from collections.abc import Callable

import torch
from torch import Tensor

from tracknet.errors import UserError

Forward = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def logits_of(model: Forward, frames: Tensor, background: Tensor | None) -> Tensor:
    """Logits of the ball's heatmap in every frame; on a CPU the windows go in one after the other.

    What a layer makes of one window at 512x288 fits into memory that the C library keeps for the next layer. From 32 MB on, the limit of
    its M_MMAP_THRESHOLD, it gives memory back to the system at once, which clears every page before it lends it again: with eight windows
    the small U-Net took 2.2 times as long for each.

    Args:
        model: `(frames, background, dropout_keys) -> logits`.
        frames: uint8 (B, T, 3, H, W), on the model's device; at least one window.
        background: uint8 (B, 3, H, W), beside them; None where the model takes none.

    Returns:
        (B, T, h, w) float.
    """
    if frames.device.type != "cpu" or len(frames) == 1:
        return model(frames, background, None)
    one_by_one = [slice(number, number + 1) for number in range(len(frames))]
    return torch.cat([model(frames[one], None if background is None else background[one], None) for one in one_by_one])


def out_of_memory(windows: int, device: str) -> UserError:
    """What to do where memory runs out in `logits_of`.

    Args:
        windows: that it was given.
        device: its kind, such as `cpu`.
    """
    lower = "lower --batch-size (BallTracker: batch_windows)"
    if device == "cpu":
        return UserError(f"out of memory with one window in each thread; set OMP_NUM_THREADS to fewer threads, or {lower}")
    return UserError(f"out of memory with {windows} windows at once; {lower}")

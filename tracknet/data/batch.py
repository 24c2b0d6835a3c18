"""The one type that travels from the data to the device: uint8 pictures and coordinates, never heatmaps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B windows of T frames.

    `labeled` says whether the loss and the metrics may look at a frame, `visible` whether there is a ball to see; a frame without a ball
    is labelled. `frame_row` is the frame's row in the `ClipIndex`; `counted` marks, in evaluation, the frames that this window answers for
    (each frame of the data set exactly once).
    """

    frames: Tensor  # uint8 (B, T, 3, H, W), RGB
    background: Tensor | None  # uint8 (B, 3, H, W): the clip's median picture under the same geometric transform; None if off
    xy_input: Tensor  # float32 (B, T, 2), input px; 0 where no ball is visible
    visible: Tensor  # bool (B, T)
    labeled: Tensor  # bool (B, T)
    sample_index: Tensor  # int64 (B,), the window's number in its data set
    frame_row: Tensor  # int64 (B, T)
    counted: Tensor  # bool (B, T)

    def __len__(self) -> int:
        return self.frames.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            frames=function(self.frames),
            background=None if self.background is None else function(self.background),
            xy_input=function(self.xy_input),
            visible=function(self.visible),
            labeled=function(self.labeled),
            sample_index=function(self.sample_index),
            frame_row=function(self.frame_row),
            counted=function(self.counted),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on `device`, without waiting for it where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In page-locked memory; called by the DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> "Batch":
        """In memory that other processes can map."""
        return self._map(Tensor.share_memory_)

    def blank_window(self) -> "Batch":
        """One window of zeros of this batch's shapes, with nothing labelled; the batch may be empty."""
        return self._map(lambda tensor: torch.zeros((1, *tensor.shape[1:]), dtype=tensor.dtype))

    def split(self, size: int) -> Iterator["Batch"]:
        """Views of at most `size` windows each, in order."""
        for start in range(0, len(self), size):
            yield self._map(itemgetter(slice(start, start + size)))

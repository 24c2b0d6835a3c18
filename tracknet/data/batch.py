"""The one type that travels from the data to the device: uint8 pictures and coordinates, never heatmaps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a cache line: where each tensor of a block may begin


def as_stored(pictures: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) as (..., H, W, 3): the order of the files and of the memory of a `Batch`. A view."""
    return pictures.movedim(-3, -1)


def as_seen(pictures: Tensor) -> Tensor:
    """Pictures (..., H, W, 3) as (..., 3, H, W): the order of the networks. A view."""
    return pictures.movedim(-1, -3)


def empty_pictures(*count: int, size_wh: tuple[int, int]) -> Tensor:
    """Room for pictures, uint8 (*count, 3, H, W), in memory as those of a `Batch`: the networks' last bits may depend on that order."""
    width, height = size_wh
    return as_seen(torch.empty((*count, height, width, 3), dtype=torch.uint8))


@dataclass(frozen=True)
class Batch:
    """B windows of T frames.

    `labeled` says whether the loss and the metrics may look at a frame, `visible` whether there is a ball to see; a frame without a ball
    is labelled. `frame_row` is the frame's row in the `ClipIndex`; `counted` marks, in evaluation, the frames that this window answers for
    (each frame of the data set exactly once). In memory the three colours of a pixel lie together, as in the files of the cache, so that a
    window is copied in one piece (`as_stored`); turning the order about on the way takes 11 times as long.
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

    def blank_window(self) -> "Batch":
        """One window of zeros of this batch's shapes, with nothing labelled; the batch may be empty."""
        _, frames, _, height, width = self.frames.shape
        block = Block(1, frames, (width, height), self.background is not None)
        return block.within(torch.zeros(block.byte_count, dtype=torch.uint8)).batch()

    def split(self, size: int) -> Iterator["Batch"]:
        """Views of at most `size` windows each, in order; of no windows none, and where all fit the batch itself."""
        if 0 < len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            yield self._map(itemgetter(slice(start, start + size)))


@dataclass(frozen=True)
class Block:
    """A batch in one piece of memory: one allocation, one hand-over between processes and one copy into pinned memory in place of eight."""

    windows: int  # B
    frames: int  # T
    size_wh: tuple[int, int]
    has_background: bool
    memory: Tensor | None = None  # uint8 (byte_count,); None before it has some

    @property
    def byte_count(self) -> int:
        """How much memory it needs."""
        return sum(_room(shape, dtype) for shape, dtype in self._layout())

    def within(self, memory: Tensor) -> "Block":
        """The same in this memory, uint8 (byte_count,)."""
        return replace(self, memory=memory)

    def pin_memory(self) -> "Block":
        """In page-locked memory; called by the DataLoader."""
        assert self.memory is not None
        return self.within(self.memory.pin_memory())

    def batch(self) -> Batch:
        """The batch, whose tensors are views of the memory."""
        assert self.memory is not None
        views, start = [], 0
        for shape, dtype in self._layout():
            piece = self.memory[start : start + math.prod(shape) * dtype.itemsize]
            views.append(piece.view(dtype).view(shape))
            start += _room(shape, dtype)
        frames, background, *labels = views
        return Batch(as_seen(frames), as_seen(background) if self.has_background else None, *labels)

    def _layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape in memory and type of each field of `Batch`, in its order."""
        (width, height), each_frame = self.size_wh, (self.windows, self.frames)
        return [
            ((*each_frame, height, width, 3), torch.uint8),
            ((self.windows if self.has_background else 0, height, width, 3), torch.uint8),
            ((*each_frame, 2), torch.float32),
            (each_frame, torch.bool),
            (each_frame, torch.bool),
            ((self.windows,), torch.int64),
            (each_frame, torch.int64),
            (each_frame, torch.bool),
        ]


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor with the gap behind it."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

"""A copy of tensors in host memory that is kept from copy to copy, so that taking one costs no more than moving the bytes."""

import contextlib
import mmap
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; of each tensor, for the vector instructions of a copy
_BETWEEN_TENSORS = 2**20  # bytes; room for the alignment of 16,000 tensors


class Snapshot:
    """One block of host memory, as large as the largest copy so far.

    Where a tensor is on a CUDA device it is pinned; torch's allocator of such memory rounds it up to a power of two.

    It is filled in whole pages of 2 MiB where the system has them, and forked processes do not get it: otherwise the first copy after
    each fork of a data loader's worker would have to move every page first.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    @property
    def byte_count(self) -> int:
        """What it takes of host memory."""
        return self._block.numel()

    def reserve(self, byte_count: int, pinned: bool) -> None:
        """Makes room, touching each page, so that the next copy finds it ready. What was copied before is lost if it grows.

        Args:
            byte_count: of all tensors; some more is taken, for what lies between them.
            pinned: whether they are on a CUDA device.

        Raises:
            MemoryError: there is not so much memory. RuntimeError where it is to be pinned.
        """
        if self._grow(byte_count + byte_count // 64 + _BETWEEN_TENSORS, pinned):
            self._block.zero_()

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies groups of tensors; returns when the copies are complete.

        Args:
            tensors: on any devices, in any memory layout. What is dense keeps its layout, so that its copy is a plain one.

        Returns:
            The same groups on the CPU. They are overwritten by the next call.

        Raises:
            MemoryError: there is not enough host memory. RuntimeError where it is to be pinned.
        """
        flat = [tensor.detach() for group in tensors.values() for tensor in group.values()]
        offsets, end = [], 0
        for tensor in flat:
            offsets.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        devices = {tensor.device for tensor in flat if tensor.is_cuda}
        self._grow(end, pinned=bool(devices))
        copies = iter([self._view(offset, tensor) for offset, tensor in zip(offsets, flat, strict=True)])
        result = {name: {key: next(copies) for key in group} for name, group in tensors.items()}
        for copy, tensor in zip((copy for group in result.values() for copy in group.values()), flat, strict=True):
            copy.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return result

    def _grow(self, byte_count: int, pinned: bool) -> bool:
        """Makes room, untouched: the copy itself takes the pages. Gives whether there was not enough."""
        if byte_count <= self._block.numel() and (not pinned or self._block.is_pinned()):
            return False
        self._block = torch.empty(0, dtype=torch.uint8)  # given back first
        if pinned:
            self._block = torch.empty(byte_count, dtype=torch.uint8, pin_memory=True)
        elif sys.platform == "linux":
            self._block = _huge_pages(byte_count)
        else:
            self._block = torch.empty(byte_count, dtype=torch.uint8)
        return True

    def _view(self, offset: int, tensor: Tensor) -> Tensor:
        """The place for a tensor's copy, with its strides where it is dense."""
        stride = tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()
        place = self._block[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        return place.as_strided(tensor.shape, stride)


def _huge_pages(byte_count: int) -> Tensor:
    if byte_count == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        block = mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {byte_count / 2**30:.2f} GiB of host memory for the copy that is to be saved: {error.strerror}") from error
    for advice in (mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):
        with contextlib.suppress(OSError):  # a kernel without it is only slower
            block.madvise(advice)
    return torch.frombuffer(block, dtype=torch.uint8)

"""Groups of tensors as safetensors files (https://huggingface.co/docs/safetensors): one pass to write and hash, one to read and verify.

The library's own functions want a whole group contiguous, hash nothing, and map files into memory, where one that is cut short while it is
read kills the process. These hold one tensor at a time beside the caller's; the files are the same to the byte.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracknet.training.untrusted import damaged, opened, parse_json

CHUNK_BYTES = 4 * 2**20  # hashed and written at once, without Python's lock; a multiple of the size of any number
MAX_HEADER_BYTES = 16 * 2**20  # room for 100,000 tensors
MAX_DIMENSIONS = 64

# In the order in which the library puts them into a file.
_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Where all bits of a float's exponent are set it is an infinity or NaN (IEEE 754).
_EXPONENT = {torch.float64: 0x7FF << 52, torch.float32: 0xFF << 23, torch.bfloat16: 0xFF << 7, torch.float16: 0x1F << 10}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its name and form, and where its bytes lie behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class NotFiniteError(ValueError):
    """A tensor with a NaN or an infinity in it, where none may be; its name is the message."""


def write_tensors(group: Mapping[str, Tensor], write: Callable[[memoryview], None], finite: bool) -> None:
    """Writes a group of tensors on the CPU in the order of the file.

    Args:
        group: dense tensors in any memory layout; they may share memory.
        write: takes the next bytes; it is called with at most `CHUNK_BYTES` at once, the header apart.
        finite: refuse NaN and infinity.

    Raises:
        NotFiniteError: one has some.
        ValueError: a tensor of a type that is not in the files of TrackNet.
    """
    for name, tensor in group.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name} is of type {tensor.dtype}, which TrackNet does not save")
    ranking = list(_DTYPES.values())
    names = sorted(group, key=lambda name: (ranking.index(group[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + group[name].numel() * group[name].element_size()
        header[name] = {"dtype": _NAMES[group[name].dtype], "shape": list(group[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(memoryview(len(text).to_bytes(8, "little") + text))
    for name in names:
        tensor = group[name].detach()
        # numpy's copy is of one thread, which leaves the other cores to the training
        flat = np.ascontiguousarray(tensor.view(_BITS[tensor.element_size()]).numpy()).reshape(-1)
        for piece in _pieces(flat):
            if finite and not _all_finite(piece, tensor.dtype):
                raise NotFiniteError(name)
            write(piece.data.cast("B"))


def read_header(file: Path) -> list[Entry]:
    """What is in a tensor file, in order; checks that the file is as long as its header says.

    Raises:
        CheckpointError: it is not a whole safetensors file.
    """
    with opened(file) as descriptor:
        return _read_header(file, descriptor, lambda _: None)


def read_tensors(file: Path, *, finite: bool, keep: bool) -> tuple[dict[str, Tensor], str]:
    """Reads a tensor file once, from its first byte to its last.

    Args:
        file: to read.
        finite: refuse NaN and infinity.
        keep: whether the tensors are wanted; otherwise a few megabytes of memory are enough.

    Returns:
        The tensors on the CPU (none without `keep`), and the file's sha256 in hexadecimal. What was hashed is what was read.

    Raises:
        CheckpointError: it is not a whole safetensors file, or has a NaN or infinity that it must not have.
    """
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    with opened(file) as descriptor:
        for entry in _read_header(file, descriptor, digest.update):
            items = math.prod(entry.shape)
            size = entry.dtype.itemsize
            bits = torch.empty(items if keep else min(items, CHUNK_BYTES // size), dtype=_BITS[size])
            for begin in range(0, items, CHUNK_BYTES // size):
                count = min(items - begin, CHUNK_BYTES // size)
                piece = bits.numpy()[begin : begin + count] if keep else bits.numpy()[:count]
                content = piece.data.cast("B")
                _fill(file, descriptor, content)
                digest.update(content)
                if finite and not _all_finite(piece, entry.dtype):
                    raise damaged(file, f"tensor {entry.name!a} holds NaN or infinity")
                if entry.dtype == torch.bool and piece.max() > 1:
                    raise damaged(file, f"tensor {entry.name!a} holds what is neither true nor false")
            if keep:
                tensors[entry.name] = bits.view(entry.dtype).reshape(entry.shape)
    return tensors, digest.hexdigest()


def _read_header(file: Path, descriptor: int, update: Callable[[bytes], None]) -> list[Entry]:
    """Reads the header; `update` is given its bytes."""
    length = bytearray(8)
    _fill(file, descriptor, memoryview(length))
    count, size = int.from_bytes(length, "little"), os.fstat(descriptor).st_size
    if count > min(MAX_HEADER_BYTES, size - 8):
        raise damaged(file, f"not a safetensors file: its header claims {count} bytes")
    text = bytearray(count)
    _fill(file, descriptor, memoryview(text))
    update(bytes(length) + bytes(text))
    header = parse_json(file, bytes(text))
    header.pop("__metadata__", None)
    entries = sorted((_entry(file, name, value) for name, value in header.items()), key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise damaged(file, f"tensor {entry.name!a} does not begin where the one before it ends")
        end = entry.end
    if size != 8 + count + end:
        raise damaged(file, f"{size} bytes long, its header says {8 + count + end}")
    return entries


def _entry(file: Path, name: str, value: object) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest} if not rest:
            if dtype not in _DTYPES:
                raise damaged(file, f"tensor {name!a} is of type {dtype!a}, which TrackNet does not save")
            numbers = [*shape, begin, end]
            whole = all(type(number) is int and 0 <= number < 2**48 for number in numbers)
            # torch multiplies them in 64 bits, also where one of them is 0
            if whole and len(shape) <= MAX_DIMENSIONS and math.prod(side or 1 for side in shape) < 2**48:
                if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
                    raise damaged(file, f"tensor {name!a} has another number of bytes than its shape says")
                return Entry(name, _DTYPES[dtype], tuple(shape), begin, end)
    raise damaged(file, f"its header describes tensor {name!a} as no safetensors file does")


def _fill(file: Path, descriptor: int, target: memoryview) -> None:
    """Reads as many bytes as the target has."""
    while target:
        count = os.readv(descriptor, [target])
        if not count:
            raise damaged(file, "it ends too early")
        target = target[count:]


def _pieces(flat: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    step = CHUNK_BYTES // flat.itemsize
    return (flat[begin : begin + step] for begin in range(0, flat.size, step))


def _all_finite(bits: np.ndarray[Any, Any], dtype: torch.dtype) -> bool:
    """Whether numbers of this type, given as integers of the same bits, hold neither NaN nor infinity."""
    if dtype not in _EXPONENT:
        return True
    mask = bits.dtype.type(_EXPONENT[dtype])
    return not bool(((bits & mask) == mask).any())

"""The two forms in which the cache holds a clip's frames: as they are, memory-mapped, or as JPEGs, which take about a seventh.

The JPEG belongs to the definition of the pixels: in that form a frame that is not in the cache goes through it as well.
"""

import mmap
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from tracknet.data.cache_files import write_array
from tracknet.data.decode import Frame

JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
JPEG_SHARE = 7  # raw bytes through JPEG bytes, on tennis; only to know beforehand what will fit


class DamagedError(Exception):
    """A file of the cache is not what was written."""


class StoredFrames(Protocol):
    """The frames of one clip."""

    def window(self, first: int, count: int) -> NDArray[np.uint8]:
        """(count, H, W, 3) uint8, RGB. Raises DamagedError."""
        ...


class StoredArray:
    """A memory map of an .npy file.

    Args:
        path: the file.
        shape: what its shape begins with.
        dtype: of its values.

    Raises:
        DamagedError: it is not there, not whole, or of another shape or type.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                stored_shape, fortran, stored_dtype = read_header(file)
                self._size = file.tell() + stored_dtype.itemsize * int(np.prod(stored_shape, dtype=np.int64))
                if stored_shape[: len(shape)] != shape or stored_dtype != dtype or fortran:
                    raise DamagedError(f"{path}: holds {stored_dtype} {stored_shape}")
                if os.fstat(file.fileno()).st_size != self._size:
                    raise DamagedError(f"{path}: is not whole")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._array = np.frombuffer(self._map, dtype, offset=file.tell()).reshape(stored_shape)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path}: {error}") from error

    @property
    def array(self) -> NDArray[Any]:
        """The array, read-only. Raises DamagedError where the file has been cut since; touching what lacks would kill the process."""
        try:
            if self._map.size() == self._size:
                return self._array
        except OSError:  # the file's server knows it no more
            pass
        raise DamagedError("was cut while it was open")

    def window(self, first: int, count: int) -> NDArray[np.uint8]:
        """See `StoredFrames`; copies nothing."""
        return self.array[first : first + count]


class StoredJpegs:
    """JPEGs in one file, behind an .npy of their offsets. Read without a position of the file, which forked processes share.

    Raises:
        DamagedError: the file is not there, not whole, or of another number of frames.
    """

    def __init__(self, path: Path, count: int, size_wh: tuple[int, int]) -> None:
        self._shape = size_wh[1], size_wh[0], 3
        try:
            self._file = path.open("rb")
            self._offsets: list[int] = np.lib.format.read_array(self._file, allow_pickle=False).tolist()
            starts, size = self._file.tell(), os.fstat(self._file.fileno()).st_size
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path}: {error}") from error
        if len(self._offsets) != count + 1 or self._offsets[0] != starts or self._offsets[-1] != size:
            raise DamagedError(f"{path}: is not whole")

    def window(self, first: int, count: int) -> NDArray[np.uint8]:
        """See `StoredFrames`."""
        offsets = self._offsets[first : first + count + 1]
        try:
            text = memoryview(os.pread(self._file.fileno(), offsets[-1] - offsets[0], offsets[0]))
        except OSError as error:
            raise DamagedError(str(error)) from error
        frames = np.empty((count, *self._shape), np.uint8)
        for number, (start, end) in enumerate(pairwise(offsets)):
            jpeg = text[start - offsets[0] : end - offsets[0]]
            if len(jpeg) != end - start:
                raise DamagedError("was cut while it was open")
            decode_jpeg(jpeg, frames[number])
        return frames


def open_frames(path: Path, form: str, count: int, size_wh: tuple[int, int]) -> StoredFrames:
    """The file of `write_frames`, opened. Raises DamagedError where it is not what that wrote."""
    if form == "jpeg":
        return StoredJpegs(path, count, size_wh)
    return StoredArray(path, (count, size_wh[1], size_wh[0], 3), np.dtype(np.uint8))


def write_frames(file: BinaryIO, form: str, count: int, size_wh: tuple[int, int], frames: Iterable[Frame]) -> None:
    """Writes frames one by one: a full disk is an error here, where writing through a memory map would kill the process.

    Args:
        file: at its start.
        form: `raw` or `jpeg`.
        count: the number of `frames`.
        size_wh: of a frame.
        frames: (H, W, 3) uint8, RGB.

    Raises:
        OSError: the disk is full, or fails.
    """
    if form == "jpeg":
        _write_jpegs(file, count, frames)
        return
    shape = (count, size_wh[1], size_wh[0], 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for frame in frames:
        file.write(np.ascontiguousarray(frame).data)


def expected_bytes(form: str, count: int, size_wh: tuple[int, int]) -> int:
    """About the size of the file that `write_frames` writes."""
    raw = count * size_wh[0] * size_wh[1] * 3
    return 128 + (raw // JPEG_SHARE if form == "jpeg" else raw)


def as_read(form: str, frame: Frame) -> Frame:
    """A decoded frame as it comes out of a cache of this form."""
    if form == "raw":
        return frame
    read = np.empty(frame.shape, np.uint8)
    decode_jpeg(encode_jpeg(frame), read)
    return read


def encode_jpeg(frame: Frame) -> bytes:
    """Quality 95, colours at full resolution (4:4:4)."""
    encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), JPEG_OPTIONS)
    assert encoded  # of an array of this kind it always is
    return jpeg.tobytes()


def decode_jpeg(jpeg: bytes | memoryview, into: Frame) -> None:
    """Decodes into (H, W, 3), RGB. Raises DamagedError where it is no picture of that size."""
    try:
        decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise DamagedError("holds no picture") from error
    if decoded is None or decoded.shape != into.shape:
        raise DamagedError("holds another picture")
    into[:] = decoded


def _write_jpegs(file: BinaryIO, count: int, frames: Iterable[Frame]) -> None:
    offsets = np.zeros(count + 1, np.int64)
    write_array(file, offsets)  # its place; the numbers are known at the end
    offsets[0] = file.tell()
    for number, frame in enumerate(frames, 1):
        offsets[number] = offsets[number - 1] + file.write(encode_jpeg(frame))
    end = file.tell()
    file.seek(0)
    write_array(file, offsets)
    file.seek(end)

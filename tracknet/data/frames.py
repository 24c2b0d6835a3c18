"""Decoded frames on disk: a clip is decoded once, then read through a memory map."""

import hashlib
import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tracknet.data.background import median_picture
from tracknet.data.decode import decode_clip
from tracknet.data.index import Clip
from tracknet.errors import DataError, UserError

CODE_VERSION = 1  # to be raised whenever the same source would be decoded to other pixels
MAPS_OPEN = 128  # memory maps that a process keeps; each holds a file handle

log = logging.getLogger("tracknet")


def cache_root(cache_dir: str | None) -> Path:
    """The folder of everything that can be made again: `data.cache_dir`, else $TRACKNET_CACHE_DIR, else ~/.cache/tracknet."""
    return Path(cache_dir or os.environ.get("TRACKNET_CACHE_DIR") or "~/.cache/tracknet").expanduser()


class FrameStore:
    """Frames of clips at the network's input size, uint8 RGB.

    A clip's two files in the cache are named by its source, the sizes and times of the source's files, the input size and `CODE_VERSION`:
    whatever changes one of them is decoded afresh. Pickles small; the memory maps are opened by the process that reads.

    Args:
        cache_dir: where the files go; made when needed.
        input_wh: size to which pictures are resized; None keeps the size of each clip.
    """

    def __init__(self, cache_dir: Path, input_wh: tuple[int, int] | None) -> None:
        self.cache_dir = cache_dir
        self.input_wh = input_wh
        self._keys: dict[Path, str] = {}  # by source; settled once, so that a file touched during the run does not matter
        self._maps: OrderedDict[Path, NDArray[Any]] = OrderedDict()
        self._unkept: dict[Path, NDArray[Any]] = {}
        self._is_writable = True  # as far as is known; so that this is said once, not for each clip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    def size_wh(self, clip: Clip) -> tuple[int, int]:
        """Width and height of the stored frames."""
        return self.input_wh or clip.size_wh

    def is_prepared(self, clip: Clip) -> bool:
        """Whether the cache holds the whole clip."""
        width, height = self.size_wh(clip)
        frames, background = self._paths(clip)
        of_bytes = np.dtype(np.uint8)
        return _holds(frames, (clip.length, height, width, 3), of_bytes) and _holds(background, (height, width, 3), of_bytes)

    def prepare(self, clip: Clip) -> None:
        """Decodes a clip into the cache unless it is there.

        Raises:
            DataError: a picture or the video is broken, see `decode_clip`.
            UserError: the cache cannot be written; names `data.cache_dir`.
        """
        if self.is_prepared(clip):
            return
        width, height = self.size_wh(clip)
        frames, background = self._paths(clip)
        with self._writing(frames) as file:
            _write_array(file, (clip.length, height, width, 3), decode_clip(clip, (width, height)))
        stored: NDArray[np.uint8] = np.load(frames, mmap_mode="r")
        with self._writing(background) as file:
            _write_array(file, (height, width, 3), [median_picture(stored)])

    def frames(self, clip: Clip) -> NDArray[np.uint8]:
        """(n, H, W, 3), a memory map; the clip has been prepared."""
        return self._map(self._paths(clip)[0])

    def background(self, clip: Clip) -> NDArray[np.uint8]:
        """(H, W, 3), the clip's median picture; the clip has been prepared."""
        return self._map(self._paths(clip)[1])

    def derived(self, clip: Clip, name: str, dtype: np.dtype[Any], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What is made from a clip's frames once and kept beside them under the same key; made anew where its file is broken.

        Args:
            clip: a prepared one.
            name: of the content, with a version where its making may change.
            dtype: of the array.
            make: gives the array, (n, ...) for a clip of n frames.

        Returns:
            The array, a memory map. Where the cache cannot be written, which is said once in the log and not tried again, the array
            itself, which is kept in memory: it should be small.
        """
        path = self._paths(clip)[0].with_suffix(f".{name}.npy")
        if path in self._unkept:
            return self._unkept[path]
        if path not in self._maps and not _holds(path, (clip.length,), dtype):
            made = make()
            if not self._is_writable:
                self._unkept[path] = made
                return made
            try:
                with self._writing(path) as file:
                    np.save(file, made, allow_pickle=False)
            except UserError as error:
                log.warning("%s; going on without keeping %s", error, path.name)
                self._is_writable = False
                self._unkept[path] = made
                return made
        return self._map(path)

    def _paths(self, clip: Clip) -> tuple[Path, Path]:
        """The files of the frames and of the background."""
        if clip.source not in self._keys:
            self._keys[clip.source] = _key(clip, self.size_wh(clip))
        folder, stem = self.cache_dir / "frames", f"{clip.game}-{clip.name}-{self._keys[clip.source]}"
        return folder / f"{stem}.npy", folder / f"{stem}.median.npy"

    def _map(self, path: Path) -> NDArray[Any]:
        if path not in self._maps:
            try:
                self._remember(path, np.load(path, mmap_mode="r"))
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path}: this file of the cache is gone or broken; start again and it is made anew") from error
        self._maps.move_to_end(path)
        return self._maps[path]

    def _remember(self, path: Path, array: NDArray[Any]) -> None:
        self._maps[path] = array
        if len(self._maps) > MAPS_OPEN:
            self._maps.popitem(last=False)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[BinaryIO]:
        """A file beside its final name, renamed when it is whole and gone when it is not."""
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            mend = "make room or choose another place with data.cache_dir=FOLDER"
            raise UserError(f"data.cache_dir: cannot write {path.parent} ({error.strerror}); {mend}") from error


def _key(clip: Clip, size_wh: tuple[int, int]) -> str:
    """Changes with the source's place, with size and time of any of its files, with the input size and with the code."""
    files = [clip.source] if clip.frame_names is None else [clip.source / name for name in clip.frame_names]
    try:
        states = [(path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    except OSError as error:
        raise DataError(f"{error.filename}: has gone since the clips were listed ({error.strerror})") from error
    identity = json.dumps([CODE_VERSION, str(clip.source.absolute()), size_wh, states])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _holds(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether the file is a whole array whose shape begins like this."""
    try:
        stored = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return bool(stored.shape[: len(shape)] == shape and stored.dtype == dtype)


def _write_array(file: BinaryIO, shape: tuple[int, ...], pieces: Iterable[NDArray[np.uint8]]) -> None:
    """An .npy file, piece by piece: a full disk is an error here, where writing through a memory map would kill the process."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for piece in pieces:
        file.write(np.ascontiguousarray(piece).data)

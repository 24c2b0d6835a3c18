"""The frames of clips at the network's input size: decoded once into a cache on disk, and what does not fit there whenever it is read."""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracknet.data.background import frames_used, median_picture
from tracknet.data.cache_files import CacheFolder, DiskRefusesError, NoRoomError, key_of
from tracknet.data.cache_key import clip_key
from tracknet.data.decode import Frame, decode_clip
from tracknet.data.index import Clip
from tracknet.data.open_files import OpenFiles
from tracknet.data.source_frames import SourceFrames
from tracknet.data.stored_frames import DamagedError, StoredArray, StoredFrames, as_read, expected_bytes, open_frames, write_frames
from tracknet.errors import UserError
from tracknet.schema.data import DataConfig

PICTURES_KEPT = 128  # backgrounds in memory, where the disk takes none
TOUCH_S = 3600.0  # after which a process notes again that the run's files are in use
DERIVED_BYTES = 2500  # about what `derived` keeps per frame
READ_AT_ONCE = 16  # frames, in a pass over a clip
NAME_BYTES = 80  # of a game and of a clip, in the names of files
BYTE = np.dtype(np.uint8)

log = logging.getLogger("tracknet")


def cache_root(cache_dir: str | None) -> Path:
    """The folder of everything that can be made again: `data.cache_dir`, else $TRACKNET_CACHE_DIR, else ~/.cache/tracknet.

    Raises:
        UserError: it lies in a home folder, and there is none.
    """
    folder = cache_dir or os.environ.get("TRACKNET_CACHE_DIR") or "~/.cache/tracknet"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError(f"data.cache_dir: {folder} lies in a home folder that is not known here; set data.cache_dir=FOLDER") from error


def frame_store(data: DataConfig, input_wh: tuple[int, int] | None) -> "FrameStore":
    """The store that a configuration asks for; raw, for `data.cache_form` is for training alone, see `FrameStore.in_form`.

    Args:
        data: its section `data`.
        input_wh: see `FrameStore`.
    """
    return FrameStore(cache_root(data.cache_dir), input_wh, limit_gb=data.cache_limit_gb)


class FrameStore:
    """Frames of clips at the network's input size, uint8 RGB, the same bytes whether they are in the cache or not.

    A clip's two files in the cache, frames and background, are named by its source, the sizes and times of the source's files, the input
    size, the form and the versions of the decoders: whatever changes one of them is decoded afresh. Where the limit or the disk leaves no
    room, or a file is gone or damaged, frames are decoded when they are read. Pickles small; for one thread of each process.

    Args:
        cache_dir: where the files go, into the folder `frames`; made when needed.
        input_wh: size to which pictures are resized; None keeps the size of each clip.
        form: `raw`, or `jpeg`: about a seventh as large, its pixels being those of a JPEG of quality 95.
        limit_gb: of all files in `frames`, in 1e9 bytes; None for no limit, 0 keeps nothing.
    """

    def __init__(self, cache_dir: Path, input_wh: tuple[int, int] | None, form: str = "raw", limit_gb: float | None = None) -> None:
        self.cache_dir = cache_dir
        self.input_wh = input_wh
        self.form = form
        self.folder = CacheFolder(cache_dir / "frames", None if limit_gb is None else int(limit_gb * 1e9))
        self._start()

    def _start(self) -> None:
        self._places: dict[Path, tuple[Path, Path]] = {}  # by source; settled once: a file touched during the run does not matter
        self._left_out: set[Path] = set()  # sources of clips that the cache does not hold
        self._has_lost = False
        self._files, self._sources = OpenFiles(), SourceFrames()
        self._touch_at = time.monotonic() + TOUCH_S
        self._empty_memory()

    def _empty_memory(self) -> None:
        self._backgrounds: OrderedDict[Path, Frame] = OrderedDict()
        self._derived_in_memory: dict[Path, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_backgrounds", "_derived_in_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._empty_memory()

    def in_form(self, form: str) -> "FrameStore":
        """A store of frames in this form, in the same folder under the same limit; itself where it has that form."""
        if form == self.form:
            return self
        other = copy(self)
        other.form = form
        other._start()
        return other

    def size_wh(self, clip: Clip) -> tuple[int, int]:
        """Width and height of the frames."""
        return self.input_wh or clip.size_wh

    def claim(self, clip: Clip) -> None:
        """Notes that the run needs a clip: its files are in use, and never make room for others.

        Raises:
            DataError: its source has gone since it was listed.
        """
        frames, background = self._paths(clip)
        key = key_of(frames.name)
        if key in self.folder.own_keys:
            return
        self.folder.own_keys.add(key)
        self.folder.reserved += DERIVED_BYTES * clip.length
        self.folder.reserved += 0 if os.path.exists(background) else expected_bytes("raw", 1, self.size_wh(clip))
        self.folder.touch(frames)
        self.folder.touch(background)

    def is_prepared(self, clip: Clip) -> bool:
        """Whether there is nothing to do for a clip: the cache holds it, or it has been through a decoder and does not fit."""
        return self.holds(clip) or (self._has_background(clip) and not self.folder.has_room(self._expected_bytes(clip)))

    def holds(self, clip: Clip) -> bool:
        """Whether the cache holds the whole clip."""
        try:
            open_frames(self._paths(clip)[0], self.form, clip.length, self.size_wh(clip))
        except DamagedError:
            return False
        return self._has_background(clip)

    def prepare(self, clip: Clip, threads: int | None = None) -> None:
        """Decodes a clip into the cache unless it is there; where it does not fit, it is decoded all the same, to see that it is whole.

        Args:
            clip: the clip.
            threads: see `decode_clip`.

        Raises:
            DataError: a picture or the video is broken, see `decode_clip`.
            UserError: the cache's folder is none.
        """
        if self.is_prepared(clip) or self._has_stored(clip, threads):
            return
        samples: list[Frame] = []
        for _ in self._pass(clip, samples, threads):
            pass
        self._keep_background(clip, samples)

    def settle(self, clips: Sequence[Clip]) -> list[Clip]:
        """Finds out which prepared clips this process will have to decode whenever it reads them, whoever has prepared them."""
        missing = [clip for clip in clips if not self.holds(clip)]
        self._left_out.difference_update(clip.source for clip in clips)  # of other clips it is settled already
        self._left_out.update(clip.source for clip in missing)
        return missing

    def window(self, clip: Clip, first: int, count: int) -> NDArray[np.uint8]:
        """Frames `first` to `first + count - 1` of a clip, all inside it.

        Returns:
            (count, H, W, 3) uint8. A view of a memory map, not to be written, where the cache holds them raw; else an array.

        Raises:
            DataError: the cache does not hold them, and the source is broken.
        """
        stored = self._stored(clip)
        if stored is not None:
            try:
                return stored.window(first, count)
            except DamagedError as error:
                self._lose(clip, error)
        return np.stack([as_read(self.form, frame) for frame in self._sources.read(clip, self.size_wh(clip), first, count)])

    def each_frame(self, clip: Clip) -> Iterator[Frame]:
        """All frames of a clip in order, each (H, W, 3) uint8, in one pass.

        Raises:
            DataError: the cache does not hold them, and the source is broken.
        """
        if self._stored(clip) is None:
            for frame in decode_clip(clip, self.size_wh(clip)):
                yield as_read(self.form, frame)
            return
        for first in range(0, clip.length, READ_AT_ONCE):
            yield from self.window(clip, first, min(READ_AT_ONCE, clip.length - first))

    def background(self, clip: Clip) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, the clip's median picture, not to be written.

        Raises:
            DataError: the cache does not hold it, and the source is broken.
        """
        path = self._paths(clip)[1]
        if path in self._backgrounds:
            self._backgrounds.move_to_end(path)
            return self._backgrounds[path]
        stored = self._files.array(path, self._picture_shape(clip), BYTE)
        if stored is not None:
            return stored
        samples = [self.window(clip, number, 1)[0] for number in frames_used(clip.length).tolist()]
        return self._remember(path, median_picture(np.stack(samples)))

    def derived(self, clip: Clip, name: str, dtype: np.dtype[Any], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What is made from a clip's frames once and kept beside them under the same key; made anew where its file is broken.

        Args:
            clip: a prepared one.
            name: of the content, with a version where its making may change.
            dtype: of the array.
            make: gives the array, (n, ...) for a clip of n frames.

        Returns:
            The array, a memory map. Where the cache takes no more of it, the array itself, which is kept in memory: it should be small.
        """
        path = self._paths(clip)[0].with_suffix(f".{name}.npy")
        if path in self._derived_in_memory:
            return self._derived_in_memory[path]
        stored = self._files.array(path, (clip.length,), dtype)
        if stored is None:
            made = make()
            stored = self._files.array(path, (clip.length,), dtype) if self.folder.save(path, made) else None
            if stored is None:
                self._derived_in_memory[path] = stored = made
        return stored

    def _paths(self, clip: Clip) -> tuple[Path, Path]:
        """The files of the frames and of the background."""
        if clip.source not in self._places:
            stem = f"{_shortened(clip.game)}-{_shortened(clip.name)}-{clip_key(clip, self.size_wh(clip), self.form)}"
            folder = self.folder.path
            self._places[clip.source] = folder / f"{stem}{'.jpegs' if self.form == 'jpeg' else '.npy'}", folder / f"{stem}.median.npy"
        return self._places[clip.source]

    def _picture_shape(self, clip: Clip) -> tuple[int, int, int]:
        width, height = self.size_wh(clip)
        return height, width, 3

    def _expected_bytes(self, clip: Clip) -> int:
        return expected_bytes(self.form, clip.length, self.size_wh(clip))

    def _has_background(self, clip: Clip) -> bool:
        path = self._paths(clip)[1]
        try:
            StoredArray(path, self._picture_shape(clip), BYTE)
        except DamagedError:
            return path in self._backgrounds
        return True

    def _has_stored(self, clip: Clip, threads: int | None) -> bool:
        """Decodes a clip into the cache; whether there was room."""
        if not self.folder.has_room(self._expected_bytes(clip)):
            return False
        samples: list[Frame] = []
        try:
            with self.folder.writing(self._paths(clip)[0], self._expected_bytes(clip)) as file:
                write_frames(file, self.form, clip.length, self.size_wh(clip), self._pass(clip, samples, threads))
                self._keep_background(clip, samples)
        except NoRoomError:  # a JPEG's size is known only when it is made, and another process may have been faster
            return False
        except DiskRefusesError as error:
            self.folder.refuse(error)
            return False
        return True

    def _pass(self, clip: Clip, samples: list[Frame], threads: int | None) -> Iterator[Frame]:
        """All frames as they are decoded; those that make the background go into `samples` as they will be read."""
        chosen = set(frames_used(clip.length).tolist())
        for number, frame in enumerate(decode_clip(clip, self.size_wh(clip), threads)):
            if number in chosen:
                samples.append(as_read(self.form, frame))
            yield frame

    def _keep_background(self, clip: Clip, samples: Sequence[Frame]) -> None:
        path, picture = self._paths(clip)[1], median_picture(np.stack(samples))
        if not self.folder.save(path, picture):
            self._remember(path, picture)

    def _remember(self, path: Path, picture: Frame) -> Frame:
        self._backgrounds[path] = picture
        if len(self._backgrounds) > PICTURES_KEPT:
            self._backgrounds.popitem(last=False)
        return picture

    def _stored(self, clip: Clip) -> StoredFrames | None:
        """The clip's file in the cache; None where it is not to be had."""
        if time.monotonic() > self._touch_at:
            self._touch_all()
        if clip.source in self._left_out:
            return None
        path = self._paths(clip)[0]
        try:
            return self._files.frames(path, self.form, clip.length, self.size_wh(clip))
        except DamagedError as error:
            self._lose(clip, error)
            return None

    def _lose(self, clip: Clip, error: DamagedError) -> None:
        """The cache no longer holds a clip. It is not decoded into the cache here, where each of many workers would do it."""
        if not self._has_lost:
            log.warning("the cache has lost %s (%s); what it lacks is decoded whenever it is read, until the next start", clip.id, error)
        self._has_lost = True
        self._left_out.add(clip.source)
        self._files.forget(self._paths(clip)[0])

    def _touch_all(self) -> None:
        for paths in self._places.values():
            for path in paths:
                self.folder.touch(path)
        self._touch_at = time.monotonic() + TOUCH_S


def _shortened(name: str) -> str:
    """What of a name is put before the key, for people to read: a file's name may not be longer than 255 bytes."""
    return name if len(os.fsencode(name)) <= NAME_BYTES else os.fsencode(name)[:NAME_BYTES].decode(errors="ignore")

"""The index of a data set as it was last read, so that only clips that have changed since are read again."""

import hashlib
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tracknet.data.index import Clip, FrameNames, LabelledClip
from tracknet.errors import UserError
from tracknet.utils.run_directory import write_atomically

CODE_VERSION = 1  # to be raised whenever the same files would be read as another index
TOO_YOUNG_S = 10.0  # two changes within a tick of the disk's clock, 2 s on some, show one time; and servers' clocks differ
CHECKSUM_BYTES = 4
STAMP = struct.Struct("<3q")

Stamps = bytes  # int64: size, time of change and time of change of its entry, of one file after the other

log = logging.getLogger("tracknet")


class ClipPlace(NamedTuple):
    """Where a clip is and how it is read."""

    game: str
    name: str
    path: Path  # the clip's folder, or its video
    key: str  # its path within the data set
    table: str | None  # its label file; None where there is not exactly one, of which `read` tells
    read: Callable[[], LabelledClip]


class _Entry(NamedTuple):
    """A clip as it was read, and how its files were then."""

    first_file: str  # its first picture, or its video, in the clip's folder; empty where there is no such folder
    stamps: Stamps  # of what `_watched` names
    size_wh: tuple[int, int]
    frame_names: FrameNames | None
    xy_px: NDArray[np.float32]
    visibility: NDArray[np.int8]


class SavedIndex:
    """The clips of one selection of games, in one file of the cache.

    A clip is taken from there while its folder, its label file and its first picture, or its video, have the size and the times that they
    had when it was read. What was too young then is not trusted, as a later change might not show. Of other pictures only the names matter
    here. A file that is missing or damaged counts for nothing.

    Args:
        cache_dir: the folder of what can be made again; None keeps nothing.
        root: of the data set.
        games: in their order.
    """

    def __init__(self, cache_dir: Path | None, root: Path, games: Sequence[str]) -> None:
        self._trusted_until = time.time_ns() - int(TOO_YOUNG_S * 1e9)
        identity = json.dumps([CODE_VERSION, os.path.realpath(root), list(games)])
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._file = None if cache_dir is None else cache_dir / "index" / name
        self._loaded = {} if self._file is None else _load(self._file)
        self._kept: dict[str, _Entry] = {}

    def find(self, place: ClipPlace) -> LabelledClip:
        """The clip, read anew where it has changed. Raises what reading it raises."""
        if self._file is None or place.table is None:
            return place.read()
        entry = self._loaded.get(place.key)
        if entry is None or entry.stamps != _stamps(_watched(place, entry.first_file)):
            return self._read(place)
        self._kept[place.key] = entry
        return _labelled_clip(place, entry)

    def save(self) -> None:
        """Writes the file anew if any clip of it is new or gone. Where it cannot be written, that is said once in the log."""
        if self._file is None or list(map(id, self._kept.values())) == list(map(id, self._loaded.values())):
            return
        try:
            write_atomically(self._file, _packed(self._kept))
        except UserError:
            _tell_once(self._file.parent)

    def _read(self, place: ClipPlace) -> LabelledClip:
        """Reads a clip, and keeps it if its files are old enough."""
        before = _stamps(_watched(place, ""))
        part = place.read()
        clip, first_file = part.clip, ""
        if clip.frame_names is not None:
            first_file = clip.frame_names[0]
        elif clip.source != place.path:
            first_file = clip.source.name
        stamps = _stamps(_watched(place, first_file))
        if before and stamps.startswith(before) and _newest(stamps) < self._trusted_until:
            self._kept[place.key] = _Entry(first_file, stamps, clip.size_wh, clip.frame_names, part.xy_px, part.visibility)
        return part


def _watched(place: ClipPlace, first_file: str) -> list[str]:
    """The files on which an entry depends."""
    paths = [str(place.path), str(place.table)]
    return [*paths, f"{paths[0]}/{first_file}"] if first_file else paths


def _stamps(paths: list[str]) -> Stamps:
    """Of all of them; empty where one is gone, or has a time that no clock shows for another two centuries."""
    try:
        return b"".join([STAMP.pack(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in map(os.stat, paths)])
    except (OSError, struct.error):
        return b""


def _newest(stamps: Stamps) -> int:
    """The newest of the times."""
    return int(np.frombuffer(stamps, "<i8").reshape(-1, 3)[:, 1:].max())


def _labelled_clip(place: ClipPlace, entry: _Entry) -> LabelledClip:
    source = place.path / entry.first_file if entry.frame_names is None and entry.first_file else place.path
    clip = Clip(place.game, place.name, source, entry.frame_names, entry.size_wh, 0, len(entry.visibility))
    return LabelledClip(clip, entry.xy_px, entry.visibility)


def _packed(entries: dict[str, _Entry]) -> bytes:
    """The content of the file: a checksum of the rest, then all clips' arrays end to end in the safetensors format."""
    names = [entry.frame_names.encoded if entry.frame_names is not None else np.zeros(0, "S1") for entry in entries.values()]
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(json.dumps([[key, entry.first_file] for key, entry in entries.items()]).encode(), np.uint8),
        "stamps": np.frombuffer(b"".join(entry.stamps for entry in entries.values()), np.uint8),
        "shapes": np.array(
            [
                [*entry.size_wh, len(entry.visibility), encoded.itemsize if len(encoded) else 0, len(entry.stamps)]
                for entry, encoded in zip(entries.values(), names, strict=True)
            ],
            np.int64,
        ),
        "names": np.frombuffer(b"".join(encoded.tobytes() for encoded in names), np.uint8),
        "xy_px": np.concatenate([np.zeros((0, 2), np.float32), *[entry.xy_px for entry in entries.values()]]),
        "visibility": np.concatenate([np.zeros(0, np.int8), *[entry.visibility for entry in entries.values()]]),
    }
    content = safetensors.numpy.save(arrays)
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big") + content


def _load(file: Path) -> dict[str, _Entry]:
    """What `_packed` has packed; nothing where the file is not whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return {}
    checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if not content or zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big") != checksum:
        return {}
    arrays = safetensors.numpy.load(content)
    names, xy_px, visibility, stamps = arrays["names"], arrays["xy_px"], arrays["visibility"], arrays["stamps"].tobytes()
    entries: dict[str, _Entry] = {}
    row = first_name = first_stamp = 0
    shapes = arrays["shapes"].tolist()
    for (key, first_file), (width, height, length, characters, stamp_count) in zip(
        json.loads(arrays["keys"].tobytes()), shapes, strict=True
    ):
        end, name_end, stamp_end = row + length, first_name + length * characters, first_stamp + stamp_count
        frame_names = FrameNames(np.ndarray(length, f"S{characters}", names, first_name)) if characters else None
        entry = _Entry(first_file, stamps[first_stamp:stamp_end], (width, height), frame_names, xy_px[row:end], visibility[row:end])
        entries[key] = entry
        row, first_name, first_stamp = end, name_end, stamp_end
    return entries


@cache
def _tell_once(folder: Path) -> None:
    log.warning("%s cannot be written; the index of the data set is not kept, and is made anew each time", folder)

"""What there is to learn from: clips, and one label per frame."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

NO_LABEL = -1  # visibility of a frame that nobody has labelled


class FrameNames(Sequence[str]):
    """File names of a clip's pictures, in order.

    They lie in one array: a million strings would take 60 MB, and as a string's count of users is part of it, each worker process that
    reads names would get a copy of its own. Equal to another, or to a tuple, of the same names; never changes.

    Args:
        names: the names, or an array as `encoded` is one.
    """

    __slots__ = ("encoded",)

    def __init__(self, names: Iterable[str] | NDArray[np.bytes_]) -> None:
        self.encoded: NDArray[np.bytes_] = names if isinstance(names, np.ndarray) else _encoded(list(names))

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...

    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(map(_decoded, self.encoded[place].tolist()))
        return _decoded(self.encoded[place])

    def __iter__(self) -> Iterator[str]:
        return map(_decoded, self.encoded.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrameNames):
            return np.array_equal(self.encoded, other.encoded)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"FrameNames({', '.join(self[:2])}{', ...' if len(self) > 2 else ''}, {len(self)} in all)"


def _encoded(names: list[str]) -> NDArray[np.bytes_]:
    """As the file system writes them; the usual ones, all of one length, at once."""
    text = "".join(names)
    if text.isascii() and len(set(map(len, names))) == 1:
        return np.frombuffer(text.encode(), f"S{len(names[0])}")
    return np.array([name.encode("utf-8", "surrogateescape") for name in names], np.bytes_)


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class Clip:
    """Contiguous frames of one camera."""

    game: str
    name: str
    source: Path  # the folder of the pictures, or the video file
    frame_names: FrameNames | None  # the pictures' file names; None: a video
    size_wh: tuple[int, int]  # original px
    first_row: int  # where its labels start in the `ClipIndex`
    length: int  # frames

    @property
    def id(self) -> str:
        """Its name among all games, as `game1/Clip2`."""
        return f"{self.game}/{self.name}"


@dataclass(frozen=True)
class LabelledClip:
    """A clip with its labels, before it has a place in a `ClipIndex`."""

    clip: Clip
    xy_px: NDArray[np.float32]  # (length, 2)
    visibility: NDArray[np.int8]  # (length,)


@dataclass(frozen=True)
class ClipIndex:
    """All clips of one side of the split, and the labels of their frames, one row per frame, clip after clip."""

    clips: tuple[Clip, ...]
    xy_px: NDArray[np.float32]  # (N, 2), original px; 0 where visibility is below 1
    visibility: NDArray[np.int8]  # (N,): NO_LABEL, 0 no ball to see, 1 easy, 2 hard, 3 occluded

    def __len__(self) -> int:
        return len(self.visibility)

    @property
    def games(self) -> tuple[str, ...]:
        """Names of the games, in order, each once."""
        return tuple(dict.fromkeys(clip.game for clip in self.clips))

    def rows(self, clip: Clip) -> slice:
        """Where the labels of `clip` stand."""
        return slice(clip.first_row, clip.first_row + clip.length)

    @cached_property
    def clip_of_row(self) -> NDArray[np.int32]:
        """(N,) number of the clip that each row belongs to."""
        return np.repeat(np.arange(len(self.clips), dtype=np.int32), [clip.length for clip in self.clips])

    def without(self, clip_ids: Collection[str]) -> "ClipIndex":
        """The index of the other clips; rows are counted afresh."""
        dropped = set(clip_ids)
        kept = [clip for clip in self.clips if clip.id not in dropped]
        if len(kept) == len(self.clips):
            return self
        return join_clips([LabelledClip(clip, self.xy_px[self.rows(clip)], self.visibility[self.rows(clip)]) for clip in kept])


def join_clips(parts: Sequence[LabelledClip]) -> ClipIndex:
    """One index of the clips in the order given; it may be empty."""
    clips, first_row = [], 0
    for part in parts:
        clip = part.clip
        clips.append(Clip(clip.game, clip.name, clip.source, clip.frame_names, clip.size_wh, first_row, clip.length))
        first_row += part.clip.length
    xy_px = np.concatenate([np.zeros((0, 2), np.float32), *[part.xy_px for part in parts]])
    visibility = np.concatenate([np.zeros(0, np.int8), *[part.visibility for part in parts]])
    return ClipIndex(tuple(clips), xy_px, visibility)

"""What there is to learn from: clips, and one label per frame."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NO_LABEL = -1  # visibility of a frame that nobody has labelled


@dataclass(frozen=True)
class Clip:
    """Contiguous frames of one camera."""

    game: str
    name: str
    source: Path  # the folder of the pictures, or the video file
    frame_names: tuple[str, ...] | None  # the pictures' file names in order; None: a video
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
        kept = [clip for clip in self.clips if clip.id not in clip_ids]
        return join_clips([LabelledClip(clip, self.xy_px[self.rows(clip)], self.visibility[self.rows(clip)]) for clip in kept])


def join_clips(parts: Sequence[LabelledClip]) -> ClipIndex:
    """One index of the clips in the order given; it may be empty."""
    clips, first_row = [], 0
    for part in parts:
        clips.append(replace(part.clip, first_row=first_row))
        first_row += part.clip.length
    xy_px = np.concatenate([np.zeros((0, 2), np.float32), *[part.xy_px for part in parts]])
    visibility = np.concatenate([np.zeros(0, np.int8), *[part.visibility for part in parts]])
    return ClipIndex(tuple(clips), xy_px, visibility)

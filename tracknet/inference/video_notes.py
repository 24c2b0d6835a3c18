"""What was not as it should be with a video, in a few lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import av
from av.video.reformatter import ColorTrc

from tracknet.inference.orientation import Orientation
from tracknet.inference.source import SourceInfo
from tracknet.inference.video_times import VideoTimes

HIGH_DYNAMIC_RANGE: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
CHANGES_NAMED = 3  # of the resolution


@dataclass
class Losses:
    """Counts what the decoder was given and what it could not use.

    Attributes:
        packets: packets read so far; most hold one frame.
        frames: frames given out so far.
        damaged: packets that could not be decoded.
        first_damaged: frames given out before the first of those.
        last_damaged: which packet was the last of those, counted from 1.
        reason: the first error of the decoder or the reader; None where there was none.
        broken_off: why nothing more could be read before the end of the file; None where it could.
    """

    packets: int = 0
    frames: int = 0
    damaged: int = 0
    first_damaged: int = 0
    last_damaged: int = 0
    reason: str | None = None
    broken_off: str | None = None

    @property
    def unused(self) -> int:
        """Packets that gave neither a frame nor an error."""
        return self.packets - self.frames - self.damaged

    def damage(self, reason: str) -> None:
        """The packet read last could not be decoded."""
        self.reason = self.reason or reason
        self.first_damaged = self.first_damaged if self.damaged else self.frames
        self.damaged += 1
        self.last_damaged = self.packets

    def break_off(self, reason: str) -> None:
        """Nothing more can be read."""
        self.reason = self.reason or reason
        self.broken_off = reason


class VideoNotes:
    """Looks at the frames of a video as they are decoded, and tells in the end what was not as it should be.

    Attributes:
        losses: what could not be decoded.
        last_frame_s: how long the frame seen last is shown; None where it does not say.
    """

    def __init__(self) -> None:
        self.losses = Losses()
        self._count = 0
        self._flagged = 0
        self._first_flagged = 0
        self._sizes: list[tuple[int, tuple[int, int]]] = []  # number of the first frame of this size, and the size
        self._turned_exactly = True
        self._interlaced = 0
        self._range: str | None = None
        self.last_frame_s: float | None = None

    def see(self, frame: av.VideoFrame, size_wh: tuple[int, int], orientation: Orientation) -> None:
        """A frame was decoded; `size_wh` is its displayed size."""
        if frame.is_corrupt:
            self._first_flagged = self._first_flagged if self._flagged else self._count
            self._flagged += 1
        if not self._sizes or self._sizes[-1][1] != size_wh:
            self._sizes.append((self._count, size_wh))
        self._turned_exactly &= orientation.exact
        self._interlaced += frame.interlaced_frame
        self._range = self._range or HIGH_DYNAMIC_RANGE.get(frame.color_trc)
        self.last_frame_s = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else None
        self._count += 1

    def lines(self, info: SourceInfo, times: VideoTimes) -> Iterator[str]:
        """One line for each thing."""
        yield from self._damage()
        if info.frame_count_reported is not None and info.frame_count_reported != self._count:
            yield f"the header reports {info.frame_count_reported} frames, {self._count} were decoded"
        if len(self._sizes) > 1:
            changes = [f"from {_by(old)} to {_by(new)} at frame {number}" for (_, old), (number, new) in pairwise(self._sizes)]
            more = f" and {len(changes) - CHANGES_NAMED} more times" if len(changes) > CHANGES_NAMED else ""
            yield f"the resolution changes {', '.join(changes[:CHANGES_NAMED])}{more}; positions are in px of their own frame"
        if times.missing:
            yield f"{times.missing} of {self._count} frames have no time stamp; their times follow the frame rate"
        if times.backwards:
            yield f"{times.backwards} of {self._count} time stamps do not rise; these frames were put behind the ones before them"
        if not self._turned_exactly:
            yield "the file asks to be turned by an angle that is no multiple of 90 degrees; the nearest was taken"
        if self._interlaced:
            yield f"{self._interlaced} of {self._count} frames are interlaced; both fields stay in one picture, a fast ball shows twice"
        if self._range:
            yield f"high dynamic range ({self._range}): colours were taken as stored, not tone mapped, and look paler than on a screen"

    def _damage(self) -> Iterator[str]:
        losses = self.losses
        if losses.broken_off:
            yield f"breaks off behind frame {self._count - 1} ({losses.broken_off}); the frames up to there are kept"
        if losses.damaged == 1 and losses.last_damaged == losses.packets:
            yield f"breaks off behind frame {self._count - 1}, what follows could not be decoded ({losses.reason})"
        elif losses.damaged:
            packets = "1 packet" if losses.damaged == 1 else f"{losses.damaged} packets"
            yield f"{packets} could not be decoded ({losses.reason}), the first near frame {losses.first_damaged}; frames may lack there"
        if losses.unused and not self._interlaced:  # a packet may hold one field only, half a frame
            yield f"{losses.unused} of {losses.packets} packets gave no frame, as happens where a video was cut"
        if self._flagged:
            yield f"{self._flagged} frames are damaged, the first is frame {self._first_flagged}; they were kept"


def _by(size_wh: tuple[int, int]) -> str:
    return f"{size_wh[0]}x{size_wh[1]}"

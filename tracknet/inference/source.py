"""What footage gives to whoever runs the network over it: its description and its frames with their times."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tracknet.data.decode import Frame


@dataclass(frozen=True)
class SourceInfo:
    """What is known before the frames are read.

    Attributes:
        path: the file or folder.
        name: the file's name without its ending, or the folder's.
        size_wh: size of the first frame as it is displayed, px; later frames may have another.
        fps: frames per second on average; None where nothing says it, as for pictures.
        frame_count_reported: frames as the header has it, which may be wrong; None where it is silent.
    """

    path: Path
    name: str
    size_wh: tuple[int, int]
    fps: float | None
    frame_count_reported: int | None


@dataclass(frozen=True)
class TimedFrame:
    """One frame.

    Attributes:
        number: from 0, without gaps, in the order in which the frames are shown.
        time_s: seconds since the first frame, rising from frame to frame; NaN where nothing says it.
        picture: (H, W, 3) uint8 RGB, upright, at the size that was asked for.
        original_wh: the frame's own size as it is displayed, px.
    """

    number: int
    time_s: float
    picture: Frame
    original_wh: tuple[int, int]


class FrameSource(Protocol):
    """Footage that can be read from its start any number of times, one reading at a time."""

    info: SourceInfo
    notes: list[str]

    def frames(self, size_wh: tuple[int, int] | None, first: int = 0) -> Iterator[TimedFrame]:
        """All frames in order; nothing of those given out is kept.

        Args:
            size_wh: size of the pictures, px; None gives each frame in its own size.
            first: number of the first frame to give out; those before it are decoded only.

        `notes` is emptied at the start and holds, once the frames are through, one line for each thing that was not as it should be.
        """
        ...

"""The table of a clip's ball, one row per frame, and its CSV."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracknet.errors import DataError, shown
from tracknet.evaluation.detection import SCORE_DECIMALS, XY_DECIMALS
from tracknet.inference.whole_file import written_whole

COLUMNS = ("frame", "time_s", "visible", "x", "y", "score", "source")
DETECTED, INTERPOLATED, NO_BALL = "detected", "interpolated", ""
SOURCES = (DETECTED, INTERPOLATED, NO_BALL)
# of the CSV; the detections are rounded to these where they are made
DECIMALS = {"time_s": 6, "x": XY_DECIMALS, "y": XY_DECIMALS, "score": SCORE_DECIMALS}


class TrackRow(NamedTuple):
    """One frame of a `BallTrack`; its attributes say what each value is."""

    frame: int
    time_s: float
    visible: bool
    x: float
    y: float
    score: float
    source: str


@dataclass(frozen=True)
class BallTrack:
    """Where the ball is in each of N decoded frames, in their order.

    Attributes:
        frame: (N,) int64, number of the frame from 0.
        time_s: (N,) float64, when it is shown, seconds from the first frame; NaN where nobody knows.
        visible: (N,) bool, whether the ball has a position, detected or interpolated.
        x: (N,) float64, px of the original picture, its first pixel's centre being 0; NaN where not visible (only the trajectory works on
            tables that hold the peak of every frame).
        y: (N,) float64, as x.
        score: (N,) float64, probability of the frame's highest peak, 0 to 1, also where it counts for nothing; NaN where interpolated.
        source: (N,) str, `detected`, `interpolated` or empty where not visible.
        fps: frames per second; None where nobody knows.
        size_wh: width and height of the original picture; of the first one where they change.
    """

    frame: NDArray[np.int64]
    time_s: NDArray[np.float64]
    visible: NDArray[np.bool_]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    score: NDArray[np.float64]
    source: NDArray[np.str_]
    fps: float | None
    size_wh: tuple[int, int]

    def __post_init__(self) -> None:
        for column in COLUMNS:
            if getattr(self, column).shape != self.frame.shape:
                raise ValueError(f"{column} has the shape {getattr(self, column).shape}, frame has {self.frame.shape}")

    def __len__(self) -> int:
        return len(self.frame)

    def rows(self) -> Iterator[TrackRow]:
        """The frames one by one, as plain Python values."""
        for values in zip(*(getattr(self, column).tolist() for column in COLUMNS), strict=True):
            yield TrackRow(*values)

    def without_peaks(self) -> "BallTrack":
        """The table without the positions of peaks that are no ball."""
        x, y = (np.where(self.visible, values, np.nan) for values in (self.x, self.y))
        return replace(self, x=x, y=y)

    def write_csv(self, path: Path) -> None:
        """Writes `frame,time_s,visible,x,y,score,source`; visible is 0 or 1, what is unknown is empty.

        The file stands under its name only when it is whole. Raises OSError where it cannot be written.
        """
        with written_whole(path) as file:
            file.write(",".join(COLUMNS) + "\n")
            for row in self.rows():
                numbers = [_number(getattr(row, name), decimals) for name, decimals in DECIMALS.items()]
                file.write(",".join([str(row.frame), numbers[0], str(int(row.visible)), *numbers[1:], row.source]) + "\n")


def _number(value: float, decimals: int) -> str:
    """A value with so many decimals; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.{decimals}f}"


def join_tracks(parts: Sequence[BallTrack]) -> BallTrack:
    """The rows of all parts, in their order; rate and size are the first part's."""
    return track_of([row for part in parts for row in part.rows()], parts[0].fps, parts[0].size_wh)


def read_track(path: Path, fps: float | None, size_wh: tuple[int, int]) -> BallTrack:
    """A CSV that `write_csv` wrote; rate and size stand in the summary beside it.

    Raises:
        DataError: names the file and, where there is one, the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if header != list(COLUMNS):
                raise DataError(f"{path}:1: is no table of a ball: its first line must be {','.join(COLUMNS)}")
            rows = [_parsed(path, number, cells) for number, cells in enumerate(lines, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    return track_of(rows, fps, size_wh)


def track_of(rows: Sequence[TrackRow], fps: float | None, size_wh: tuple[int, int]) -> BallTrack:
    """The table of these rows; of none it is empty."""
    return BallTrack(
        frame=np.array([row.frame for row in rows], np.int64),
        time_s=np.array([row.time_s for row in rows], np.float64),
        visible=np.array([row.visible for row in rows], np.bool_),
        x=np.array([row.x for row in rows], np.float64),
        y=np.array([row.y for row in rows], np.float64),
        score=np.array([row.score for row in rows], np.float64),
        source=np.array([row.source for row in rows], f"U{max(map(len, SOURCES))}"),
        fps=fps,
        size_wh=size_wh,
    )


def _parsed(path: Path, line: int, cells: list[str]) -> TrackRow:
    try:
        frame, time_s, visible, x, y, score, source = cells
        if visible not in ("0", "1") or source not in SOURCES:
            raise ValueError
        seconds, *peak = [float(cell) if cell else math.nan for cell in (time_s, x, y, score)]
        return TrackRow(int(frame), seconds, visible == "1", peak[0], peak[1], peak[2], source)
    except ValueError:
        raise DataError(f"{path}:{line}: is no row of {','.join(COLUMNS)}: {shown(','.join(cells))}") from None

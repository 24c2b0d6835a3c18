"""From a network's peaks to the path of one ball: drops jumps that no ball makes, takes up faint peaks on the path, fills short gaps.

A ball is there frame after frame and moves by a bounded distance; a racket or a shoe that is taken for it is there for a frame or two, or
far from where the ball has just been. So the peaks are strung into paths, each step bounded by a speed, each gap by a number of frames, and
those paths are kept that together carry the most probability when every path costs a fixed amount. A dynamic programme finds them, over
the whole clip at once. Direction plays no part: bounces and hits turn a ball within a frame.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracknet.evaluation.detection import XY_DECIMALS
from tracknet.inference.track import DETECTED, INTERPOLATED, NO_BALL, BallTrack

TUNED_FPS = 30.0


@dataclass(frozen=True)
class TrajectorySettings:
    """What counts as the path of a ball.

    Attributes:
        max_speed: the farthest that a ball moves, in widths of the picture per frame at 30 frames/s; scaled to the track's rate.
        max_gap_frames: gaps of at most this many frames are bridged and filled; 0 fills none. In frames whatever the rate.
        min_support: a path is kept whose scores add up to more than this: 3 needs at least 4 peaks, or a few more uncertain ones.
        raise_score: a peak below the detection threshold is used, if it lies on a path, from this score on, 0 to 1; above 1 none is.
    """

    max_speed: float
    max_gap_frames: int
    min_support: float
    raise_score: float

    def __post_init__(self) -> None:
        if not (self.max_speed > 0 and self.max_gap_frames >= 0 and self.min_support >= 0 and self.raise_score >= 0):
            raise ValueError(f"max_speed must be above 0 and nothing below 0: {self}")

    @property
    def min_frames(self) -> int:
        """The fewest frames in which a path can be, as no score is above 1; in a clip of fewer nothing can be told by `refine`."""
        return math.floor(self.min_support) + 1


TUNED = TrajectorySettings(max_speed=0.047, max_gap_frames=2, min_support=3.0, raise_score=0.7)
"""Chosen on game 7 by `benchmarks/tune_trajectory.py`; docs/trajectory.md has what they do on other games."""


def refine(track: BallTrack, settings: TrajectorySettings = TUNED) -> BallTrack:
    """The path of the ball through a clip. Pure; the whole clip at once; one picture size throughout.

    A row of the result is one of these:

    - visible, source `detected`: the network's own peak of this frame, with x, y and score bit for bit as they came. Nearly always it
      was visible before. It may also be a peak below the detection threshold that lies between two visible ones on their path (its
      `score` tells: it is below the threshold, and at least `raise_score`).
    - visible, source `interpolated`: nothing was seen here; x, y are on the straight line between the neighbours on the path, score is
      NaN. Never in a gap of more than `max_gap_frames`, before the first or behind the last detection.
    - not visible, source empty: no ball. x, y and score keep the peak, if there is one, so that refining again gives the same again.

    A ball seen in fewer frames than a path needs (`min_support`) is dropped too, so that a clip of fewer than `settings.min_frames`
    frames has none (`BallTracker` leaves such clips as they are).

    Args:
        track: in x, y and score has the peak of EVERY frame, also where it is not visible for being below the threshold; NaN: no peak.
            Rows that are `interpolated` already are without a peak, for they have no score.
        settings: what counts as a path.
    """
    xy_px = np.stack([track.x, track.y], axis=1)
    peak = np.isfinite(xy_px).all(axis=1) & np.isfinite(track.score)  # an interpolated row has no score
    seen = peak & track.visible
    row = np.flatnonzero(seen | (peak & (track.score >= settings.raise_score)))
    step_px = settings.max_speed * track.size_wh[0] * TUNED_FPS / _rate(track.fps)
    kept = np.zeros(len(track), np.bool_)
    filled = np.zeros(len(track), np.bool_)
    for path in _paths(row, xy_px[row], track.score[row], step_px, settings.max_gap_frames + 1, settings.min_support):
        ends = np.flatnonzero(seen[path])
        if len(ends):  # a path of faint peaks alone is none, nor are those that lead to its first or away from its last visible one
            path = path[ends[0] : ends[-1] + 1]
            kept[path] = True
            filled[path[0] : path[-1]] = True
    filled &= ~kept
    stays = peak & ~filled
    x, y = (np.where(stays, values, np.nan) for values in (track.x, track.y))
    between = np.flatnonzero(filled)
    for values in (x, y):
        values[between] = np.interp(between, np.flatnonzero(kept), values[kept]).round(XY_DECIMALS) if len(between) else []
    source = np.where(kept, DETECTED, np.where(filled, INTERPOLATED, NO_BALL))
    return replace(track, visible=kept | filled, x=x, y=y, score=np.where(stays, track.score, np.nan), source=source)


def _rate(fps: float | None) -> float:
    """Frames per second for the speed; what the settings were tuned at where nobody knows."""
    return fps if fps is not None and math.isfinite(fps) and fps > 0 else TUNED_FPS


def _paths(
    row: NDArray[np.int64],
    xy_px: NDArray[np.float64],
    score: NDArray[np.float64],
    step_px: float,
    reach: int,
    min_support: float,
) -> list[NDArray[np.int64]]:
    """The paths that together have the highest sum of scores less `min_support` for each; one after the other in time.

    Viterbi's recursion: `total[i]` is the best sum of all paths up to peak i when i is on one, which either goes on from a peak at most
    `reach` rows earlier and near enough, or starts here behind the best that ended anywhere before.

    Args:
        row: (M,) frames with a peak, ascending.
        xy_px: (M, 2).
        score: (M,).
        step_px: the farthest move per frame.
        reach: rows from one peak of a path to the next, at most.
        min_support: cost of a path.

    Returns:
        Each path's rows, ascending.
    """
    count = len(row)
    total, before, goes_on = np.zeros(count), np.full(count, -1), np.zeros(count, np.bool_)
    earliest = np.searchsorted(row, row - reach)
    best, best_end = 0.0, -1
    for i in range(count):
        total[i], before[i] = best - min_support, best_end
        near = slice(earliest[i], i)
        moved_px = np.hypot(*(xy_px[i] - xy_px[near]).T)
        linked = np.where(moved_px <= step_px * (row[i] - row[near]), total[near], -np.inf)
        if len(linked) and linked.max() >= total[i]:
            total[i], before[i], goes_on[i] = linked.max(), earliest[i] + linked.argmax(), True
        total[i] += score[i]
        if total[i] > best:
            best, best_end = total[i], i
    paths: list[list[int]] = []
    i, joined = best_end, False
    while i >= 0:
        if not joined:
            paths.append([])
        paths[-1].append(int(row[i]))
        i, joined = before[i], bool(goes_on[i])
    return [np.array(path[::-1], np.int64) for path in reversed(paths)]

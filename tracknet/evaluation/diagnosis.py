"""Has the network learned anything? Two ways in which it has not show in its peaks, and each has a remedy."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tracknet.data.index import NO_LABEL, ClipIndex

if TYPE_CHECKING:
    from tracknet.evaluation.detection import Detections

SCORE_BINS = 100
GRID_WH = (32, 18)  # cells; a place is a square of 2 x 2 of them, so that no cell's border cuts it
SUMS = 5  # parts that were added, their thresholds in millionths, frames with a ball, detections, peaks near the ball
MILLION = 10**6
FEWEST = 20  # balls, and detections, below which nothing is said
NEAR = 0.02  # of the picture's width
RARE = 0.01  # detections per ball: fewer are as good as none
ONE_PLACE = 0.9  # share of the detections in one place, above which it is a fixed one ...
BALLS_THERE = 0.5  # ... unless this share of the balls is there too


def peak_statistics(index: ClipIndex, detections: "Detections", threshold: float) -> NDArray[np.int64]:
    """What `diagnose` looks at. Statistics of several ranks may be added.

    Args:
        index: the labels.
        detections: each frame at most once; frames without a label are left out.
        threshold: a peak at or above it is a detection, 0 to 1.

    Returns:
        (5 + 100 + 2 * 18 * 32,) int64: sums, the peaks by score, and by place in the picture the detections and the balls.
    """
    labelled = index.visibility[detections.row] != NO_LABEL
    row, score = detections.row[labelled], detections.score[labelled]
    size_wh = np.array([clip.size_wh for clip in index.clips], np.float64).reshape(-1, 2)[index.clip_of_row[row]]
    peak, truth = detections.xy_px[labelled], index.xy_px[row].astype(np.float64)
    ball, found = index.visibility[row] >= 1, score >= threshold
    near = ball & (np.linalg.norm(peak - truth, axis=-1) < NEAR * size_wh[:, 0])
    sums = np.array([1, round(threshold * MILLION), ball.sum(), found.sum(), near.sum()])
    scores = np.bincount(np.clip((score * SCORE_BINS).astype(np.int64), 0, SCORE_BINS - 1), minlength=SCORE_BINS)
    places = [_by_place(peak[found], size_wh[found]), _by_place(truth[ball], size_wh[ball])]
    return np.concatenate([sums, scores, *places]).astype(np.int64)


def diagnose(statistics: NDArray[np.int64]) -> str | None:
    """One line with the remedy where the network has learned nothing; None where all is well, or too few frames show a ball to tell.

    Args:
        statistics: as `peak_statistics` gives them, of all ranks.
    """
    parts, thresholds, balls, detected, near = (int(value) for value in statistics[:SUMS])
    if balls < FEWEST:
        return None
    if detected < RARE * balls:
        return _nothing_found(balls, detected, near, statistics[SUMS : SUMS + SCORE_BINS], thresholds / parts / MILLION)
    return _fixed_place(*statistics[SUMS + SCORE_BINS :].reshape(2, GRID_WH[1], GRID_WH[0]))


def _nothing_found(balls: int, detected: int, near: int, by_score: NDArray[np.int64], threshold: float) -> str:
    highest = (np.flatnonzero(by_score)[-1] + 1) / SCORE_BINS
    few = "no peak reaches" if detected == 0 else f"only {detected} peaks reach"
    line = f"{few} the threshold {threshold:g} on {balls} frames with a ball (highest score: {'below ' if highest < 1 else ''}{highest:g})"
    if near >= balls / 2:
        return f"{line}, yet {near} peaks are at the ball; lower the threshold (evaluate --threshold, training.evaluation.threshold)"
    return (
        f"{line}: the network has not learned to find the ball; train longer (training.max_steps, training.epochs),"
        " try another training.optimizer.lr, and see in the previews whether the labels lie on the ball"
    )


def _fixed_place(detections: NDArray[np.int64], balls: NDArray[np.int64]) -> str | None:
    inside, there = _in_squares(detections), _in_squares(balls)
    row, column = np.unravel_index(np.argmax(inside), inside.shape)
    count, total = int(inside[row, column]), int(detections.sum())
    if total < FEWEST or count < ONE_PLACE * total or there[row, column] >= BALLS_THERE * balls.sum():
        return None
    x, y = (column + 1) / GRID_WH[0], (row + 1) / GRID_WH[1]
    return (
        f"{count} of {total} detections are in one place, around {100 * x:.0f} % of the width and {100 * y:.0f} % of the height, where"
        f" {int(there[row, column])} of {int(balls.sum())} balls are: the network has learned a spot of the picture and not the ball;"
        " lower training.optimizer.lr, set data.background=median, train on more games, and look for a logo or a lamp there"
    )


def _in_squares(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sums over all squares of 2 x 2 cells."""
    summed: NDArray[np.int64] = cells[:-1, :-1] + cells[1:, :-1] + cells[:-1, 1:] + cells[1:, 1:]
    return summed


def _by_place(xy_px: NDArray[np.float64], size_wh: NDArray[np.float64]) -> NDArray[np.int64]:
    """(18 * 32,) points by cell of the picture, row by row."""
    cell = np.clip(((xy_px + 0.5) / size_wh * GRID_WH).astype(np.int64), 0, np.array(GRID_WH) - 1)
    return np.bincount(cell[:, 1] * GRID_WH[0] + cell[:, 0], minlength=GRID_WH[0] * GRID_WH[1])

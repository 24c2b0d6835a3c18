"""Which peaks are balls: the detection threshold with the best F1 on labelled frames. Test data never goes in here."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.evaluation.detection import Detections
from tracknet.metrics.outcomes import Counts, outcome_of_frames
from tracknet.metrics.protocols import TRACKNETV2
from tracknet.models import TrackNetConfig

THRESHOLDS = np.arange(1, 100) / 100
"""What is tried: 0.01, 0.02 ... 0.99, each the float of that decimal."""

THRESHOLD_PROTOCOL = TRACKNETV2
"""Under which they are compared; training selects its checkpoints by the same."""


WITHOUT_CHOICE = 0.5
"""The threshold of a model for which none was chosen."""


@dataclass(frozen=True)
class Threshold:
    """A detection threshold and where it comes from.

    Attributes:
        value: a peak at or above it is a ball, 0 to 1.
        origin: in words.
        chosen_on: the games that chose it; empty where none did.
    """

    value: float
    origin: str
    chosen_on: tuple[str, ...] = ()


def detection_threshold(config: TrackNetConfig, given: float | None) -> Threshold:
    """The threshold that was asked for, else the one chosen in training, else 0.5."""
    if given is not None:
        return Threshold(given, "given")
    if config.detection is None:
        return Threshold(WITHOUT_CHOICE, "the default; none was chosen for this model")
    games = tuple(config.detection["games"])
    return Threshold(float(config.detection["threshold"]), f"chosen on {', '.join(games)} ({config.detection['protocol']})", games)


def threshold_counts(index: ClipIndex, detections: Detections) -> NDArray[np.int64]:
    """Outcomes of the detected frames that have a label, at each of THRESHOLDS.

    Args:
        index: the labels.
        detections: each frame at most once.

    Returns:
        (99, 5) counts in the order of `Counts`. Counts of several ranks may be added.
    """
    labeled = index.visibility[detections.row] != NO_LABEL
    row, xy_px, score = detections.row[labeled], detections.xy_px[labeled], detections.score[labeled]
    accepted, rejected = np.zeros(len(row), np.int8), np.zeros(len(row), np.int8)
    clip_of = index.clip_of_row[row]
    for number in np.unique(clip_of):
        of_clip = clip_of == number
        frames = row[of_clip]
        for outcome, is_detected in ((accepted, True), (rejected, False)):
            outcome[of_clip] = outcome_of_frames(
                THRESHOLD_PROTOCOL,
                xy_px[of_clip],
                np.full(len(frames), is_detected),
                index.xy_px[frames],
                index.visibility[frames],
                index.clips[number].size_wh,
            )
    outcomes = [np.where(score >= threshold, accepted, rejected) for threshold in THRESHOLDS]
    return np.stack([np.bincount(outcome, minlength=5) for outcome in outcomes]).astype(np.int64)


def f1_at(threshold: float, counts: NDArray[np.int64]) -> float:
    """The F1 at one of THRESHOLDS, 0 to 1; `counts` as of `threshold_counts`."""
    return Counts(*(int(value) for value in counts[int(np.argmin(np.abs(THRESHOLDS - threshold)))])).f1


def choose_threshold(counts: NDArray[np.int64]) -> float | None:
    """The threshold with the best F1.

    Of several that are equally good, it is the middle one (the lower of two) of the longest run of neighbours; of runs equally long, of the
    upper one. There the choice hangs least on a few frames, and where it does not matter it says less often that there is a ball.

    Args:
        counts: (99, 5) as `threshold_counts` gives them.

    Returns:
        One of THRESHOLDS; None where no ball is found at any of them.
    """
    tp, fp1, fp2, _, fn = counts.T
    if not tp.any():
        return None
    f1 = 2 * tp / np.maximum(2 * tp + fp1 + fp2 + fn, 1)  # from whole numbers in one division: equal ratios are equal floats
    best = np.flatnonzero(f1 == f1.max())
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    longest = max(runs, key=lambda run: (len(run), run[0]))
    return float(THRESHOLDS[longest[(len(longest) - 1) // 2]])

"""How good is a set of detections: each frame's outcome under a protocol, integer counts of them, and the scores of counts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.metrics.protocols import Protocol

TP, FP1, FP2, TN, FN = range(5)
"""The outcomes of a frame, in the order of `Counts`."""

OCCLUDED = 3
"""The visibility of a ball that is hidden."""


@dataclass(frozen=True)
class Counts:
    """Frames by outcome; `tp` ball found, `fp1` ball there but the detection too far off, `fp2` a detection without a ball, `tn`, `fn`."""

    tp: int = 0
    fp1: int = 0
    fp2: int = 0
    tn: int = 0
    fn: int = 0

    @property
    def precision(self) -> float:
        """TP / (TP + FP1 + FP2), 0 to 1; 0 where nothing was detected."""
        return _share(self.tp, self.tp + self.fp1 + self.fp2)

    @property
    def recall(self) -> float:
        """TP / (TP + FN), 0 to 1; 0 where there is neither. As in the papers, a ball whose detection is too far off (FP1) is in neither."""
        return _share(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 0 to 1."""
        return _harmonic_mean(self.precision, self.recall)

    @property
    def accuracy(self) -> float:
        """(TP + TN) / all frames, 0 to 1; 0 where there is no frame."""
        return _share(self.tp + self.tn, self.tp + self.fp1 + self.fp2 + self.tn + self.fn)


@dataclass(frozen=True)
class Scores:
    """What a protocol makes of counts; each 0 to 1."""

    precision: float
    recall: float
    f1: float
    accuracy: float


@dataclass(frozen=True)
class PixelError:
    """Distance between detection and label over the true positives, px of the original picture."""

    median: float
    p90: float


def outcome_of_frames(
    protocol: Protocol,
    xy_px: NDArray[np.floating],
    detected: NDArray[np.bool_],
    truth_xy_px: NDArray[np.floating],
    visibility: NDArray[np.integer],
    size_wh: tuple[int, int],
) -> NDArray[np.int8]:
    """The outcome of each of N labelled frames of one picture size.

    Args:
        protocol: the rule.
        xy_px: (N, 2) detections, original px; ignored where not detected.
        detected: (N,) bool.
        truth_xy_px: (N, 2) labels, original px; ignored where there is no ball.
        visibility: (N,) 0 to 3.
        size_wh: of the original pictures.

    Returns:
        (N,) TP, FP1, FP2, TN or FN.
    """
    ball = np.isin(visibility, protocol.ball)
    near = _near(protocol, xy_px.astype(np.float64), truth_xy_px.astype(np.float64), visibility, size_wh)
    outcome = np.where(ball, np.where(detected, np.where(near, TP, FP1), FN), np.where(detected, FP2, TN))
    return outcome.astype(np.int8)


def _near(
    protocol: Protocol,
    found: NDArray[np.float64],
    truth: NDArray[np.float64],
    visibility: NDArray[np.integer],
    size_wh: tuple[int, int],
) -> NDArray[np.bool_]:
    def scaled(xy_px: NDArray[np.float64]) -> NDArray[np.float64]:
        # plainly scaled, as the peers scale their labels: the half-pixel rule would put other coordinates on either side of an integer;
        # multiplied first, so that a whole label that lands on an integer does so exactly
        return xy_px if protocol.size_wh is None else xy_px * np.array(protocol.size_wh) / np.array(size_wh)

    offset = np.trunc(scaled(found)) - np.trunc(scaled(truth)) if protocol.truncate else scaled(found - truth)
    distance_px = np.sqrt(np.square(offset).sum(axis=-1))
    if protocol.truncate_distance:
        distance_px = np.trunc(distance_px)
    limit_px = np.full(len(distance_px), float(protocol.distance_px))
    if protocol.occluded_distance_px is not None:
        limit_px[visibility == OCCLUDED] = protocol.occluded_distance_px
    near: NDArray[np.bool_] = distance_px < limit_px if protocol.strict else distance_px <= limit_px
    return near


def frame_weights(protocol: Protocol, clip_length: int) -> NDArray[np.int64]:
    """How often the protocol counts each frame of a clip: by the windows of `protocol.window` frames, moved by one, that hold it.

    Returns:
        (clip_length,) counts; all 0 for a clip that is shorter than one window.
    """
    position = np.arange(clip_length, dtype=np.int64)
    first_window = np.maximum(position - protocol.window + 1, 0)
    last_window = np.minimum(position, clip_length - protocol.window)
    windows: NDArray[np.int64] = np.maximum(last_window - first_window + 1, 0)
    return windows


def counts_of(outcome: NDArray[np.int8], weight: NDArray[np.int64] | None = None) -> Counts:
    """Adds up the outcomes of N frames.

    Args:
        outcome: (N,) as `outcome_of_frames` gives them.
        weight: (N,) how often each frame counts (`frame_weights`); None: once.
    """
    weight = np.ones(len(outcome), np.int64) if weight is None else weight
    return Counts(*(int(weight[outcome == kind].sum()) for kind in (TP, FP1, FP2, TN, FN)))


def count_outcomes(
    protocol: Protocol,
    xy_px: NDArray[np.floating],
    detected: NDArray[np.bool_],
    truth_xy_px: NDArray[np.floating],
    visibility: NDArray[np.integer],
    size_wh: tuple[int, int],
) -> Counts:
    """Counts the outcomes of N labelled frames, each once; arguments as of `outcome_of_frames`."""
    return counts_of(outcome_of_frames(protocol, xy_px, detected, truth_xy_px, visibility, size_wh))


def scores_of(protocol: Protocol, counts: Counts, undefined: float = 0.0) -> Scores:
    """Precision, recall by the protocol's own denominator, F1 and accuracy.

    Args:
        protocol: the rule.
        counts: of any frames.
        undefined: stands for a score whose denominator is 0; that of F1 is 0 where there is neither a ball nor a detection.
    """
    balls = counts.tp + counts.fn + (counts.fp1 if protocol.fp1_in_recall else 0)
    claims = counts.tp + counts.fp1 + counts.fp2
    f1 = _harmonic_mean(counts.precision, _share(counts.tp, balls))
    return Scores(
        precision=counts.precision if claims else undefined,
        recall=_share(counts.tp, balls) if balls else undefined,
        f1=f1 if claims + counts.fn else undefined,
        accuracy=counts.accuracy if claims + counts.tn + counts.fn else undefined,
    )


def pixel_error(xy_px: NDArray[np.floating], truth_xy_px: NDArray[np.floating], outcome: NDArray[np.int8]) -> PixelError | None:
    """How far off the true positives are, in px of the original picture whatever the protocol measures in.

    Args:
        xy_px: (N, 2) detections, original px.
        truth_xy_px: (N, 2) labels, original px.
        outcome: (N,) as `outcome_of_frames` gives them.

    Returns:
        Median and 90th percentile (linear between frames); None where there is no true positive.
    """
    right = outcome == TP
    if not right.any():
        return None
    distance_px = np.linalg.norm(xy_px[right].astype(np.float64) - truth_xy_px[right].astype(np.float64), axis=-1)
    return PixelError(median=float(np.median(distance_px)), p90=float(np.percentile(distance_px, 90)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _harmonic_mean(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0

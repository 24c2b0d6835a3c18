"""How good is a set of detections: integer counts per protocol, and precision, recall and F1 from them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.metrics.protocols import Protocol


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
        detected = self.tp + self.fp1 + self.fp2
        return self.tp / detected if detected else 0.0

    @property
    def recall(self) -> float:
        """TP / (TP + FN), 0 to 1; 0 where there is neither. As in the papers, a ball whose detection is too far off (FP1) is in neither."""
        balls = self.tp + self.fn
        return self.tp / balls if balls else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 0 to 1."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def count_outcomes(
    protocol: Protocol,
    xy_px: NDArray[np.floating],
    detected: NDArray[np.bool_],
    truth_xy_px: NDArray[np.floating],
    visibility: NDArray[np.integer],
    size_wh: tuple[int, int],
) -> Counts:
    """Compares N labelled frames of one picture size.

    Args:
        protocol: the rule.
        xy_px: (N, 2) detections, original px; ignored where not detected.
        detected: (N,) bool.
        truth_xy_px: (N, 2) labels, original px; ignored where there is no ball.
        visibility: (N,) 0 to 3.
        size_wh: of the original pictures.
    """
    found, truth = xy_px.astype(np.float64), truth_xy_px.astype(np.float64)
    if protocol.size_wh is not None:
        # plainly scaled, as the peers scale their labels: the half-pixel rule would put other coordinates on either side of an integer
        scale = np.array(protocol.size_wh) / np.array(size_wh)
        found, truth = found * scale, truth * scale
    if protocol.truncate:
        found, truth = np.trunc(found), np.trunc(truth)
    distance_px = np.linalg.norm(found - truth, axis=-1)
    near = distance_px < protocol.distance_px if protocol.strict else distance_px <= protocol.distance_px
    ball = np.isin(visibility, protocol.ball)
    return Counts(
        tp=int((ball & detected & near).sum()),
        fp1=int((ball & detected & ~near).sum()),
        fp2=int((~ball & detected).sum()),
        tn=int((~ball & ~detected).sum()),
        fn=int((ball & ~detected).sum()),
    )

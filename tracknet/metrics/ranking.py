"""Average precision: how well the scores rank right detections before wrong ones, whatever the threshold."""

import numpy as np
from numpy.typing import NDArray


def average_precision(right: NDArray[np.bool_], score: NDArray[np.floating], balls: int) -> float | None:
    """Area under the interpolated precision-recall curve, over all its points (as PASCAL VOC 2010 and later define it).

    Every frame's peak is a candidate, also one below the detection threshold. With p(s) and r(s) the precision and recall of the
    candidates that score at least s, AP is the sum over the distinct scores, from the highest down, of the growth of r times the
    highest p at this score or any lower one. Recall is of all frames with a ball, also under protocols that leave FP1 out of theirs.

    Args:
        right: (M,) whether the candidate is a true positive; `outcome_of_frames(..., detected=all True, ...) == TP`.
        score: (M,) finite.
        balls: frames with a ball under the protocol, also those without a candidate.

    Returns:
        0 to 1; None where there is no ball.
    """
    if balls == 0:
        return None
    order = np.argsort(-score, kind="stable")
    last_of_score = np.cumsum(np.unique(score, return_counts=True)[1][::-1]) - 1
    true_positives = np.cumsum(right[order])[last_of_score]
    precision = true_positives / (last_of_score + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(true_positives, prepend=0) * envelope).sum() / balls)

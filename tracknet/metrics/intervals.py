"""How sure is a score: a bootstrap over clips, since the frames of one clip are not independent of each other."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SHARE = 0.95
"""Of the draws, lie inside the interval."""


def bootstrap(clips: int, statistic: Callable[[NDArray[np.int64]], float], seed: int, draws: int = 1000) -> tuple[float, float] | None:
    """The 95 % percentile interval of a statistic when whole clips are drawn anew (Efron and Tibshirani 1993, chapter 13).

    The draws depend on `seed` and `clips` alone. So two statistics that are called with both equal see the same clips, and the
    difference of two models, taken inside one statistic, is a paired one.

    Args:
        clips: their number.
        statistic: of (clips,) int64 drawn clip numbers, some more than once; NaN where it is not defined for them.
        seed: of the draws.
        draws: how many.

    Returns:
        The lower and upper end; None where there is no interval: fewer than 2 clips, or a statistic that no draw defines.
    """
    if clips < 2:
        return None
    random = np.random.default_rng(seed)
    values = np.array([statistic(random.integers(0, clips, clips)) for _ in range(draws)], dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)

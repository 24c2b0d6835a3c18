"""Ratios of two ways to do the same: they take turns, so that a machine that gets slower slows both."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_FROM = 6  # fewer pairs say nothing of an interval
RESAMPLES = 4000

Action = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A figure measured several times.

    Attributes:
        middle: the ratio of the medians; of a plain figure its median.
        low: lower end of its 95 % interval (bootstrap over the pairs); the least where there are fewer than `BOOTSTRAP_FROM`.
        high: upper end, or the most.
        count: pairs, or times.
    """

    middle: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{significant(self.middle)} ({significant(self.low)} to {significant(self.high)}, n = {self.count})"


@dataclass(frozen=True)
class Row:
    """One line of the table of results.

    Attributes:
        what: was measured.
        against: what it is compared with; a peer's file where it stands for a peer.
        target: as asked, such as `>= 4`.
        measured: the ratio.
        remark: absolute figures of this run, sizes, what else one must know.
    """

    what: str
    against: str
    target: str
    measured: Spread
    remark: str = ""


def significant(value: float) -> str:
    """Three significant digits, no exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{max(0, digits)}f}"


def spread_of(values: Sequence[float]) -> Spread:
    """The median of a plain figure."""
    return _spread(np.asarray(values)[:, None], lambda medians: medians[..., 0])


def seconds(action: Action) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(mine: Action, other: Action, *, pairs: int, warm_up: int = 1) -> tuple[list[float], list[float]]:
    """Seconds of both, pair by pair; who comes first changes too.

    Args:
        mine: what is measured.
        other: what it is compared with.
        pairs: measured.
        warm_up: pairs before them that are not.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-warm_up, pairs):
        for side in (0, 1) if number % 2 else (1, 0):
            taken = seconds((mine, other)[side])
            if number >= 0:
                times[side].append(taken)
    return times


def speed_up(mine: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast as the other: its median time through mine."""
    return _spread(np.stack([mine, other], axis=1), lambda medians: medians[..., 1] / medians[..., 0])


def time_ratio(mine: Sequence[float], other: Sequence[float]) -> Spread:
    """My median time through the other's."""
    return speed_up(other, mine)


def _spread(pairs: NDArray[np.float64], figure: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Spread:
    """`figure` of the medians (..., k) of columns (n, k), with its interval."""
    count, middle = len(pairs), float(figure(np.median(pairs, axis=0)))
    if count < BOOTSTRAP_FROM:
        single = figure(pairs)
        return Spread(middle, float(single.min()), float(single.max()), count)
    chosen = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(figure(np.median(pairs[chosen], axis=1)), [0.025, 0.975])
    return Spread(middle, float(low), float(high), count)


def middle_half(values: Sequence[float]) -> str:
    """Between what the middle half of the values lies."""
    lower, _, upper = quantiles(values, method="inclusive")
    return f"{significant(lower)} to {significant(upper)}"

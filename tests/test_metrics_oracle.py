"""Every protocol against a second reading of the evaluators, in plain Python: one frame at a time, exact fractions, no shared code."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tracknet.metrics.outcomes import counts_of, frame_weights, outcome_of_frames, scores_of
from tracknet.metrics.protocols import PROTOCOLS

CASES = 1000
SIZES = [(1280, 720), (1920, 1080), (640, 360), (512, 288), (768, 432)]


def whole(value: float, target: int, size: int) -> int:
    return int(Fraction(value) * target / size)


def squared_offset(found, truth, target_wh, size_wh, integers) -> Fraction:
    total = Fraction(0)
    for axis in (0, 1):
        if integers:
            one, two = (Fraction(whole(xy[axis], target_wh[axis], size_wh[axis])) for xy in (found, truth))
        else:
            one, two = (Fraction(xy[axis]) * target_wh[axis] / size_wh[axis] for xy in (found, truth))
        total += (one - two) ** 2
    return total


def is_right(name, found, truth, visibility, size_wh) -> bool:
    if name == "wasb":
        return squared_offset(found, truth, size_wh, size_wh, integers=False) < 16
    if name in ("tracknetv2", "tracknetv2-x3", "tracknetv3"):
        return squared_offset(found, truth, (512, 288), size_wh, integers=True) <= 16
    if name == "tracknetv5-code":
        return squared_offset(found, truth, (512, 288), size_wh, integers=True) < 16
    if name == "gridtracknet":
        return math.isqrt(int(squared_offset(found, truth, (768, 432), size_wh, integers=True))) <= 4
    if name == "yastrebksv":
        return squared_offset(found, truth, (1280, 720), size_wh, integers=False) < 25
    if name == "totnet":
        return squared_offset(found, truth, (512, 288), size_wh, integers=True) <= (100 if visibility == 3 else 25)
    raise AssertionError(name)


def oracle(name, frames, size_wh) -> tuple[dict[str, int], float, float]:
    counts = {"tp": 0, "fp1": 0, "fp2": 0, "tn": 0, "fn": 0}
    for number, (found, detected, truth, visibility) in enumerate(frames):
        has_ball = visibility in (1, 2) if name == "wasb" else visibility != 0
        if has_ball and detected:
            kind = "tp" if is_right(name, found, truth, visibility, size_wh) else "fp1"
        elif has_ball:
            kind = "fn"
        else:
            kind = "fp2" if detected else "tn"
        times = 1
        if name == "tracknetv2-x3":
            times = sum(1 for start in range(len(frames) - 2) if number in (start, start + 1, start + 2))
        counts[kind] += times
    detections = counts["tp"] + counts["fp1"] + counts["fp2"]
    balls = counts["tp"] + counts["fn"] + (counts["fp1"] if name in ("yastrebksv", "totnet") else 0)
    return counts, counts["tp"] / detections if detections else 0.0, counts["tp"] / balls if balls else 0.0


def random_clip(random: np.random.Generator):
    """Whole labels, and detections that lie on, just inside and just outside the protocols' limits."""
    size_wh = SIZES[random.integers(len(SIZES))]
    frames = []
    for _ in range(random.integers(0, 13)):
        truth = [float(random.integers(0, side)) for side in size_wh]
        px = size_wh[0] / random.choice([512, 768, 1280, size_wh[0]])  # of the original picture, in one of the measured ones
        offset = random.integers(-11, 12, 2) * px if random.random() < 0.5 else random.uniform(-6, 6, 2) * px
        nudge = random.choice([0.0, 0.0, 0.25, -0.25, 0.001, -0.001])
        found = [
            round(float(value + by + nudge), 3) for value, by in zip(truth, offset * random.choice([0, 1], 2, p=[0.3, 0.7]), strict=True)
        ]
        frames.append((found, bool(random.random() < 0.85), truth, int(random.integers(0, 4))))
    return frames, size_wh


@pytest.mark.parametrize("one", PROTOCOLS, ids=lambda one: one.name)
def test_a_brute_force_count_agrees_on_1000_random_clips(one):
    random = np.random.default_rng(5)
    seen = dict.fromkeys(("tp", "fp1", "fp2", "tn", "fn"), 0)
    for _ in range(CASES):
        frames, size_wh = random_clip(random)
        expected, precision, recall = oracle(one.name, frames, size_wh)
        found, detected, truth, visibility = zip(*frames, strict=True) if frames else ((), (), (), ())
        columns = (np.array(found, float).reshape(-1, 2), np.array(detected, bool), np.array(truth, float).reshape(-1, 2))
        outcome = outcome_of_frames(one, *columns, np.array(visibility, np.int8), size_wh)
        counts = counts_of(outcome, frame_weights(one, len(frames)))
        assert vars(counts) == expected, (frames, size_wh)
        scores = scores_of(one, counts)
        assert (scores.precision, scores.recall) == (precision, recall)
        seen = {kind: number + expected[kind] for kind, number in seen.items()}
    assert min(seen.values()) > 200  # each outcome was put to the test

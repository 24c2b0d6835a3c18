"""A network that has learned nothing is told from one that has, by its peaks; and a small or odd set is not called one."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tracknet.data.index import Clip, ClipIndex, LabelledClip, join_clips
from tracknet.evaluation.detection import Detections
from tracknet.evaluation.diagnosis import diagnose, peak_statistics

RNG = np.random.default_rng(0)
SIZE = (1280, 720)


def flying(count: int) -> NDArray[np.float64]:
    """Balls all over the picture."""
    return RNG.uniform((50, 50), (1230, 670), (count, 2))


def index_of(xy: NDArray[np.float64], visibility: NDArray[np.int8] | None = None) -> ClipIndex:
    labels = np.ones(len(xy), np.int8) if visibility is None else visibility
    return join_clips([LabelledClip(Clip("g", "c", Path("g/c"), None, SIZE, 0, len(xy)), xy.astype(np.float32), labels)])


def verdict(index: ClipIndex, xy: NDArray[np.float64], score: NDArray[np.float64] | float, threshold: float = 0.5) -> str | None:
    scores = np.broadcast_to(score, len(index)).astype(np.float64)
    return diagnose(peak_statistics(index, Detections(np.arange(len(index)), xy, scores), threshold))


def test_all_peaks_under_the_threshold_are_named_with_a_remedy() -> None:
    said = verdict(index_of(flying(200)), flying(200), RNG.uniform(0, 0.04, 200))
    assert said is not None
    assert "no peak reaches the threshold 0.5 on 200 frames with a ball (highest score: below 0.04)" in said
    assert "training.max_steps" in said
    assert "\n" not in said


def test_a_handful_of_peaks_above_it_are_as_good_as_none() -> None:
    score = np.full(2000, 0.1)
    score[:3] = 0.9
    said = verdict(index_of(flying(2000)), flying(2000), score)
    assert said is not None
    assert "only 3 peaks reach the threshold" in said


def test_right_peaks_under_the_threshold_need_another_threshold_and_no_training() -> None:
    balls = flying(100)
    said = verdict(index_of(balls), balls + 1, 0.3)
    assert said is not None
    assert "100 peaks are at the ball; lower the threshold" in said
    assert "max_steps" not in said
    assert verdict(index_of(balls), balls + 1, 0.3, threshold=0.2) is None


@pytest.mark.parametrize("spot", [(0, 0), (1279, 719), (640, 360), (400.1, 280.2)])  # a corner, cell borders, anywhere
def test_one_fixed_place_is_named_with_a_remedy(spot: tuple[float, float]) -> None:
    peaks = np.array(spot) + RNG.normal(0, 5, (300, 2))
    peaks[:20] = flying(20)
    said = verdict(index_of(flying(300)), peaks, 0.9)
    assert said is not None
    assert "detections are in one place" in said
    x, y = round(100 * spot[0] / 1280), round(100 * spot[1] / 720)
    named = [int(word) for word in said.replace(",", "").split() if word.isdecimal()][2:4]
    assert abs(named[0] - x) <= 4
    assert abs(named[1] - y) <= 6
    assert "background=median" in said
    assert "\n" not in said


def test_a_good_network_is_left_alone() -> None:
    balls = flying(300)
    assert verdict(index_of(balls), balls + RNG.normal(0, 3, balls.shape), 0.9) is None
    assert verdict(index_of(balls), flying(300), 0.9) is None  # poor, yet neither of the two


def test_a_set_without_a_ball_is_no_fixed_place_nor_a_lack() -> None:
    nothing = index_of(flying(300), np.zeros(300, np.int8))
    assert verdict(nothing, np.full((300, 2), 5.0), 0.9) is None
    assert verdict(nothing, np.full((300, 2), 5.0), 0.1) is None


def test_one_short_clip_whose_ball_hardly_moves_is_no_fixed_place() -> None:
    still = np.full((60, 2), 300.0) + RNG.normal(0, 8, (60, 2))
    assert verdict(index_of(still), still, 0.9) is None
    few = flying(12)
    assert verdict(index_of(few), np.full((12, 2), 5.0), 0.9) is None
    assert verdict(index_of(few), few, 0.1) is None


def test_frames_without_a_label_are_not_looked_at() -> None:
    labels = np.where(np.arange(300) < 200, -1, 1).astype(np.int8)
    balls = flying(300)
    peaks = np.where(labels[:, None] == -1, 5.0, balls)
    assert verdict(index_of(balls, labels), peaks, 0.9) is None


def test_statistics_of_ranks_add_up() -> None:
    index, peaks, score = index_of(flying(300)), flying(300), RNG.uniform(0, 0.3, 300)
    parts = [peak_statistics(index, Detections(rows, peaks[rows], score[rows]), 0.37) for rows in np.array_split(np.arange(300), [0, 120])]
    assert len(parts) == 3  # the first rank has no window
    whole = peak_statistics(index, Detections(np.arange(300), peaks, score), 0.37)
    assert diagnose(sum(parts)) == diagnose(whole)
    assert "the threshold 0.37 on 300 frames" in (diagnose(whole) or "")

"""Average precision, pixel error and the interval of a score."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.metrics.intervals import bootstrap
from tracknet.metrics.outcomes import FN, FP1, TP, PixelError, pixel_error
from tracknet.metrics.ranking import average_precision


def ap(right, score, balls):
    return average_precision(np.array(right, bool), np.array(score, float), balls)


def test_average_precision_by_hand():
    # by falling score: right, wrong, right, wrong; 4 balls. Precision 1/1, 1/2, 2/3, 2/4, so the envelope is 1, 2/3, 2/3, 2/4.
    # Recall grows by 1/4 at the first and by 1/4 at the third: 1/4 * 1 + 1/4 * 2/3 = 5/12.
    assert ap([True, False, True, False], [0.9, 0.8, 0.7, 0.6], balls=4) == pytest.approx(5 / 12)
    # wrong first: precision 0, 1/2, 2/3; the envelope lifts the 1/2: 1/2 * 2/3 + 1/2 * 2/3 = 2/3.
    assert ap([False, True, True], [0.9, 0.8, 0.7], balls=2) == pytest.approx(2 / 3)
    # equal scores are one point, whatever their order: precision 1/2 at recall 1.
    assert ap([True, False], [0.5, 0.5], balls=1) == ap([False, True], [0.5, 0.5], balls=1) == 0.5


def test_average_precision_at_its_ends():
    assert ap([True, True], [0.1, 0.2], balls=2) == 1
    assert ap([False, False], [0.1, 0.2], balls=2) == 0
    assert ap([], [], balls=2) == 0
    assert ap([False], [0.3], balls=0) is None


def brute_force_ap(right, score, balls) -> float:
    points = []
    for level in sorted(set(score), reverse=True):
        kept = [r for r, s in zip(right, score, strict=True) if s >= level]
        points.append((sum(kept) / balls, sum(kept) / len(kept)))
    area, last = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        area += (recall - last) * max(precision for _, precision in points[number:])
        last = recall
    return area


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=25), st.integers(0, 5))
def test_average_precision_agrees_with_a_brute_force_one(candidates, missed):
    right, score = [r for r, _ in candidates], [s / 5 for _, s in candidates]
    balls = sum(right) + missed
    if balls:
        assert ap(right, score, balls) == pytest.approx(brute_force_ap(right, score, balls))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=25), st.randoms())
def test_average_precision_hangs_on_the_order_of_the_scores_alone(candidates, random):
    shuffled = random.sample(candidates, len(candidates))
    first, second = ([list(column) for column in zip(*rows, strict=True)] for rows in (candidates, shuffled))
    assert ap(*first, balls=30) == pytest.approx(ap(second[0], np.exp(second[1]), balls=30))


def test_pixel_error_is_of_the_true_positives_and_in_original_px():
    truth = np.zeros((5, 2))
    found = np.array([[1, 0], [0, 2], [3, 4], [90, 0], [70, 0]], float)
    outcome = np.array([TP, TP, TP, FP1, FN], np.int8)
    # 1, 2 and 5 px: the 90th percentile lies at 0.9 * 2 = 1.8 between the first and the third, 2 + 0.8 * (5 - 2) = 4.4
    assert pixel_error(found, truth, outcome) == PixelError(median=2.0, p90=pytest.approx(4.4))
    assert pixel_error(found, truth, np.full(5, FN, np.int8)) is None


def mean_of(values):
    return lambda drawn: float(np.mean(np.asarray(values)[drawn]))


def test_an_interval_is_the_same_for_the_same_seed_and_another_for_another():
    values = np.arange(12.0)
    first = bootstrap(12, mean_of(values), seed=3)
    assert first == bootstrap(12, mean_of(values), seed=3)
    assert first != bootstrap(12, mean_of(values), seed=4)


def test_an_interval_has_the_width_that_theory_gives_it():
    values = np.random.default_rng(0).normal(5, 2, 100)
    low, high = bootstrap(100, mean_of(values), seed=0)
    expected = 1.96 * values.std() / np.sqrt(100)  # of the mean of 100 independent clips
    assert low == pytest.approx(values.mean() - expected, abs=0.15 * expected)
    assert high == pytest.approx(values.mean() + expected, abs=0.15 * expected)


def test_clips_are_drawn_whole():
    drawn = []
    bootstrap(4, lambda numbers: float(drawn.append(numbers.tolist()) or 0), seed=0, draws=50)
    assert len(drawn) == 50
    assert all(len(numbers) == 4 and set(numbers) <= {0, 1, 2, 3} for numbers in drawn)
    assert any(len(set(numbers)) < 4 for numbers in drawn)


def test_the_difference_of_two_models_is_paired():
    # the clips differ far more than the models: each clip alone says that the second is better by 0.1
    first = np.linspace(0, 1, 10)
    second = first + 0.1
    low, high = bootstrap(10, lambda drawn: float((second[drawn] - first[drawn]).mean()), seed=0)
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.1))
    alone_low, alone_high = bootstrap(10, mean_of(second), seed=0)
    assert alone_high - alone_low > 0.3


def test_there_is_no_interval_of_one_clip_or_of_a_score_that_is_never_defined():
    assert bootstrap(1, mean_of([1.0]), seed=0) is None
    assert bootstrap(0, mean_of([1.0]), seed=0) is None
    assert bootstrap(3, lambda drawn: np.nan, seed=0) is None


def test_draws_without_a_value_are_left_out():
    values = np.array([np.nan, 2.0, 2.0])
    assert bootstrap(3, lambda drawn: float(values[drawn].max()) if 0 not in drawn else np.nan, seed=0) == (2.0, 2.0)

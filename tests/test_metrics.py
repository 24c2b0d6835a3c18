"""Outcomes by the two protocols that a training run logs, on rows counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.metrics.outcomes import Counts, count_outcomes
from tracknet.metrics.protocols import TRACKNETV2, WASB

HD = (1280, 720)


def count(protocol, found, detected, truth, visibility, size_wh=HD) -> Counts:
    return count_outcomes(protocol, np.array(found, float), np.array(detected), np.array(truth, float), np.array(visibility), size_wh)


@pytest.mark.parametrize(
    ("found", "detected", "truth", "visibility", "v2", "wasb"),
    [
        ((100, 100), True, (100, 100), 1, "tp", "tp"),
        ((100, 100), True, (108, 100), 1, "tp", "fp1"),  # 8 px in the original are 3.2 at 512x288
        ((100, 100), True, (103.99, 100), 2, "tp", "tp"),
        ((100, 100), True, (104, 100), 1, "tp", "fp1"),  # WASB is strict
        ((100, 100), True, (114, 100), 1, "fp1", "fp1"),
        ((100, 100), True, (0, 0), 0, "fp2", "fp2"),
        ((0, 0), False, (0, 0), 0, "tn", "tn"),
        ((0, 0), False, (100, 100), 2, "fn", "fn"),
        ((100, 100), True, (100, 100), 3, "tp", "fp2"),  # an occluded ball is one for TrackNetV2 alone
        ((0, 0), False, (100, 100), 3, "fn", "tn"),
    ],
)
def test_one_frame(found, detected, truth, visibility, v2, wasb):
    for protocol, expected in ((TRACKNETV2, v2), (WASB, wasb)):
        assert count(protocol, [found], [detected], [truth], [visibility]) == Counts(**{expected: 1})


def test_tracknetv2_truncates_at_512x288_before_it_measures():
    # 4.9 px apart as floats, but integers 100 and 104: at most 4
    assert count(TRACKNETV2, [(100.0, 50)], [True], [(104.9, 50)], [1], size_wh=(512, 288)) == Counts(tp=1)
    # 4.2 px apart, but integers 99 and 104
    assert count(TRACKNETV2, [(99.9, 50)], [True], [(104.1, 50)], [1], size_wh=(512, 288)) == Counts(fp1=1)


def test_scores_of_nothing_are_zero_and_not_an_error():
    assert (Counts().precision, Counts().recall, Counts().f1, Counts().accuracy) == (0, 0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 20)), min_size=1, max_size=40))
def test_every_frame_has_exactly_one_outcome(frames):
    visibility, detected, offset = (np.array(column) for column in zip(*frames, strict=True))
    truth = np.full((len(frames), 2), 300.0)
    for protocol in (TRACKNETV2, WASB):
        outcome = count_outcomes(protocol, truth + offset[:, None], detected, truth, visibility, HD)
        assert outcome.tp + outcome.fp1 + outcome.fp2 + outcome.tn + outcome.fn == len(frames)
        assert outcome.tp + outcome.fp1 + outcome.fn == np.isin(visibility, protocol.ball).sum()

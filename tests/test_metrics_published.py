"""Rows that others published, against the counts they published with them."""

from dataclasses import replace

import pytest

from tracknet.metrics.outcomes import Counts
from tracknet.metrics.published import PUBLISHED, PublishedRow, contradictions

AGREE = {
    ("TrackNetV2 (3 in 1 out), badminton", "TrackNetV2 (Sun et al., ICPAI 2020)"),
    ("TrackNetV2 (+Motion), tennis by game", "TrackNetV4/TrackNetV4 docs/RESULT.md"),
    ("TrackNetV3 (+Motion), badminton", "TrackNetV4/TrackNetV4 docs/RESULT.md"),
    ("TrackNetV2, new tennis", "asigatchov/TrackNetV4 docs/RESULT.md"),
    ("TrackNetV4 Type A, new tennis", "asigatchov/TrackNetV4 docs/RESULT.md"),
    ("TrackNetV4 Type B, new tennis", "asigatchov/TrackNetV4 docs/RESULT.md"),
}


def test_tracknetv2s_counts_give_its_published_scores():
    counts = Counts(tp=29129, tn=4264, fp1=468, fp2=358, fn=4973)
    assert round(100 * counts.accuracy, 1) == 85.2  # 33393 / 39192 = 0.85204
    assert round(100 * counts.precision, 1) == 97.2  # 29129 / 29955 = 0.97243
    assert round(100 * counts.recall, 1) == 85.4  # 29129 / 34102 = 0.85417


def test_the_rows_that_agree_with_their_counts_are_these():
    assert {(row.name, row.source) for row in PUBLISHED if not contradictions(row)} == AGREE
    assert len(PUBLISHED) == 15


@pytest.mark.parametrize("row", [row for row in PUBLISHED if (row.name, row.source) in AGREE], ids=lambda row: row.name)
def test_a_published_row_comes_out_of_its_counts(row):
    for score, text in row.stated.items():
        percent = 100 * getattr(row.counts, score)
        assert f"{percent:.{len(text.partition('.')[2])}f}" == text
        assert abs(percent - float(text)) < 0.1


def test_a_contradiction_says_what_and_by_how_much():
    # (15863 + 396) / 17193 = 0.94568, 15863 / 16022 = 0.99008, 15863 / 16638 = 0.95342, F1 = 2 * 15863 / (16022 + 16638) = 0.97140
    row = next(row for row in PUBLISHED if row.name == "TrackNetV2, tennis by game")
    assert contradictions(row) == ["recall is 95.34 by the counts, not 95.7", "f1 is 97.14 by the counts, not 97.3"]


def test_counts_that_do_not_add_up_to_the_frames_are_a_contradiction():
    row = next(row for row in PUBLISHED if row.name == "TrackNetV2 (3 in 3 out), badminton")
    assert contradictions(row)[0] == "the counts add up to 37694 frames, not 37794"  # 26324 + 6013 + 438 + 393 + 4526
    assert not contradictions(replace(row, frames=37694, stated={}))


@pytest.mark.parametrize(
    ("stated", "agrees"),
    [
        # 200 / 300 = 66.6667 %
        ("66.67", True),
        ("66.66", False),
        ("66.7", True),
        ("66.6", False),
        ("67", True),
        ("66", False),
        ("67.0", False),  # a zero that is written counts as a digit
    ],
)
def test_the_tolerance_is_half_of_the_last_stated_digit(stated, agrees):
    row = PublishedRow("a", "b", None, Counts(tp=200, fp1=60, fp2=40), {"precision": stated})
    assert (contradictions(row) == []) == agrees


@pytest.mark.parametrize("stated", ["12.5", "12.4", "12.6"])
def test_a_score_between_two_stated_values_may_have_been_rounded_either_way(stated):
    row = PublishedRow("a", "b", None, Counts(tp=2491, fn=17509), {"recall": stated})  # 12.455 %
    assert (contradictions(row) == []) == (stated == "12.5")
    row = PublishedRow("a", "b", None, Counts(tp=249, fn=1751), {"recall": stated})  # 12.45 %
    assert (contradictions(row) == []) == (stated in ("12.5", "12.4"))

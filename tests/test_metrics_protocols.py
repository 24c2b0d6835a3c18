"""Rows counted by hand under each peer's rule, in pictures of 1280x720 where nothing else is said."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tracknet.errors import ConfigError
from tracknet.metrics.outcomes import FN, FP1, FP2, TN, TP, Counts, counts_of, frame_weights, outcome_of_frames, scores_of
from tracknet.metrics.protocols import PROTOCOLS, TRAINING_PROTOCOLS, Protocol, protocol

HD, FULL_HD, HALF_HD = (1280, 720), (1920, 1080), (640, 360)


def outcome(name, found, truth, visibility, size_wh=HD, detected=True) -> int:
    frame = (np.array([found], float), np.array([detected]), np.array([truth], float), np.array([visibility]))
    return int(outcome_of_frames(protocol(name), *frame, size_wh)[0])


@pytest.mark.parametrize(
    ("found", "truth", "visibility", "expected"),
    [
        ((103.99, 100), (100, 100), 1, TP),  # 3.99 < 4
        ((104, 100), (100, 100), 1, FP1),  # 4 is not below 4
        ((102, 103), (100, 100), 2, TP),  # sqrt(2*2 + 3*3) = 3.61
        ((103, 103), (100, 100), 2, FP1),  # sqrt(3*3 + 3*3) = 4.24
        ((100, 100), (100, 100), 3, FP2),  # an occluded ball is no ball
    ],
)
def test_wasb(found, truth, visibility, expected):
    assert outcome("wasb", found, truth, visibility) == expected


def test_wasb_measures_in_the_original_picture_of_any_size():
    # 3.9 px stay 3.9 px
    assert outcome("wasb", (103.9, 100), (100, 100), 1, FULL_HD) == outcome("wasb", (103.9, 100), (100, 100), 1, HALF_HD) == TP


@pytest.mark.parametrize("name", ["tracknetv2", "tracknetv2-x3", "tracknetv3"])
@pytest.mark.parametrize(
    ("found", "truth", "visibility", "size_wh", "expected"),
    [
        # 1280x720 to 512x288 is times 0.4; the label (100, 100) becomes (40, 40)
        ((110, 100), (100, 100), 1, HD, TP),  # 44 - 40 = 4, at most 4
        ((112.4, 100), (100, 100), 1, HD, TP),  # 44.96 is truncated to 44
        ((112.5, 100), (100, 100), 1, HD, FP1),  # 45 - 40 = 5
        ((99.9, 100), (108, 100), 1, HD, TP),  # 39.96 -> 39 and 43.2 -> 43
        ((99.9, 100), (110, 100), 1, HD, FP1),  # 39.96 -> 39 and 44: 5 apart, although 4.04 before
        ((107.5, 107.5), (100, 100), 2, HD, FP1),  # (43, 43): sqrt(9 + 9) = 4.24
        ((107.4, 107.5), (100, 100), 2, HD, TP),  # (42.96 -> 42, 43): sqrt(4 + 9) = 3.61
        ((110, 100), (100, 100), 3, HD, TP),  # an occluded ball is a ball, and as near as any
        ((112.5, 100), (100, 100), 3, HD, FP1),
        # 1920x1080 to 512x288 is times 4/15; the label (375, 375) becomes (100, 100)
        ((393.7, 375), (375, 375), 1, FULL_HD, TP),  # 104.99 -> 104
        ((393.75, 375), (375, 375), 1, FULL_HD, FP1),  # 105
    ],
)
def test_tracknetv2_and_v3(name, found, truth, visibility, size_wh, expected):
    assert outcome(name, found, truth, visibility, size_wh) == expected


@pytest.mark.parametrize(
    ("found", "truth", "visibility", "expected"),
    [
        ((109.9, 100), (100, 100), 1, TP),  # 43.96 -> 43: 3
        ((110, 100), (100, 100), 1, FP1),  # 44 - 40 = 4 is not below 4
        ((105, 107.5), (100, 100), 3, TP),  # (42, 43): sqrt(4 + 9) = 3.61; an occluded ball is a ball
        ((107.5, 107.5), (100, 100), 1, FP1),  # (43, 43): 4.24
    ],
)
def test_tracknetv5_code(found, truth, visibility, expected):
    assert outcome("tracknetv5-code", found, truth, visibility) == expected


@pytest.mark.parametrize(
    ("found", "truth", "visibility", "expected"),
    [
        # 1280x720 to 768x432 is times 0.6; the label (100, 100) becomes (60, 60)
        ((106.7, 100), (100, 100), 1, TP),  # 64.02 -> 64: 4
        ((106.7, 103.4), (100, 100), 1, TP),  # (64, 62): sqrt(16 + 4) = 4.47, truncated to 4
        ((105, 105), (100, 100), 3, TP),  # (63, 63): 4.24 -> 4; an occluded ball is a ball
        ((105, 106.7), (100, 100), 1, FP1),  # (63, 64): sqrt(9 + 16) = 5
        ((108.3, 100), (100, 100), 1, TP),  # 64.98 -> 64: 4
        ((108.4, 100), (100, 100), 1, FP1),  # 65.04 -> 65: 5
    ],
)
def test_gridtracknet(found, truth, visibility, expected):
    assert outcome("gridtracknet", found, truth, visibility) == expected


@pytest.mark.parametrize(
    ("found", "truth", "visibility", "size_wh", "expected"),
    [
        ((104.99, 100), (100, 100), 1, HD, TP),  # 4.99 < 5
        ((105, 100), (100, 100), 1, HD, FP1),  # 5 is not below 5
        ((103, 104), (100, 100), 2, HD, FP1),  # sqrt(9 + 16) = 5
        ((104.99, 100), (100, 100), 3, HD, TP),  # an occluded ball is a ball
        ((102.4, 100), (100, 100), 1, HALF_HD, TP),  # 640x360 to 1280x720 doubles 2.4 to 4.8
        ((102.5, 100), (100, 100), 1, HALF_HD, FP1),  # 5
        ((107.5, 100), (100, 100), 1, FULL_HD, FP1),  # 7.5 * 2 / 3 = 5
    ],
)
def test_yastrebksv(found, truth, visibility, size_wh, expected):
    assert outcome("yastrebksv", found, truth, visibility, size_wh) == expected


@pytest.mark.parametrize(
    ("found", "truth", "visibility", "expected"),
    [
        # the label (100, 100) becomes (40, 40) at 512x288
        ((112.5, 100), (100, 100), 1, TP),  # 45 - 40 = 5, at most 5
        ((114.9, 100), (100, 100), 1, TP),  # 45.96 -> 45
        ((115, 100), (100, 100), 1, FP1),  # 46: 6
        ((115, 100), (100, 100), 2, FP1),
        ((115, 100), (100, 100), 3, TP),  # 6, but 10 are allowed where the ball is occluded
        ((125, 100), (100, 100), 3, TP),  # 50: 10
        ((127.5, 100), (100, 100), 3, FP1),  # 51: 11
    ],
)
def test_totnet(found, truth, visibility, expected):
    assert outcome("totnet", found, truth, visibility) == expected


@pytest.mark.parametrize("one", PROTOCOLS, ids=lambda one: one.name)
def test_frames_without_a_ball_or_a_detection(one):
    ball_when_occluded = one.name != "wasb"
    assert outcome(one.name, (50, 50), (0, 0), 0) == FP2
    assert outcome(one.name, (0, 0), (0, 0), 0, detected=False) == TN
    assert outcome(one.name, (100, 100), (100, 100), 1, detected=False) == FN  # the place of no detection is not looked at
    assert outcome(one.name, (np.nan, np.nan), (100, 100), 2, detected=False) == FN
    assert outcome(one.name, (np.nan, np.nan), (100, 100), 3, detected=False) == (FN if ball_when_occluded else TN)


@pytest.mark.parametrize(
    ("name", "recall"),
    [
        # 6 found, 3 too far off, 1 missed
        *((name, 6 / 7) for name in ("wasb", "tracknetv2", "tracknetv2-x3", "tracknetv3", "tracknetv5-code", "gridtracknet")),
        ("yastrebksv", 6 / 10),
        ("totnet", 6 / 10),
    ],
)
def test_a_ball_whose_detection_is_too_far_off_has_its_place_in_the_recall(name, recall):
    scores = scores_of(protocol(name), Counts(tp=6, fp1=3, fp2=1, tn=2, fn=1))
    assert scores.recall == recall
    assert scores.precision == 6 / 10  # 6 + 3 + 1 detections
    assert scores.f1 == pytest.approx(2 / (1 / recall + 10 / 6))
    assert scores.accuracy == 8 / 13  # 6 + 2 of 13 frames


@pytest.mark.parametrize(
    ("length", "weights"),
    [
        (5, [1, 2, 3, 2, 1]),  # windows 012, 123, 234
        (4, [1, 2, 2, 1]),  # 012, 123
        (3, [1, 1, 1]),  # 012
        (2, [0, 0]),  # no window fits
        (0, []),
    ],
)
def test_x3_counts_a_frame_as_often_as_windows_of_3_hold_it(length, weights):
    assert frame_weights(protocol("tracknetv2-x3"), length).tolist() == weights


def test_x3_adds_up_its_frames_by_their_weights():
    outcomes = np.array([TP, FP1, FN, FP2, TN], np.int8)
    weights = frame_weights(protocol("tracknetv2-x3"), 5)
    assert counts_of(outcomes, weights) == Counts(tp=1, fp1=2, fn=3, fp2=2, tn=1)
    assert counts_of(outcomes) == Counts(1, 1, 1, 1, 1)


@pytest.mark.parametrize("one", PROTOCOLS, ids=lambda one: one.name)
def test_every_other_protocol_counts_a_frame_once(one):
    assert one.name == "tracknetv2-x3" or frame_weights(one, 7).tolist() == [1] * 7


def test_a_protocol_is_found_by_its_name_and_a_wrong_name_names_them_all():
    names = ["wasb", "tracknetv2", "tracknetv2-x3", "tracknetv3", "tracknetv5-code", "gridtracknet", "yastrebksv", "totnet"]
    assert [one.name for one in PROTOCOLS] == names
    assert all(protocol(name).name == name for name in names)
    with pytest.raises(ConfigError, match=", ".join(names)) as error:
        protocol("tracknet\nv2")
    assert "\n" not in str(error.value)


def test_every_declaration_names_the_file_it_was_read_in():
    assert all(re.match(r"[\w-]+/[\w-]+ [\w/]+\.py", one.source) for one in PROTOCOLS)


def test_a_training_run_logs_tracknetv2_and_wasb():
    assert [one.name for one in TRAINING_PROTOCOLS] == ["tracknetv2", "wasb"]


def test_v3_and_x3_differ_from_v2_in_name_source_and_window_alone():
    v2 = protocol("tracknetv2")

    def rule(one: Protocol) -> Protocol:
        return replace(one, name="", source="", window=1)

    assert rule(protocol("tracknetv3")) == rule(protocol("tracknetv2-x3")) == rule(v2)


@pytest.mark.parametrize("one", PROTOCOLS, ids=lambda one: one.name)
def test_the_documentation_has_the_rule_as_it_is_declared(one):
    text = (Path(__file__).parents[1] / "docs" / "protocols.md").read_text(encoding="utf-8")
    [row] = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith(f"| `{one.name}` | ") and " px" in line]
    right, measured, coordinates, ball, recall = (cell.strip() for cell in row)
    limit = f"below {one.distance_px} px" if one.strict else f"at most {one.distance_px} px"
    assert right.startswith(limit)
    assert ("truncated" in right) == one.truncate_distance
    assert one.occluded_distance_px is None or f"{one.occluded_distance_px} for visibility 3" in right
    assert measured == ("original picture" if one.size_wh is None else "x".join(map(str, one.size_wh)))
    assert coordinates == ("truncated" if one.truncate else "as they are")
    assert [int(kind) for kind in re.findall(r"\d", ball)] == list(one.ball)
    assert ("FP1" in recall) == one.fp1_in_recall
    assert ("window" in recall) == (one.window > 1)
    repository, file = one.source.split(" ")[:2]
    assert f"[{repository}]" in text
    assert f"`{file.rstrip(',')}`" in text

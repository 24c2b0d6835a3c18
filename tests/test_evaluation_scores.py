"""Scores of planted predictions, counted by hand; and how they look in a terminal."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tracknet.data.index import Clip, ClipIndex, LabelledClip, join_clips
from tracknet.evaluation.detection import Detections, count_by_game
from tracknet.evaluation.predictions import ClipPredictions, Predictions, predictions_of
from tracknet.evaluation.scores import _intervals, score
from tracknet.evaluation.table import scores_table
from tracknet.metrics.protocols import PROTOCOLS, TRACKNETV2, TRACKNETV2_X3, TRAINING_PROTOCOLS, WASB

BALL = 100.0


def clip_of(game: str, name: str, visibility: list[int]) -> LabelledClip:
    clip = Clip(game, name, Path(game) / name, None, (1280, 720), 0, len(visibility))
    return LabelledClip(clip, np.full((len(visibility), 2), BALL, np.float32), np.array(visibility, np.int8))


def answers(*frames: tuple[float | None, float]) -> ClipPredictions:
    """Frames of (px to the right of the ball, or None for no ball; score); where there is none, x, y are empty."""
    x = np.array([math.nan if off is None else BALL + off for off, _ in frames])
    y = np.where(np.isnan(x), math.nan, BALL)
    return ClipPredictions(np.arange(len(frames)), ~np.isnan(x), np.stack([x, y], axis=1), np.array([value for _, value in frames]))


@pytest.fixture
def planted() -> tuple[Predictions, ClipIndex]:
    index = join_clips([clip_of("game1", "Clip1", [1, 1, 2, 0, -1]), clip_of("game2", "Clip1", [3, 0, 1])])
    of_game1 = answers((0, 0.9), (7, 0.8), (30, 0.7), (50, 0.6), (0, 0.95))
    of_game2 = answers((2, 0.9), (None, math.nan), (None, math.nan))
    return Predictions({"game1/Clip1": of_game1, "game2/Clip1": of_game2}), index


def counts(entry: dict) -> tuple[int, ...]:
    return tuple(entry[name] for name in ("tp", "fp1", "fp2", "tn", "fn"))


def test_planted_outcomes_by_game_clip_and_visibility(planted) -> None:
    scores = score(*planted, [TRACKNETV2, WASB])
    assert (scores["clips"], scores["frames"], scores["frames_without_label"]) == (2, 7, 1)
    v2, wasb = scores["protocols"]["tracknetv2"], scores["protocols"]["wasb"]
    assert counts(v2["all"]) == (3, 1, 1, 1, 1)  # 7 px are 2.8 at 512x288
    assert counts(wasb["all"]) == (1, 2, 2, 1, 1)  # below 4 px; the occluded ball is none, and its detection an FP2
    assert counts(v2["games"]["game1"]) == counts(v2["clips"]["game1/Clip1"]) == (2, 1, 1, 0, 0)
    assert counts(v2["games"]["game2"]) == (1, 0, 0, 1, 1)
    assert {kind: counts(entry) for kind, entry in v2["visibility"].items()} == {
        "0": (0, 0, 1, 1, 0),
        "1": (2, 0, 0, 0, 1),
        "2": (0, 1, 0, 0, 0),
        "3": (1, 0, 0, 0, 0),
    }
    assert v2["all"]["precision"] == pytest.approx(3 / 5)
    assert v2["all"]["recall"] == pytest.approx(3 / 4)
    assert v2["all"]["f1"] == pytest.approx(2 / 3)
    assert v2["all"]["error_px"]["median"] == 2  # of 0, 7 and 2 px, in the original
    assert wasb["all"]["error_px"] == {"median": 0, "p90": 0}
    assert v2["declaration"]["size_wh"] == (512, 288)


def test_average_precision_ranks_by_score(planted) -> None:
    # by score: 0.9 right, 0.9 right, 0.8 right, 0.7 wrong, 0.6 wrong; five balls, two of them never found
    assert score(*planted, [TRACKNETV2])["protocols"]["tracknetv2"]["all"]["ap"] == pytest.approx(3 / 5)


def test_no_average_precision_where_a_claimed_ball_has_no_score(planted) -> None:
    predictions, index = planted
    predictions.clips["game1/Clip1"].score[1] = math.nan
    found = score(predictions, index, [TRACKNETV2])["protocols"]["tracknetv2"]
    assert found["all"]["ap"] is found["games"]["game2"]["ap"] is None
    assert counts(found["all"]) == (3, 1, 1, 1, 1)


def test_invisible_frames_rank_too_and_change_no_count(planted) -> None:
    predictions, index = planted
    before = score(predictions, index, [TRACKNETV2])["protocols"]["tracknetv2"]["all"]
    clip = predictions.clips["game2/Clip1"]
    clip.xy_px[2], clip.score[2] = BALL, 0.1  # the ball that was not claimed
    after = score(predictions, index, [TRACKNETV2])["protocols"]["tracknetv2"]["all"]
    assert counts(after) == counts(before)
    assert after["ap"] == pytest.approx(3 / 5 + 1 / 5 * 4 / 6)


def test_three_times_each_frame_but_at_the_ends(planted) -> None:
    found = score(*planted, [TRACKNETV2_X3])["protocols"]["tracknetv2-x3"]
    # game1: frames 0 to 3 weigh 1, 2, 3, 2; game2 is one window, each frame once
    assert counts(found["all"]) == (1 + 2 + 1, 3, 2, 1, 1)


def test_x3_ranks_and_measures_by_the_weights() -> None:
    index = join_clips([clip_of("game1", "Clip1", [1, 1, 1, 1, 1])])
    found = Predictions({"game1/Clip1": answers((0, 0.9), (50, 0.8), (1, 0.7), (None, math.nan), (None, math.nan))})
    entry = score(found, index, [TRACKNETV2_X3])["protocols"]["tracknetv2-x3"]["all"]
    # weights 1, 2, 3, 2, 1: nine balls; precision 1/1, then 4/6: 1/9 * 1 + 3/9 * 4/6
    assert entry["ap"] == pytest.approx(1 / 9 + 3 / 9 * 4 / 6)
    assert entry["error_px"]["median"] == 1  # of 0, 1, 1, 1


def test_a_protocol_that_counts_no_frame_has_no_score() -> None:
    index = join_clips([clip_of("game1", "Clip1", [1, 1]), clip_of("game2", "Clip1", [1, 1, 1])])
    found = score(Predictions({"game1/Clip1": answers(*[(0, 0.9)] * 2), "game2/Clip1": answers(*[(0, 0.9)] * 3)}), index, [TRACKNETV2_X3])
    entry = found["protocols"]["tracknetv2-x3"]["games"]["game1"]
    assert counts(entry) == (0, 0, 0, 0, 0)
    assert {entry[name] for name in ("precision", "recall", "f1", "accuracy", "ap", "error_px")} == {None}
    assert " - " in scores_table(found)


def test_a_draw_in_which_a_score_is_not_defined_does_not_count_as_0() -> None:
    found = _intervals(TRACKNETV2, np.array([[50, 0, 0, 0, 0], [0, 0, 0, 30, 0]]), 0)
    assert found == {"f1": [1, 1], "precision": [1, 1], "recall": [1, 1]}


def test_the_scores_are_those_of_training(planted) -> None:
    rng = np.random.default_rng(3)
    index = join_clips([clip_of("game1", "Clip1", rng.integers(-1, 4, 60).tolist()), clip_of("game2", "Clip1", [1] * 30)])
    xy = np.round(BALL + rng.normal(0, 6, (90, 2)), 3)
    detections = Detections(np.arange(90), xy, np.round(rng.random(90), 6))
    scores = score(predictions_of(index, detections, 0.4), index, TRAINING_PROTOCOLS)
    logged = count_by_game(index, detections, 0.4)
    for number, protocol in enumerate(TRAINING_PROTOCOLS):
        for game, expected in zip(index.games, logged[number].tolist(), strict=True):
            assert counts(scores["protocols"][protocol.name]["games"][game]) == tuple(expected)


def test_intervals_are_over_clips_hold_the_score_and_come_from_the_seed() -> None:
    rng = np.random.default_rng(1)
    index = join_clips([clip_of("game1", f"Clip{number}", [1] * 20) for number in range(6)] + [clip_of("game2", "Clip1", [1] * 20)])
    detections = Detections(np.arange(140), np.full((140, 2), BALL), np.where(rng.random(140) < np.repeat(rng.random(7), 20), 0.9, 0.1))
    predictions = predictions_of(index, detections, 0.5)
    found = score(predictions, index, [WASB], seed=5)["protocols"]["wasb"]
    for entry in (found["all"], found["games"]["game1"]):
        for name in ("f1", "recall"):
            low, high = entry["intervals"][name]
            assert low < entry[name] < high
    assert found["games"]["game2"]["intervals"]["f1"] is None  # one clip says nothing about another
    assert score(predictions, index, [WASB], seed=5) == score(predictions, index, [WASB], seed=5)
    assert score(predictions, index, [WASB], seed=6)["protocols"]["wasb"]["all"]["intervals"] != found["all"]["intervals"]


def test_all_is_json_without_nan(planted) -> None:
    nothing = Predictions({clip_id: answers(*[(None, math.nan)] * len(clip.frame)) for clip_id, clip in planted[0].clips.items()})
    for predictions in (planted[0], nothing):
        text = json.dumps(score(predictions, planted[1], PROTOCOLS), allow_nan=False)
        assert list(json.loads(text)["protocols"]) == [protocol.name for protocol in PROTOCOLS]


def test_the_table_fits_100_columns_with_many_long_names_and_large_counts() -> None:
    games = [f"a_game_with_a_long_name_{number}" for number in range(11)]
    index = join_clips([clip_of(game, f"Clip{number}", [0, 1, 2, 3] * 4) for game in games for number in (1, 2)])
    detections = Detections(np.arange(len(index)), np.full((len(index), 2), BALL), np.full(len(index), 0.9))
    scores = score(predictions_of(index, detections, 0.5), index, PROTOCOLS)
    for protocol in scores["protocols"].values():
        protocol["all"]["tp"] = 12_345_678
    lines = scores_table(scores).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("totnet ") for line in lines) == 4  # overview, two rows of games, visibility
    assert all(line == line.rstrip() for line in lines)


def test_the_table_says_the_numbers(planted) -> None:
    lines = scores_table(score(*planted, [TRACKNETV2, WASB])).splitlines()
    assert lines[0].split() == ["protocol", "F1", "95", "%", "P", "R", "AP", "px", "TP", "FP1", "FP2", "TN", "FN"]
    assert lines[1].split()[:2] == ["tracknetv2", "66.7"]
    assert lines[1].split()[3:] == ["60.0", "75.0", "60.0", "2.0", "3", "1", "1", "1", "1"]
    at = lines.index("")
    assert lines[at + 1].split() == ["F1", "by", "game", "game1", "game2"]
    assert lines[at + 2].split() == ["tracknetv2", "66.7", "66.7"]


def test_one_game_and_one_clip_need_no_table_of_games() -> None:
    index = join_clips([clip_of("game1", "Clip1", [1, 1])])
    text = scores_table(score(Predictions({"game1/Clip1": answers((0, 0.9), (None, math.nan))}), index, [WASB]))
    assert "by game" not in text
    assert " - " in text.splitlines()[1]  # no interval over one clip

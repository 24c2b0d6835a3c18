"""The detection threshold: counted exactly, chosen by one rule, and kept in each checkpoint's config.json from its evaluation on."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import write_clip
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from stopped_runs import lines_of, train
from test_train import FORMAT_1, arguments, only_run

from tracknet.data.index import Clip, ClipIndex
from tracknet.errors import ConfigError
from tracknet.evaluation.detection import Detections, count_by_game
from tracknet.evaluation.threshold import THRESHOLD_PROTOCOL, THRESHOLDS, choose_threshold, f1_at, threshold_counts
from tracknet.models import TrackNetConfig, TrackNetModel
from tracknet.training.checkpoint import CheckpointError, inspect_checkpoint
from tracknet.training.saved_state import check_saved_state


def labels_and_peaks(seed: int, frames: int = 60) -> tuple[ClipIndex, Detections]:
    """Frames of two sizes, with and without a label or a ball, peaks near and far, scores on and between THRESHOLDS."""
    random = np.random.default_rng(seed)
    sizes, half = [(640, 360), (512, 288)], frames // 2
    clips = tuple(Clip(f"game{n}", "Clip1", Path("x"), None, size, n * half, half) for n, size in enumerate(sizes))
    truth = random.uniform(20, 280, (frames, 2))
    index = ClipIndex(clips, truth.astype(np.float32), random.choice([-1, 0, 1, 2, 3], frames).astype(np.int8))
    row = random.permutation(frames)[: frames - 5]
    score = np.round(random.choice([random.uniform(0, 1, frames), random.integers(0, 101, frames) / 100], axis=0), 6)
    return index, Detections(row, truth[row] + random.normal(0, 4, (len(row), 2)), score[row])


@given(st.integers(0, 10_000))
def test_the_counts_are_those_of_the_evaluation_at_each_threshold(seed: int) -> None:
    index, peaks = labels_and_peaks(seed)
    counts = threshold_counts(index, peaks)
    one_by_one = [count_by_game(index, peaks, float(t), [THRESHOLD_PROTOCOL])[0].sum(axis=0) for t in THRESHOLDS]
    np.testing.assert_array_equal(counts, one_by_one)
    assert counts.dtype == np.int64
    assert {int(row.sum()) for row in counts} == {int((index.visibility[peaks.row] >= 0).sum())}


@given(st.integers(0, 10_000), st.integers(0, 55))
def test_the_counts_of_two_ranks_add_up(seed: int, cut: int) -> None:
    index, peaks = labels_and_peaks(seed)
    parts = [Detections(peaks.row[part], peaks.xy_px[part], peaks.score[part]) for part in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(sum(threshold_counts(index, part) for part in parts), threshold_counts(index, peaks))


def test_a_peak_at_the_threshold_is_a_ball() -> None:
    index = ClipIndex(
        (Clip("game1", "Clip1", Path("x"), None, (512, 288), 0, 99),), np.full((99, 2), 100, np.float32), np.ones(99, np.int8)
    )
    counts = threshold_counts(index, Detections(np.arange(99), np.full((99, 2), 100.0), np.array([k / 100 for k in range(1, 100)])))
    np.testing.assert_array_equal(counts[:, 0], np.arange(99, 0, -1))


def exact_f1(row: NDArray[np.int64]) -> Fraction:
    tp, fp1, fp2, _, fn = (int(value) for value in row)
    return Fraction(2 * tp, 2 * tp + fp1 + fp2 + fn) if tp else Fraction(0)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_no_threshold_has_a_better_f1_than_the_chosen_one(seed: int, largest: int) -> None:
    counts = np.random.default_rng(seed).integers(0, largest + 1, (99, 5))  # small numbers, so that there are many ties
    chosen = choose_threshold(counts)
    if chosen is None:
        assert not counts[:, 0].any()
        return
    (place,) = np.flatnonzero(chosen == THRESHOLDS)
    scores = [exact_f1(row) for row in counts]
    assert scores[place] == max(scores)
    assert f1_at(chosen, counts) == pytest.approx(float(max(scores)), abs=1e-12)


def with_best_at(*places: int) -> NDArray[np.int64]:
    """Counts whose F1 is best at these places, 0 to 98; in other numbers there, but in one ratio."""
    counts = np.tile([1, 1, 1, 1, 1], (99, 1))
    for place in places:
        counts[place] = np.array([7, 0, 2, 5, 1]) * (place % 3 + 1)
    return counts


@pytest.mark.parametrize(
    ("places", "chosen"),
    [
        ([41], 0.42),
        ([10, 11, 12], 0.12),  # the middle
        ([10, 11, 12, 13], 0.12),  # the lower of two
        ([3, 50, 51, 52, 98], 0.52),  # the longest run
        ([3, 4, 60, 61], 0.61),  # of equal runs the upper one
        (range(99), 0.5),
    ],
)
def test_ties_go_to_the_middle_of_the_longest_run(places: list[int], chosen: float) -> None:
    assert choose_threshold(with_best_at(*places)) == chosen


def test_where_no_ball_is_found_nothing_is_chosen() -> None:
    assert choose_threshold(np.tile([0, 5, 5, 5, 5], (99, 1))) is None
    assert choose_threshold(np.zeros((99, 5), np.int64)) is None


# In training

SETTINGS = [
    "data.preprocess.resize=[128,96]",  # of which a pixel is 4 of the protocol's, so that a tiny network finds balls
    "model.heatmap.size=[128,96]",
    "training.epochs=6",
    "training.evaluation.every_epochs=3",
    "training.checkpoint.every_steps=2",
    "training.checkpoint.keep_last=100",
    "training.optimizer.lr=2e-2",
    "training.ema_decay=0",
    "training.tracking.previews=0",
]
EVALUATED = (15, 30)  # of 5 steps an epoch


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("footage")
    for game in ("game1", "game2"):
        write_clip(root / game / "Clip1", count=20, size_wh=(128, 96))
    return root


@pytest.fixture(scope="module")
def output(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that finds balls at its evaluations, with all its checkpoints."""
    output = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKNET_CACHE_DIR", str(output / "cache"))
        train(arguments(footage, output, *SETTINGS))
    return output


def saved_config(output: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((only_run(output / "checkpoints") / f"step-{step:08d}" / "config.json").read_text())
    return found


def card(output: Path, step: int) -> str:
    return (only_run(output / "checkpoints") / f"step-{step:08d}" / "README.md").read_text()


def test_each_evaluation_chooses_a_threshold_and_each_checkpoint_has_the_last_one(output: Path) -> None:
    evaluations = {line["step"]: line for line in lines_of(output) if "val/f1_wasb" in line}
    assert tuple(evaluations) == EVALUATED
    for step in (*range(0, 31, 2), 15):
        chosen, origin = saved_config(output, step)["detection"], saved_config(output, step)["trained_on"]
        games = {"train_games": ["game1"], "val_games": ["game2"]}
        assert origin == {"data": "tennis", "licence": None, **games, "started_from": [], "step": step}
        last = max((evaluated for evaluated in EVALUATED if evaluated <= step), default=None)
        if last is None:
            assert chosen is None
            assert "No threshold was chosen" in card(output, step)
            continue
        metrics = evaluations[last]
        assert chosen == {
            "threshold": metrics["val/best_threshold"],
            "protocol": "tracknetv2",
            "f1": metrics["val/f1_at_best_threshold"],
            "games": ["game2"],
            "frames": 20,
            "step": last,
        }
        assert chosen["f1"] >= max(metrics["val/f1_tracknetv2"], 1e-9)
        assert ("model-index" in card(output, step)) == (step == last)
        assert ("were not evaluated themselves" in card(output, step)) == (step != last)


def test_a_run_that_was_stopped_between_evaluations_ends_with_the_same_texts(footage: Path, output: Path, tmp_path: Path) -> None:
    launch = arguments(footage, tmp_path, *SETTINGS)
    train(launch, stop_after=17)
    assert saved_config(tmp_path, 17)["detection"]["step"] == 15
    train([*launch, "--resume"])
    for step in (14, 16, 18, 30):
        for name in ("config.json", "README.md"):
            own, whole = (only_run(folder / "checkpoints") / f"step-{step:08d}" / name for folder in (tmp_path, output))
            assert own.read_bytes() == whole.read_bytes(), own
    assert lines_of(tmp_path) == lines_of(output)


def test_a_run_that_starts_from_a_model_takes_its_past_along_and_not_its_threshold(footage: Path, output: Path, tmp_path: Path) -> None:
    """And a run that goes on keeps its own, whatever has become of the model by then."""
    folder = tmp_path / "start"
    shutil.copytree((only_run(output / "checkpoints") / "last").resolve(), folder, ignore=lambda *_: ["manifest.json"])
    fields = json.loads((folder / "config.json").read_text())
    before = {"data": "tennis", "licence": "by word of mouth", "train_games": ["game0", "game2"], "val_games": ["game1"]}
    fields |= {"pretrained": "somebody/weights", "trained_on": before | {"step": 9, "started_from": [None]}}
    (folder / "config.json").write_text(json.dumps(fields))
    assert saved_config(output, 30)["detection"] is not None
    launch = arguments(footage, tmp_path, *SETTINGS, "training.max_steps=2", f"training.init_from={folder}")
    train(launch, stop_after=1)
    log = (only_run(tmp_path / "logs") / "train.log").read_text()
    assert log.count("its weights were trained on game2, which data.split.val_games has now") == 1
    assert log.index("were trained on game2") < log.index("step 1/")
    shutil.rmtree(folder)
    train([*launch, "--resume"])
    for step in (0, 1, 2):
        assert saved_config(tmp_path, step)["trained_on"]["started_from"] == [None, before]
        assert saved_config(tmp_path, step)["pretrained"] == "somebody/weights"
        assert "license: other" in card(tmp_path, step)
        assert "by word of mouth (`tennis`)" in card(tmp_path, step)
    assert saved_config(tmp_path, 0)["detection"] is None
    assert saved_config(tmp_path, 1)["detection"] is None
    assert saved_config(tmp_path, 1)["trained_on"]["step"] == 1


# What others may have written


def test_a_folder_from_before_there_were_thresholds_loads() -> None:
    (folder,) = FORMAT_1.glob("run-*/step-*")
    config = TrackNetModel.from_pretrained(folder).config
    assert (config.detection, config.trained_on, config.pretrained) == (None, None, None)


SOUND = {"threshold": 0.4, "protocol": "tracknetv2", "f1": 0.9, "games": ["game1"], "frames": 3, "step": 1}
UNSOUND = [
    0.4,
    {},
    SOUND | {"threshold": 1.0},
    SOUND | {"threshold": "0.4"},
    SOUND | {"f1": 2.0},
    SOUND | {"games": [1]},
    SOUND | {"step": -1},
    SOUND | {"frames": True},
    SOUND | {"games": []},
    SOUND | {"protocol": "wasb\n# x"},
    SOUND | {"threshold": True},
    SOUND | {"more": 1},
    {key: value for key, value in SOUND.items() if key != "frames"},
]


@pytest.mark.parametrize("value", UNSOUND)
def test_a_threshold_that_is_none_is_one_clear_line(value: object, output: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: detection is .*; set it to null, or train again$") as caught:
        TrackNetConfig(detection=value)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    info = inspect_checkpoint(only_run(output / "checkpoints") / "last")
    info.state["detection"] = value
    with pytest.raises(CheckpointError, match=r"state\.json: its detection is not that of a run"):
        check_saved_state(info)
    for sound in (SOUND, SOUND | {"f1": 1}):
        assert TrackNetConfig(detection=sound).detection == sound

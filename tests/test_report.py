"""The page about a run: what it reads, which frames it shows, and what a browser makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import Seen, open_page
from test_train import arguments, only_run

from tracknet.data.index import Clip, ClipIndex
from tracknet.errors import UserError
from tracknet.evaluation.detection import Detections
from tracknet.metrics.outcomes import count_outcomes
from tracknet.metrics.protocols import PROTOCOLS, TRACKNETV2
from tracknet.report.charts import POINTS, _thinned
from tracknet.report.gallery import OUTCOMES, judge, worst
from tracknet.report.history import Series, read_history
from tracknet.scripts.report import main
from tracknet.scripts.train import main as train

READABLE_PX = 11
PHONE_WIDTH, DESK_WIDTH = 375, 1200


@pytest.fixture(scope="module")
def run_folder(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a whole run of three evaluations."""
    output = tmp_path_factory.mktemp("run")
    assert train(arguments(clips, output)) == 0
    return only_run(output / "logs")


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Path:
    assert main([str(run_folder)]) == 0
    return run_folder / "report.html"


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    """The run's folder, to be damaged."""
    return shutil.copytree(run_folder, tmp_path / "logs" / run_folder.name, ignore=shutil.ignore_patterns("report.html"))


@pytest.mark.parametrize("width", [PHONE_WIDTH, DESK_WIDTH])
def test_a_browser_shows_the_whole_page_from_the_disk(page: Path, tmp_path: Path, width: int) -> None:
    seen: Seen = open_page(page, tmp_path, width)
    assert seen.console == []
    assert (seen.pictures > 9, seen.broken) == (True, 0)
    assert seen.width <= width == seen.window  # nothing to push sideways
    assert seen.smallest >= READABLE_PX


def test_the_page_asks_nothing_of_the_network_or_the_disk(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in ('src="http', "src='http", "url(http", "@import", 'src="/', "<script", "file:"):
        assert link not in text


def test_the_page_has_the_scores_of_every_game_and_protocol(page: Path, run_folder: Path) -> None:
    text, scores = page.read_text(encoding="utf-8"), json.loads((run_folder / "evaluation" / "scores.json").read_text())
    for protocol in PROTOCOLS:
        found = scores["protocols"][protocol.name]
        assert f"{found['all']['f1']:.3f}" in text
        assert protocol.source.split()[0] in text
    assert "game2" in text
    verdicts = scores["protocols"]["tracknetv2"]["all"]
    for kind in ("fp1", "fp2", "fn"):
        if verdicts[kind]:
            assert f"{kind.upper()} ({verdicts[kind]})" in text


def test_without_its_data_the_page_has_curves_and_scores(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy / "config.yaml"
    gone = copy / "gone"
    root = next(line for line in config.read_text().splitlines() if line.strip().startswith("root:"))
    config.write_text(config.read_text().replace(root, f"  root: {gone}"))
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    assert main([str(copy)]) == 0
    assert str(gone) in capsys.readouterr().err
    text = (copy / "report.html").read_text()
    assert "Training loss" in text
    assert "There are no scores" in text
    assert "The worst frames" not in text


def test_torn_lines_and_numbers_that_are_none_are_left_out_and_told(copy: Path) -> None:
    before = read_history(copy)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "train/loss": null, "train/lr": 0.5}\n{"step": 101, "train/lo')
    history = read_history(copy)
    assert history.torn_lines == before.torn_lines + 1
    assert len(history.series("train/loss")) == len(before.series("train/loss"))
    assert history.series("train/lr").step[-1] == 100
    assert (np.diff(history.series("train/lr").step) > 0).all()


@pytest.mark.parametrize("lacks", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_one_line(copy: Path, lacks: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / lacks).unlink()
    assert main([str(copy)]) == 1
    line = capsys.readouterr().err
    assert lacks in line
    assert line.count("\n") == 1
    assert not (copy / "report.html").exists()


HALF = {"protocols": {"wasb": {"all": {}}}, "games": ["game2"], "notes": [], "frames": 1, "clips": 1}


@pytest.mark.parametrize("content", ["", "[]", '{"protocols": 1}', "{", '{"protocols": {}, "games": []}', json.dumps(HALF)])
def test_scores_that_are_none_are_one_line(copy: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "evaluation").mkdir(exist_ok=True)
    (copy / "evaluation" / "scores.json").write_text(content)
    (copy / "evaluation" / "predictions.csv").unlink(missing_ok=True)
    assert main([str(copy), "--evaluation", str(copy / "evaluation")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "scores.json: is not what this version" in line
    assert not (copy / "report.html").exists()


def test_the_folder_that_one_stands_in_is_a_run_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    assert main(["."]) == 0
    assert copy.name in (copy / "report.html").read_text()


def test_an_evaluation_that_fails_for_want_of_room_makes_no_page(
    run_folder: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run_folder, small_disk / run_folder.name, ignore=shutil.ignore_patterns("report.html", "evaluation", "previews"))
    (small_disk / "filler").write_bytes(bytes(small_disk_room(small_disk)))
    assert main([str(copy), "--output", str(run_folder.parent / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not (run_folder.parent / "page.html").exists()


def test_a_full_disk_leaves_no_page(run_folder: Path, page: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "filler").write_bytes(bytes(small_disk_room(small_disk)))
    assert main([str(run_folder), "--output", str(small_disk / "page.html")]) == 1
    assert "cannot write" in (line := capsys.readouterr().err)
    assert "--output" in line
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def small_disk_room(disk: Path) -> int:
    """All but 16 kB of what is free."""
    return shutil.disk_usage(disk).free - 2**14


def test_a_page_without_metrics_is_refused(copy: Path) -> None:
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics yet"):
        read_history(copy)


def one_clip(visibility: list[int]) -> ClipIndex:
    count = len(visibility)
    clip = Clip("game1", "Clip1", Path("nowhere"), None, (512, 288), 0, count)
    xy_px = np.full((count, 2), 100.0, np.float32)
    return ClipIndex((clip,), xy_px, np.array(visibility, np.int8))


def test_the_worst_frames_come_first_and_neighbours_once() -> None:
    index = one_clip([1] * 20 + [0] * 20 + [-1])
    xy_px = np.full((41, 2), 100.0)
    xy_px[3], xy_px[4], xy_px[12] = (150, 100), (160, 100), (130, 100)
    score = np.full(41, 0.9, np.float32)
    score[25], score[35] = 0.95, 0.99
    visible = np.ones(41, bool)
    visible[[18, 30]] = False
    verdicts = judge(index, Detections(np.arange(41), xy_px, score), visible)
    assert len(verdicts.outcome) == 40  # the one without a label is nobody's mistake
    assert worst(index, verdicts, "FP1", 8).tolist() == [4, 12]
    assert worst(index, verdicts, "FP2", 2).tolist() == [35, 25]
    assert worst(index, verdicts, "FN", 8).tolist() == [18]


def test_verdicts_are_those_of_the_protocol() -> None:
    rng = np.random.default_rng(0)
    index = one_clip(rng.integers(0, 4, 200).tolist())
    xy_px = 100 + rng.normal(0, 4, (200, 2))
    visible = rng.random(200) < 0.7
    verdicts = judge(index, Detections(np.arange(200), xy_px, np.ones(200, np.float32)), visible)
    counts = count_outcomes(TRACKNETV2, xy_px, visible, index.xy_px, index.visibility, (512, 288))
    found = [int((verdicts.outcome == number).sum()) for number in range(len(OUTCOMES))]
    assert found == [counts.tp, counts.fp1, counts.fp2, counts.tn, counts.fn]


def test_a_long_line_is_thinned_to_its_means() -> None:
    count = 12 * POINTS + 5
    thin = _thinned(Series(np.arange(count), np.sin(np.arange(count))))
    assert len(thin) == POINTS
    assert (np.diff(thin.step) > 0).all()
    assert abs(thin.value).max() < 1

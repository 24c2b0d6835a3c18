"""`tracknet.scripts.evaluate`: a small network on tiny clips, the file of any program, several processes, and mistakes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import write_clip
from small_models import small_model

from tracknet.data.frames import FrameStore, cache_root
from tracknet.data.prepare import prepare_clips
from tracknet.evaluation import run
from tracknet.evaluation.detection import Detections
from tracknet.evaluation.predictions import predictions_csv, predictions_of
from tracknet.evaluation.run import notes_on
from tracknet.evaluation.split import Share, read_split
from tracknet.evaluation.threshold import detection_threshold
from tracknet.models import TrackNetConfig, TrackNetModel
from tracknet.scripts.evaluate import main
from tracknet.utils.config.scored import scored_data

SIZE = (96, 64)
LENGTHS = {"game1": (10, 10), "game2": (8, 5)}  # 4 + 4 + 3 + 2 windows of 3 frames: 13, which 2 and 3 do not divide
ALL_GAMES = "data.split.val_games=[game1,game2]"
WINDOWS = 13
THRESHOLD = "0.0214"  # of a network that has learned nothing, about half of the peaks are above it


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for game, lengths in LENGTHS.items():
        for number, length in enumerate(lengths, 1):
            write_clip(folder / game / f"Clip{number}", length, SIZE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model("unet").save_pretrained(folder)
    return folder


def data(root: Path, games: str = ALL_GAMES) -> list[str]:
    return ["--data", "tennis", f"data.root={root}", games, "data.split.train_games=[game3]"]


def evaluate(root: Path, model: Path, output: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(model), *data(root), "--output", str(output), "--batch-size", "2", "--threshold", THRESHOLD, *more]


def refusal(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line that a mistake ends in."""
    assert main(list(arguments)) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err


@pytest.fixture(scope="module")
def alone(root: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    output = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKNET_CACHE_DIR", str(output.parent / "cache"))
        assert main(evaluate(root, model, output)) == 0
    return output


def test_a_model_leaves_predictions_settings_and_scores(alone: Path, model: Path) -> None:
    assert sorted(path.name for path in alone.iterdir()) == ["predictions.csv", "predictions.json", "scores.json"]
    lines = (alone / "predictions.csv").read_text().splitlines()
    assert lines[0] == "game,clip,frame,visible,x,y,score"
    assert len(lines) == 1 + sum(map(sum, LENGTHS.values()))
    assert {line.split(",")[3] for line in lines[1:]} == {"0", "1"}
    settings = json.loads((alone / "predictions.json").read_text())
    assert settings["threshold"] == {"value": float(THRESHOLD), "origin": "given"}
    assert settings["model"]["config"]["architecture"] == "unet_heatmap"
    scores = json.loads((alone / "scores.json").read_text())
    assert set(scores["protocols"]) == {
        *("wasb", "tracknetv2", "tracknetv2-x3", "tracknetv3", "tracknetv5-code", "gridtracknet", "yastrebksv", "totnet")
    }
    for found in scores["protocols"].values():
        if found["declaration"]["window"] == 1:
            assert sum(found["all"][name] for name in ("tp", "fp1", "fp2", "tn", "fn")) == 33  # each frame counts once


def launched(processes: int, root: Path, model: Path, output: Path) -> dict:
    """What several processes write; they share the clips' cache with nobody."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "TRACKNET_CACHE_DIR": str(output / "cache")}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command = [*launcher, "--main_process_port", "0", "-m", "tracknet.scripts.evaluate", *evaluate(root, model, output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1  # one process speaks
    assert "Traceback" not in done.stderr
    return json.loads((output / "scores.json").read_text())


def same_as_alone(processes: int, root: Path, model: Path, output: Path, alone: Path) -> None:
    scores = launched(processes, root, model, output)
    for name in ("predictions.csv", "predictions.json"):
        assert (output / name).read_bytes() == (alone / name).read_bytes()
    assert scores["protocols"] == json.loads((alone / "scores.json").read_text())["protocols"]


class Together:
    """Ranks that are threads of this process: `gather` joins their lists, as that of `Ranks` does."""

    def __init__(self, size: int) -> None:
        self.parts: list[list[Any]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=60)

    def gather(self, rank: int, items: list[Any]) -> list[Any]:
        self.parts[rank] = items
        self.barrier.wait()
        joined = [item for part in self.parts for item in part]
        self.barrier.wait()  # nobody begins the next one before all have read this one
        return joined


@pytest.mark.parametrize("size", [2, 3, 9])  # 9: more ranks than batches
def test_ranks_find_together_what_one_finds_each_frame_once(root: Path, model: Path, alone: Path, size: int) -> None:
    index, _ = read_split(scored_data("tennis", data(root)[2:]), ["game1", "game2"])
    network = TrackNetModel.from_pretrained(model).eval()
    store = FrameStore(cache_root(None), tuple(network.config.input_size))
    prepare_clips(index.clips, store, "stop", (0, 1), lambda items: items)
    together = Together(size)

    def of_rank(rank: int) -> Detections:
        share = Share(rank, size, 0, 1, partial(together.gather, rank))
        return run.detect_split(network, index, store, share=share, batch_size=2)

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(of_rank, range(size)))
    expected = (alone / "predictions.csv").read_text()
    for detections in found:
        assert detections.row.tolist() == list(range(len(index)))
        assert predictions_csv(predictions_of(index, detections, float(THRESHOLD))) == expected


@pytest.mark.slow
def test_two_processes_write_what_one_does(root: Path, model: Path, tmp_path: Path, alone: Path) -> None:
    same_as_alone(2, root, model, tmp_path, alone)


@pytest.mark.slow
def test_three_processes_write_what_one_does(root: Path, model: Path, tmp_path: Path, alone: Path) -> None:
    same_as_alone(3, root, model, tmp_path, alone)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(root: Path, model: Path, tmp_path: Path, alone: Path, threads: int) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert main(evaluate(root, model, tmp_path)) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()


def test_its_own_file_gives_its_own_scores_without_torch(alone: Path, root: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from tracknet.scripts.evaluate import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--predictions", str(alone / "predictions.csv"), *data(root), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    again, first = (json.loads((folder / "scores.json").read_text()) for folder in (tmp_path, alone))
    assert again["protocols"] == first["protocols"]
    assert again["predictions"] == first["predictions"]


def test_perfect_predictions_of_another_program_score_100(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["clip;".replace(";", ",") + "game,frame,visible,y,x,score"]
    for game, lengths in LENGTHS.items():
        for number in range(1, len(lengths) + 1):
            for frame, label in enumerate((root / game / f"Clip{number}" / "Label.csv").read_text().splitlines()[1:]):
                _, _, x, y, _ = label.split(",")
                rows.append(f"Clip{number},{game},{frame},1,{y},{x},")
    file = tmp_path / "theirs.csv"
    file.write_text("\r\n".join(rows))
    assert main(["--predictions", str(file), *data(root), "--protocol", "wasb", "totnet", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["protocols"]
    assert set(found) == {"wasb", "totnet"}
    assert all(entry["all"]["tp"] == 33 and entry["all"]["f1"] == 1 and entry["all"]["ap"] is None for entry in found.values())
    assert "100.0" in capsys.readouterr().out


def test_protocols_end_at_an_override(root: Path, alone: Path, tmp_path: Path) -> None:
    file = str(alone / "predictions.csv")
    arguments = ["--predictions", file, "--output", str(tmp_path), "--data", "tennis", "data.split.train_games=[game3]"]
    assert main([*arguments, "--protocol", "wasb", f"data.root={root}", ALL_GAMES]) == 0
    assert list(json.loads((tmp_path / "scores.json").read_text())["protocols"]) == ["wasb"]


def test_the_test_side_is_scored_and_has_to_be_named(root: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--predictions", str(alone / "predictions.csv"), "--output", str(tmp_path), "--split", "test"]
    assert "data.split.test_games is empty" in refusal(capsys, 2, *here, *data(root))
    games = [*data(root, "data.split.val_games=[game1]"), "data.split.test_games=[game2]"]
    assert main([*here, *games]) == 0
    assert "left out of the file, because not in the split (2): game1/Clip1, game1/Clip2" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["games"] == ["game2"]
    both = "data.split: game1 stands in val_games and in test_games; a game belongs to one side only"
    assert both in refusal(capsys, 2, *here, *data(root), "data.split.test_games=[game1]")


def test_wrong_options_are_one_line(root: Path, model: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, place = str(alone / "predictions.csv"), data(root)
    assert "give either --checkpoint FOLDER or --predictions FILE" in refusal(capsys, 2, *place)
    assert "not both" in refusal(capsys, 2, "--checkpoint", str(model), "--predictions", file, *place)
    assert "exclude each other" in refusal(capsys, 2, "--predictions", file, "--threshold", "0.5", *place)
    assert "protocol 'wasp' does not exist; choose from wasb" in refusal(capsys, 2, "--predictions", file, *place, "--protocol", "wasp")
    assert "did you mean --protocol?" in refusal(capsys, 2, "--predictions", file, "--protocl", "wasb")
    assert "written without dashes: data.root=x" in refusal(capsys, 2, "--predictions", file, "--data.root=x")
    assert "--threshold" in refusal(capsys, 2, "--checkpoint", str(model), "--threshold", "1.5")
    assert "--batch-size" in refusal(capsys, 2, "--checkpoint", str(model), "--batch-size", "0")
    assert "the model's own config.json decides" in refusal(capsys, 2, "--checkpoint", str(model), *place, "data.preprocess.resize=[64,48]")
    assert "the model is trained already" in refusal(capsys, 2, "--checkpoint", str(model), *place, "model.heatmap.size=[64,48]")
    assert "did you mean data.split.val_games?" in refusal(capsys, 2, "--predictions", file, *place, "data.split.val_game=[game1]")
    assert "no folder" in refusal(capsys, 2, "--predictions", file, "data.root=/nowhere")
    assert "game7" in refusal(capsys, 2, "--predictions", file, *place, "data.split.val_games=[game7]")
    assert "cannot be read" in refusal(capsys, 2, "--predictions", str(tmp_path / "none.csv"), *place)
    for option in ("--output", "--predictions", "--checkpoint"):
        assert f"{option}: it is empty" in refusal(capsys, 2, option, "", *place)
    assert "'x' must be a whole number from 0 on" in refusal(capsys, 2, "--predictions", file, "--seed", "x")
    assert "protocol '' does not exist" in refusal(capsys, 2, "--predictions", file, *place, "--protocol", "")


def test_scores_of_a_file_have_their_own_folder_unless_told(
    root: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (alone / "scores.json").read_bytes()
    assert main(["--predictions", str(alone / "predictions.csv"), *data(root), "--protocol", "wasb"]) == 0
    assert (tmp_path / f"outputs/evaluation/{alone.name}-predictions/tennis-val/scores.json").is_file()
    assert (alone / "scores.json").read_bytes() == before


def test_a_wrong_model_is_one_line_and_leaves_nothing(root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"

    def said(folder: Path) -> str:
        line = refusal(capsys, 2, *evaluate(root, folder, output))
        assert not output.exists()
        return line

    assert "not a model folder" in said(tmp_path / "none")
    other = shutil.copytree(model, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"model_type": "vit"}))
    assert "vit" in said(other)
    (other / "config.json").write_text(json.dumps(settings | {"backbone": {"channels": [8, 12, 20], "blocks_per_stage": 1}}))
    assert "do not fit" in said(other)
    (other / "config.json").write_text(json.dumps(settings))
    (other / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    said(other)
    (other / "model.safetensors").unlink()
    assert "no weights" in said(other)


def test_wrong_data_is_one_line(root: Path, model: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.csv"
    short.write_text("".join((alone / "predictions.csv").read_text().splitlines(keepends=True)[:-3]))
    line = refusal(capsys, 1, "--predictions", str(short), *data(root))
    assert "no row for frame 2 of game2/Clip2, which has a label (3 such frames)" in line
    assert not (tmp_path / "scores.json").exists()
    broken = shutil.copytree(root, tmp_path / "broken")
    (broken / "game1" / "Clip1" / "0003.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    assert "0003.png" in refusal(capsys, 1, *evaluate(broken, model, output))
    assert not output.exists()
    assert main([*evaluate(broken, model, output), "data.on_error=skip"]) == 0
    assert "note: clip skipped (data.on_error=skip)" in capsys.readouterr().out
    assert "game1,Clip1," not in (output / "predictions.csv").read_text()


def test_no_room_and_no_folder_for_the_output(
    root: Path, model: Path, alone: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "file").write_text("")
    assert "--output" in refusal(capsys, 1, *evaluate(root, model, small_disk / "file" / "out"))
    (small_disk / "full").write_bytes(b"0" * (small_disk_bytes(small_disk) - 8192))
    line = refusal(capsys, 1, "--predictions", str(alone / "predictions.csv"), *data(root), "--output", str(small_disk))
    assert "No space left on device" in line
    assert sorted(path.name for path in small_disk.iterdir()) == ["file", "full"]


def small_disk_bytes(disk: Path) -> int:
    return shutil.disk_usage(disk).free


def test_out_of_memory_names_the_option(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(run, "detect", fail)
    assert "out of memory with one window in each thread; set OMP_NUM_THREADS" in refusal(
        capsys, 1, *evaluate(root, model, tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_a_network_that_learned_nothing_is_named(root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*evaluate(root, model, tmp_path), "--threshold", "0.9"]) == 0
    assert "WARNING: no peak reaches the threshold 0.9 on 33 frames with a ball" in capsys.readouterr().out
    assert "no peak reaches" in json.loads((tmp_path / "scores.json").read_text())["diagnosis"]


def test_the_model_s_own_threshold_counts_unless_another_is_given(
    root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = shutil.copytree(model, tmp_path / "chosen")
    settings = json.loads((chosen / "config.json").read_text())
    settings["detection"] = {
        "threshold": float(THRESHOLD),
        "protocol": "tracknetv2",
        "f1": 0.5,
        "games": ["game2"],
        "frames": 13,
        "step": 1,
    }
    (chosen / "config.json").write_text(json.dumps(settings))
    plain = ["--checkpoint", str(chosen), *data(root), "--output", str(tmp_path / "out"), "--batch-size", "2"]
    assert main(plain) == 0
    said = capsys.readouterr().out
    assert "note: threshold 0.0214: chosen on game2" in said
    assert "the threshold was chosen on game2, which are scored here" in said
    scores = [json.loads((tmp_path / "out" / "scores.json").read_text())]
    assert main([*plain, "--threshold", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "note: threshold 0.5: given" in said
    assert "the threshold was chosen on" not in said
    scores.append(json.loads((tmp_path / "out" / "scores.json").read_text()))
    assert scores[0]["protocols"]["wasb"]["all"]["fn"] < scores[1]["protocols"]["wasb"]["all"]["fn"]


def test_games_of_the_training_are_said() -> None:
    origin = {"data": "tennis", "licence": None, "train_games": ["a", "b"], "val_games": ["c"], "step": 5}
    config = TrackNetConfig(trained_on=origin)
    limit = detection_threshold(config, None)
    assert limit.value == 0.5
    assert any("the model was trained on b, scored here" in note for note in notes_on(config, limit, ["b", "d"]))
    assert any("may have been selected on c, scored here" in note for note in notes_on(config, limit, ["c"]))
    assert notes_on(config, limit, ["d"]) == ["threshold 0.5: the default; none was chosen for this model"]


def test_frames_are_found_whatever_the_batch_holds(root: Path, model: Path, tmp_path: Path, alone: Path) -> None:
    assert main([*evaluate(root, model, tmp_path), "--batch-size", "5"]) == 0
    one, other = (np.genfromtxt(folder / "predictions.csv", delimiter=",", skip_header=1)[:, 4:] for folder in (tmp_path, alone))
    np.testing.assert_allclose(one, other, atol=2e-3)

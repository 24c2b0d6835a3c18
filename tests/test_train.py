"""Whole runs through the command line, on tiny clips."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_games
from safetensors.torch import load_file
from transformers import AutoModel

from tracknet.errors import UserError
from tracknet.models import TrackNetModel
from tracknet.scripts.train import main
from tracknet.training import validation
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.gradient import SummedLoss
from tracknet.training.snapshot import Snapshot
from tracknet.training.step import TrainingStep
from tracknet.training.tracking import Tracker

FORMAT_1 = Path(__file__).with_name("checkpoint_v1")
MEASURED = {"train/samples_per_s", "train/peak_memory_gb"}  # differ from run to run
GAMES = ["data.split.train_games=[game1]", "data.split.val_games=[game2]"]
TINY = [
    "data.preprocess.resize=[64,48]",
    "data.augment.crop=[32,32]",
    "model.heatmap.size=[32,24]",
    "model.heatmap.sigma=1.5",
    "model.backbone.channels=[4,8]",
    "training.batch_size=4",
    "training.max_steps=0",
    "training.epochs=3",
    "training.evaluation.every_epochs=1",
    "training.scheduler.warmup_epochs=0",
    "training.tracking.log_every_steps=1",
    "training.tracking.previews=2",
    "training.tracking.wandb=disabled",
    "training.early_stopping.patience_evaluations=0",
    "training.data_loader.num_workers=0",
]


def arguments(clips: Path, output: Path, *more: str) -> list[str]:
    names = ["--data", "tennis", "--model", "unet", "--training", "tennis", "--output-dir", str(output)]
    return [*names, f"data.root={clips}", *GAMES, *TINY, *more]


def command(clips: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tracknet.scripts.train", *arguments(clips, output, *more)]


def only_run(folder: Path) -> Path:
    (run,) = folder.glob("run-*")
    return run


def metrics_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (only_run(output / "logs") / "metrics.jsonl").read_text().splitlines()]


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def losses_of(output: Path) -> list[float]:
    return [line["train/loss"] for line in metrics_of(output) if "train/loss" in line]


def test_a_run_leaves_metrics_pictures_and_a_model_that_loads(clips, tmp_path):
    assert main(arguments(clips, tmp_path)) == 0
    run, checkpoints = only_run(tmp_path / "logs"), only_run(tmp_path / "checkpoints")
    assert run.name == checkpoints.name
    evaluations = [line for line in metrics_of(tmp_path) if "val/f1_tracknetv2" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    for protocol in ("tracknetv2", "wasb"):
        for place in ("val", "val/game2"):
            last = evaluations[-1]
            assert 0 <= last[f"{place}/f1_{protocol}"] <= 1
            assert sum(last[f"{place}/{outcome}_{protocol}"] for outcome in ("tp", "fp1", "fp2", "tn", "fn")) == 20  # each frame once
    assert len(losses_of(tmp_path)) == 12
    assert {path.name for path in run.iterdir()} >= {"metrics.jsonl", "config.yaml", "run.json", "train.log", "previews"}
    assert len(list((run / "previews").iterdir())) == 2 * 3
    assert json.loads((run / "run.json").read_text())["launches"][-1]["exit"]["code"] == 0

    assert os.readlink(checkpoints / "last") == "step-00000012"
    best_f1 = max(line["val/f1_tracknetv2"] for line in evaluations)
    best_step = next(line["step"] for line in evaluations if line["val/f1_tracknetv2"] == best_f1)
    assert os.readlink(checkpoints / "best") == f"step-{best_step:08}"
    model = AutoModel.from_pretrained(checkpoints / "best")
    assert isinstance(model, TrackNetModel)
    assert model(torch.zeros(1, 3, 3, 48, 64, dtype=torch.uint8), torch.zeros(1, 3, 48, 64, dtype=torch.uint8)).shape == (1, 3, 24, 32)


def test_the_checkpoint_holds_the_averaged_weights_and_the_raw_ones_beside_them(clips, tmp_path):
    assert main(arguments(clips, tmp_path, "training.ema_decay=0.9")) == 0
    last = only_run(tmp_path / "checkpoints") / "last"
    averaged, raw = load_file(last / "model.safetensors"), load_file(last / "weights.safetensors")
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_memory_for_saving_is_made_once(clips, tmp_path, monkeypatch, ema_decay):
    grow, grown = Snapshot._grow, []
    monkeypatch.setattr(Snapshot, "_grow", lambda *a, **k: grown.append(grow(*a, **k)) or grown[-1])
    assert main(arguments(clips, tmp_path, f"training.ema_decay={ema_decay}", "training.checkpoint.every_steps=3")) == 0
    assert grown == [True] + [False] * 7  # reserved; then before the first step, and after steps 3, 4, 6, 8, 9, 12


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(clips, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([*arguments(clips, tmp_path / name, "training.epochs=1"), "--seed", str(seed)]) == 0
    a, b, c = ((only_run(tmp_path / name / "checkpoints") / "last" / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_run_stopped_by_sigterm_saves_and_goes_on_as_if_it_had_not_been(clips, tmp_path):
    assert main(arguments(clips, tmp_path / "whole", "training.epochs=30", "training.evaluation.every_epochs=30")) == 0
    more = ["training.epochs=30", "training.evaluation.every_epochs=30"]
    log_file = tmp_path / "stopped.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(command(clips, tmp_path / "stopped", *more), stderr=log)
        deadline = time.monotonic() + 120
        while "step 7/" not in log_file.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log_file.read_text()
    stopped_at = state_of(only_run(tmp_path / "stopped" / "checkpoints") / "last")["position"]["step"]
    assert 7 <= stopped_at < 120

    assert main([*arguments(clips, tmp_path / "stopped", *more), "--resume"]) == 0
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    whole, resumed = (only_run(tmp_path / name / "checkpoints") / "last" for name in ("whole", "stopped"))
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert (whole / "optimizer.safetensors").read_bytes() == (resumed / "optimizer.safetensors").read_bytes()


def test_a_stop_at_an_evaluation_loses_nothing(clips, tmp_path, monkeypatch):
    assert main(arguments(clips, tmp_path / "whole", "training.epochs=4")) == 0
    log = Tracker.log

    def log_and_signal(self, step, metrics):
        log(self, step, metrics)
        if step == 7:  # so the next step, which is to be evaluated, is the last
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_signal)
        assert main(arguments(clips, tmp_path / "stopped", "training.epochs=4")) == 75
    assert metrics_of(tmp_path / "stopped")[-1]["step"] == 8
    assert main([*arguments(clips, tmp_path / "stopped", "training.epochs=4"), "--resume"]) == 0

    def kept(output):
        return [{key: value for key, value in line.items() if key not in MEASURED} for line in metrics_of(output)]

    assert kept(tmp_path / "stopped") == kept(tmp_path / "whole")


def test_a_run_whose_epochs_would_have_another_length_is_not_resumed(clips, tmp_path, capfd):
    assert main(arguments(clips, tmp_path)) == 0
    fewer = tmp_path / "fewer"
    write_games(fewer, ["game1", "game2"], clips=1, count=10)
    assert main([*arguments(fewer, tmp_path, "training.epochs=9"), "--resume"]) == 2
    assert "16 windows of training data and would now have 8" in capfd.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_format_1_goes_on_where_it_stopped(clips, tmp_path, capfd):
    settings = ["training.ema_decay=0.9", "model.backbone.channels=[2,4]"]
    assert main(arguments(clips, tmp_path / "whole", *settings)) == 0
    shutil.copytree(FORMAT_1, tmp_path / "old" / "checkpoints")
    assert main([*arguments(clips, tmp_path / "old", *settings), "--resume"]) == 0
    assert "continuing run-20261124-120004-s42 after step 6" in capfd.readouterr().err
    lines = metrics_of(tmp_path / "old")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(7, 13))
    assert [line["step"] for line in lines if "val/f1_wasb" in line] == [8, 12]
    # of another machine, perhaps, on which sums round otherwise
    np.testing.assert_allclose(losses_of(tmp_path / "old"), losses_of(tmp_path / "whole")[6:], rtol=1e-2)
    np.testing.assert_allclose(
        [line["train/lr"] for line in lines if "train/lr" in line],
        [line["train/lr"] for line in metrics_of(tmp_path / "whole") if "train/lr" in line][6:],
        rtol=1e-12,
    )
    run = only_run(tmp_path / "old" / "checkpoints")
    assert (run / "last" / "manifest.json").exists()
    assert not (run / "step-00000006" / "manifest.json").exists()


def test_two_runs_of_one_second_get_folders_of_their_own(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKNET_TIMESTAMP", "20300102-235959")
    for _ in range(2):
        assert main(arguments(clips, tmp_path, "training.epochs=1")) == 0
    names = ["run-20300102-235959-s42", "run-20300103-000000-s42"]
    for folder in ("logs", "checkpoints"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names


def test_more_patience_continues_a_run_that_stopped_early(clips, tmp_path):
    stopping = ["training.epochs=6", "training.early_stopping.min_delta=2.0"]
    assert main(arguments(clips, tmp_path, *stopping, "training.early_stopping.patience_evaluations=1")) == 0
    assert metrics_of(tmp_path)[-1]["step"] == 8
    assert main([*arguments(clips, tmp_path, *stopping, "training.early_stopping.patience_evaluations=3"), "--resume"]) == 0
    assert metrics_of(tmp_path)[-1]["step"] == 20


def test_resume_auto_starts_afresh_then_says_finished_then_goes_on_when_more_is_asked_for(clips, tmp_path, capfd):
    assert main([*arguments(clips, tmp_path), "--resume", "auto"]) == 0
    assert "starting afresh" in capfd.readouterr().err
    before = sorted(path.name for path in only_run(tmp_path / "checkpoints").iterdir())

    assert main([*arguments(clips, tmp_path), "--resume", "auto"]) == 0
    assert "is finished" in capfd.readouterr().err
    assert sorted(path.name for path in only_run(tmp_path / "checkpoints").iterdir()) == before

    assert main([*arguments(clips, tmp_path, "training.epochs=4"), "--resume", "auto"]) == 0
    assert "training.epochs: 3 -> 4" in capfd.readouterr().err
    assert metrics_of(tmp_path)[-1]["step"] == 16


def test_a_run_that_goes_on_in_another_folder_has_its_best_there(clips, tmp_path):
    assert main(arguments(clips, tmp_path / "first")) == 0
    run = only_run(tmp_path / "first" / "checkpoints")
    assert main([*arguments(clips, tmp_path / "second", "training.epochs=4"), "--resume", str(run)]) == 0
    assert (only_run(tmp_path / "second" / "checkpoints") / "best" / "model.safetensors").exists()


def test_an_earlier_step_that_is_resumed_leaves_no_best_of_the_other_future(clips, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.2, 0.05, 0.06])
    named_scores = validation.named_scores
    monkeypatch.setattr(validation, "named_scores", lambda *a: named_scores(*a) | {"val/f1_tracknetv2": next(scores)})
    assert main(arguments(clips, tmp_path, "training.checkpoint.keep_last=3")) == 0
    run = only_run(tmp_path / "checkpoints")
    assert os.readlink(run / "best") == "step-00000008"
    assert main([*arguments(clips, tmp_path, "training.checkpoint.keep_last=3"), "--resume", str(run / "step-00000004")]) == 0
    assert os.readlink(run / "best") == "step-00000012"
    assert state_of(run / "best")["position"]["best_f1"] == 0.06
    assert [line["val/f1_tracknetv2"] for line in metrics_of(tmp_path) if "val/f1_tracknetv2" in line] == [0.1, 0.05, 0.06]


def test_an_evaluation_that_fails_costs_no_training(clips, tmp_path, monkeypatch, capfd):
    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(validation, "detect", fails)
        assert main(arguments(clips, tmp_path)) == 1
    assert "out of memory in the evaluation, at micro-batches of 1" in capfd.readouterr().err.splitlines()[-1]
    assert main([*arguments(clips, tmp_path, "training.evaluation.batch_size=1"), "--resume"]) == 0
    assert [line["step"] for line in metrics_of(tmp_path) if "val/f1_wasb" in line] == [4, 8, 12]


def test_early_stopping_ends_a_run_that_gets_no_better(clips, tmp_path, capfd):
    stopping = ["training.epochs=50", "training.early_stopping.patience_evaluations=2", "training.early_stopping.min_delta=2.0"]
    assert main(arguments(clips, tmp_path, *stopping)) == 0
    assert "stopping early" in capfd.readouterr().err
    # the first evaluation is the one that none of the next two improves on by 2
    assert metrics_of(tmp_path)[-1]["step"] == 12


def test_fine_tuning_starts_from_the_saved_model(clips, tmp_path):
    assert main(arguments(clips, tmp_path / "first")) == 0
    saved = (only_run(tmp_path / "first" / "checkpoints") / "last").resolve()
    still = ["training.optimizer.lr=1e-12", "training.optimizer.weight_decay=0", "training.epochs=1", "training.ema_decay=0"]
    assert main(arguments(clips, tmp_path / "second", f"training.init_from={saved}", *still)) == 0
    before = load_file(saved / "model.safetensors")
    after = load_file(only_run(tmp_path / "second" / "checkpoints") / "last" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)

    saved.rename(saved.with_name("elsewhere"))  # a run that goes on has its own weights
    more = [f"training.init_from={saved}", *still[:2], "training.epochs=2", "training.ema_decay=0"]
    assert main([*arguments(clips, tmp_path / "second", *more), "--resume"]) == 0


def test_a_damaged_checkpoint_is_not_fine_tuned(clips, tmp_path, capfd):
    assert main(arguments(clips, tmp_path / "first", "training.epochs=1")) == 0
    best = only_run(tmp_path / "first" / "checkpoints") / "best"
    content = bytearray((best / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (best / "model.safetensors").write_bytes(content)
    assert main(arguments(clips, tmp_path / "second", f"training.init_from={best}")) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert "model.safetensors" in said
    assert "damaged" in said


def test_the_backbone_rests_for_the_epochs_asked_for(clips, tmp_path, capfd):
    assert (
        main(arguments(clips, tmp_path, "training.backbone_freeze_epochs=2", "training.ema_decay=0", "training.checkpoint.keep_last=3"))
        == 0
    )
    assert "epoch 2: the backbone trains from here on" in capfd.readouterr().err
    folder = only_run(tmp_path / "checkpoints")
    steps = [load_file(folder / f"step-{step:08}" / "model.safetensors") for step in (4, 8, 12)]
    backbone = [name for name in steps[0] if ".backbone." in name]
    rest = [name for name in steps[0] if ".backbone." not in name and "pixel" not in name]
    assert backbone
    assert rest
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in backbone)
    assert any(not torch.equal(steps[1][name], steps[2][name]) for name in backbone)
    assert any(not torch.equal(steps[0][name], steps[1][name]) for name in rest)


def test_without_the_data_set_one_line_says_where_to_put_it(tmp_path):
    started = subprocess.run(
        [sys.executable, "-m", "tracknet.scripts.train", "--output-dir", str(tmp_path), "data.root=/nowhere/tracknet"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 2
    assert started.stdout == ""
    (line,) = started.stderr.splitlines()
    assert "/nowhere/tracknet" in line
    assert "--data demo --model demo --training demo" in line


def test_broken_data_stops_the_run_before_the_first_step_or_is_skipped_and_counted(tmp_path, capfd):
    root = tmp_path / "clips"
    write_games(root, ["game1", "game2"], clips=2, count=10)
    picture = root / "game1" / "Clip2" / "0003.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert main(arguments(root, tmp_path / "out")) == 1
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert "Clip2/0003.png" in last_line
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))

    assert main(arguments(root, tmp_path / "out", "data.on_error=skip", "training.epochs=1")) == 0
    assert "1 of 4 clips skipped" in capfd.readouterr().err
    assert "Clip2/0003.png" in (only_run(tmp_path / "out" / "logs") / "train.log").read_text()


def test_micro_batches_change_no_weight_beyond_rounding(clips, tmp_path):
    for name, size in (("whole", 0), ("cut", 1)):
        assert main(arguments(clips, tmp_path / name, f"training.micro_batch_size={size}", "training.optimizer.eps=1e-3")) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "cut"), losses_of(tmp_path / "whole"), rtol=1e-5)


def test_saved_config_rebuilds_the_run(clips, tmp_path):
    assert main([*arguments(clips, tmp_path / "first", "training.epochs=1"), "--seed", "7"]) == 0
    config = only_run(tmp_path / "first" / "logs") / "config.yaml"
    assert main(["--config", str(config), "--output-dir", str(tmp_path / "second")]) == 0
    assert losses_of(tmp_path / "second") == losses_of(tmp_path / "first")


def test_an_update_that_failed_is_in_no_checkpoint(clips, tmp_path, monkeypatch, capfd):
    updates = []

    def fails_in_the_last_step_before_an_evaluation(self, closure=None):
        updates.append(self)
        if len(updates) == 4:
            raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", fails_in_the_last_step_before_an_evaluation)
    assert main(arguments(clips, tmp_path)) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("step 4: out of memory in the optimizer's update")
    assert [path.name for path in tmp_path.glob("checkpoints/run-*/step-*")] == ["step-00000000"]


def test_each_phase_of_training_remembers_its_own_micro_batch_size(clips, tmp_path, monkeypatch):
    backward = SummedLoss.backward

    def with_less_room_for_the_whole_model(self, batch, step):
        if len(batch) > (2 if self.model.backbone_frozen else 1):
            raise MemoryError
        return backward(self, batch, step)

    monkeypatch.setattr(SummedLoss, "backward", with_less_room_for_the_whole_model)
    phases = ("training.backbone_freeze_epochs=1", "training.ema_decay=0")
    log = Tracker.log

    def log_and_signal(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_signal)
        assert main(arguments(clips, tmp_path, *phases)) == 75
    assert main([*arguments(clips, tmp_path, *phases), "--resume"]) == 0
    lines = [line for line in metrics_of(tmp_path) if "train/loss" in line]
    assert [line["train/micro_batch_size"] for line in lines] == [2] * 4 + [1] * 8
    assert [line["train/oom_retries"] for line in lines] == [1, 0, 0, 0, 2] + [0] * 7
    state = state_of(only_run(tmp_path / "checkpoints") / "last")
    assert {phase: size["value"] for phase, size in state["micro_batch_sizes"].items()} == {
        "frozen_backbone": 2,
        "whole_model": 1,
        "evaluation": 4,
    }


def let_saves_fail(monkeypatch, steps: set[int]) -> None:
    save = CheckpointStore.save

    def failing(self, step, *rest, **more):
        if step in steps:
            raise UserError(f"the checkpoint of step {step} could not be written: No space left on device")
        return save(self, step, *rest, **more)

    monkeypatch.setattr(CheckpointStore, "save", failing)


def test_a_run_that_cannot_save_does_not_begin(clips, tmp_path, monkeypatch, capfd):
    let_saves_fail(monkeypatch, {0})
    assert main(arguments(clips, tmp_path)) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("the checkpoint of step 0 could not be written")
    assert not (only_run(tmp_path / "logs") / "metrics.jsonl").exists()


def test_a_save_that_fails_in_between_costs_no_run_and_its_score_is_not_the_best(clips, tmp_path, monkeypatch, capfd):
    scores = iter([0.1, 0.9, 0.8])
    named_scores = validation.named_scores
    monkeypatch.setattr(validation, "named_scores", lambda *a: named_scores(*a) | {"val/f1_tracknetv2": next(scores)})
    let_saves_fail(monkeypatch, {8})
    assert main(arguments(clips, tmp_path)) == 0
    assert "ERROR: the checkpoint of step 8 could not be written" in capfd.readouterr().err
    run = only_run(tmp_path / "checkpoints")
    assert os.readlink(run / "best") == os.readlink(run / "last") == "step-00000012"
    assert state_of(run / "best")["position"]["best_f1"] == 0.8


def test_a_last_save_that_fails_ends_the_run_with_its_line(clips, tmp_path, monkeypatch, capfd):
    let_saves_fail(monkeypatch, {12})
    assert main(arguments(clips, tmp_path)) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("the checkpoint of step 12 could not be written")
    assert os.readlink(only_run(tmp_path / "checkpoints") / "last") == "step-00000008"


def test_a_broken_frame_costs_no_step_that_was_made(clips, tmp_path, monkeypatch, capfd):
    step = TrainingStep.__call__

    def with_a_broken_batch(self, batch, number, stop):
        return step(self, UserError("frame 7 is broken") if number == 6 else batch, number, stop)

    monkeypatch.setattr(TrainingStep, "__call__", with_a_broken_batch)
    assert main(arguments(clips, tmp_path)) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "frame 7 is broken"
    assert os.readlink(only_run(tmp_path / "checkpoints") / "last") == "step-00000006"


def test_metrics_that_cannot_be_written_end_the_run_and_cost_no_step(clips, tmp_path, monkeypatch, capfd):
    log = Tracker.log

    def full_disk(self, step, metrics):
        if step == 6:
            raise UserError("cannot write metrics.jsonl: No space left on device")
        log(self, step, metrics)

    monkeypatch.setattr(Tracker, "log", full_disk)
    assert main(arguments(clips, tmp_path)) == 1
    assert "metrics.jsonl" in capfd.readouterr().err.splitlines()[-1]
    assert os.readlink(only_run(tmp_path / "checkpoints") / "last") == "step-00000006"


@pytest.mark.parametrize("stop", ["every_steps", "signal"])
def test_an_update_that_failed_is_in_no_checkpoint_of_any_kind(clips, tmp_path, monkeypatch, capfd, stop):
    update, updates = torch.optim.AdamW.step, []

    def fails_in_the_third(self, closure=None):
        updates.append(self)
        if len(updates) == 3:
            if stop == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            raise MemoryError
        return update(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", fails_in_the_third)
    every = "training.checkpoint.every_steps=3" if stop == "every_steps" else "training.checkpoint.every_steps=0"
    assert main(arguments(clips, tmp_path, every)) == 1
    assert "out of memory in the optimizer's update" in capfd.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.glob("checkpoints/run-*/step-*")] == ["step-00000000"]


def test_a_run_moved_behind_a_link_is_the_same_run(clips, tmp_path):
    assert main(arguments(clips, tmp_path, "training.epochs=1")) == 0
    run = only_run(tmp_path / "checkpoints")
    (tmp_path / "elsewhere").mkdir()
    run.symlink_to(run.rename(tmp_path / "elsewhere" / run.name))
    assert main([*arguments(clips, tmp_path, "training.epochs=2", "training.checkpoint.keep_last=1"), "--resume"]) == 0
    assert os.readlink(run / "best") == "step-00000004"  # F1 is 0 throughout
    assert {path.name for path in run.glob("step-*")} == {"step-00000004", "step-00000008"}


def test_a_copy_of_a_run_is_not_resumed_over_the_run_itself(clips, tmp_path, capfd):
    assert main(arguments(clips, tmp_path, "training.epochs=1")) == 0
    copy = tmp_path / "backup" / only_run(tmp_path / "checkpoints").name
    shutil.copytree(only_run(tmp_path / "checkpoints"), copy, symlinks=True)
    assert main([*arguments(clips, tmp_path, "training.epochs=2"), "--resume", str(copy)]) == 2
    assert "which has checkpoints of its own; give it another --output-dir" in capfd.readouterr().err.splitlines()[-1]

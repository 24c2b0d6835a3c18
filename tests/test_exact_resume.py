"""A run that is stopped anywhere and resumed is the run that was left alone, to the bit."""

import pickle
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import write_games
from stopped_runs import (
    EVERYTHING,
    ROOM,
    arguments_of,
    check_same,
    last_state,
    lines_of,
    noted_keys,
    noting_keys,
    outcome,
    train,
    with_room_for,
)
from test_train import only_run

from tracknet.scripts.train import main
from tracknet.training import validation
from tracknet.training.gradient import SummedLoss

STEPS = 12  # of EVERYTHING
SEEN_AFTER = [0]  # windows, by steps
for _ in range(STEPS // 3):
    SEEN_AFTER += [SEEN_AFTER[-1] + 6, SEEN_AFTER[-1] + 12, SEEN_AFTER[-1] + 16]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 windows to train on, 8 to evaluate."""
    root = tmp_path_factory.mktemp("clips")
    write_games(root, ["game1", "game2"], clips=2, count=10)
    return root


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the undisturbed run with everything comes to, and the order of its windows."""
    output = tmp_path_factory.mktemp("whole")
    with with_room_for(ROOM), noting_keys(output / "keys"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKNET_CACHE_DIR", str(output / "cache"))
        train(arguments_of("vit_heatmap", clips, output, *EVERYTHING))
    return outcome(output) | {"keys": noted_keys(output / "keys")}


def check_as_whole(output: Path, whole: dict[str, Any], what: str) -> None:
    check_same(output, {part: value for part, value in whole.items() if part != "keys"}, what)


def test_the_undisturbed_run_has_all_that_carries_state(whole):
    lines = [line for line in whole["metrics"] if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in whole["metrics"] if "val/f1_wasb" in line] == [3, 6, 9, 12]
    sizes = [line["train/micro_batch_size"] for line in lines]
    assert len({*sizes[:3]}) > 1, "the frozen phase backs off"
    assert any(after > before for before, after in pairwise(sizes[3:])), "the whole model's phase grows again"
    assert sum(line["train/oom_retries"] for line in lines) >= 4
    rates = [line["train/lr"] for line in lines]
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[-1]
    assert whole["state"]["position"]["stale_evaluations"] == 3
    assert whole["state"]["ema_updates"] == STEPS
    assert set(whole["files"]) == {"README.md", "config.json", "model.safetensors", "optimizer.safetensors", "weights.safetensors"}
    assert [len({key for key in whole["keys"] if key[0] == epoch}) for epoch in range(4)] == [16] * 4
    assert len(whole["keys"]) == SEEN_AFTER[-1]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_after_any_step_it_goes_on_to_the_bit_and_reads_no_window_again(step, clips, tmp_path, whole):
    launch = arguments_of("vit_heatmap", clips, tmp_path, *EVERYTHING)
    with with_room_for(ROOM):
        with noting_keys(tmp_path / "before"):
            train(launch, stop_after=step)
        assert lines_of(tmp_path)[-1]["step"] == step
        with noting_keys(tmp_path / "after"):
            train([*launch, "--resume"])
    check_as_whole(tmp_path, whole, f"stopped after step {step}")
    assert noted_keys(tmp_path / "before") == whole["keys"][: SEEN_AFTER[step]]
    assert noted_keys(tmp_path / "after") == whole["keys"][SEEN_AFTER[step] :]


def test_stopped_after_every_step_one_launch_each(clips, tmp_path, whole):
    launch = arguments_of("vit_heatmap", clips, tmp_path, *EVERYTHING)
    with with_room_for(ROOM), noting_keys(tmp_path / "keys"):
        train(launch, stop_after=1)
        for _ in range(STEPS - 1):
            train([*launch, "--resume"], stop_after=1)
        train([*launch, "--resume"])  # the last evaluation
    check_as_whole(tmp_path, whole, "stopped after every step")
    assert noted_keys(tmp_path / "keys") == whole["keys"]


@pytest.mark.parametrize("evaluation", [1, 3])
def test_stopped_inside_an_evaluation_it_evaluates_first(evaluation, clips, tmp_path, whole, monkeypatch):
    launch = arguments_of("vit_heatmap", clips, tmp_path, *EVERYTHING)
    detect, detected = validation.detect, []

    def detect_and_stop(*arguments):
        detected.append(1)
        if len(detected) == 2 * evaluation - 1:  # the first of two batches
            signal.raise_signal(signal.SIGTERM)
        return detect(*arguments)

    with with_room_for(ROOM):
        with monkeypatch.context() as patch:
            patch.setattr(validation, "detect", detect_and_stop)
            assert main(launch) == 75
        assert "val/f1_wasb" not in lines_of(tmp_path)[-1]
        assert lines_of(tmp_path)[-1]["step"] == 3 * evaluation
        train([*launch, "--resume"])
    check_as_whole(tmp_path, whole, f"stopped inside evaluation {evaluation}")


@pytest.mark.parametrize(("workers", "workers_then", "step"), [(2, 2, 4), (0, 2, 5), (2, 0, 6), (2, 1, 1)])
def test_any_number_of_workers_before_and_after(workers, workers_then, step, clips, tmp_path, whole):
    launch = arguments_of("vit_heatmap", clips, tmp_path, *EVERYTHING)
    with with_room_for(ROOM):
        train([*launch, f"training.data_loader.num_workers={workers}"], stop_after=step)
        with noting_keys(tmp_path / "after"):
            train([*launch, f"training.data_loader.num_workers={workers_then}", "--resume"])
    check_as_whole(tmp_path, whole, f"{workers} workers, then {workers_then}")
    assert sorted(noted_keys(tmp_path / "after")) == sorted(whole["keys"][SEEN_AFTER[step] :])


MORE_RUNS = {
    "max_steps in an epoch": ("unet", ["training.max_steps=6", "training.batch_size=4", "training.evaluation.every_epochs=2"], 6),
    "max_steps at its end": ("unet", ["training.max_steps=4", "training.batch_size=4"], 4),
    "drop_last": ("unet", ["training.batch_size=6", "training.data_loader.drop_last=true", "training.epochs=3"], 6),
    "adam": ("unet", ["training.optimizer.name=adam", "training.batch_size=8", "training.epochs=2", "training.ema_decay=0"], 4),
    "sgd": ("unet", ["training.optimizer.name=sgd", "training.optimizer.lr=0.01", "training.batch_size=8", "training.epochs=2"], 4),
    "adadelta": ("unet", ["training.optimizer.name=adadelta", "training.batch_size=8", "training.epochs=2"], 4),
    "a step schedule": ("unet", ["training.scheduler.name=step", "training.scheduler.step_epochs=0.5", "training.epochs=1"], 4),
    "a backbone never trained": ("unet", ["model.backbone.freeze=true", "training.batch_size=8", "training.epochs=2"], 4),
    "convnext, released": ("convnext_fpn_heatmap", ["training.backbone_freeze_epochs=1", "training.batch_size=8", "training.epochs=2"], 4),
    "evaluations seldom, a line seldom": (
        "unet",
        ["training.evaluation.every_epochs=3", "training.epochs=4", "training.batch_size=8", "training.tracking.log_every_steps=1"],
        8,
    ),
}


@pytest.mark.parametrize("name", MORE_RUNS)
def test_other_runs_go_on_to_the_bit(name, clips, tmp_path):
    model, settings, steps = MORE_RUNS[name]
    settings = ["training.ema_decay=0.9", *settings]
    with noting_keys(tmp_path / "keys"):
        train(arguments_of(model, clips, tmp_path / "whole", *settings))
    undisturbed = outcome(tmp_path / "whole")
    assert undisturbed["state"]["position"]["step"] == steps
    for step in (steps // 2, steps - 1):
        launch = arguments_of(model, clips, tmp_path / str(step), *settings)
        with noting_keys(tmp_path / f"keys{step}"):
            train(launch, stop_after=step)
            train([*launch, "--resume"])
        check_same(tmp_path / str(step), undisturbed, f"stopped after step {step}")
        assert noted_keys(tmp_path / f"keys{step}") == noted_keys(tmp_path / "keys")


def test_the_scale_of_fp16_goes_on_to_the_bit(clips, tmp_path, monkeypatch):
    """On a CPU nothing overflows by itself, so two updates are made to."""
    scaler, backward = torch.amp.GradScaler, SummedLoss.backward

    def quickly_growing_scaler(device, enabled):
        return scaler(device, enabled=True, init_scale=1024.0, growth_interval=3)

    def backward_that_overflows(self, batch, step):
        losses = backward(self, batch, step)
        if step in (1, 9):
            next(self.model.parameters()).grad.fill_(float("inf"))
        return losses

    monkeypatch.setattr(torch.amp, "GradScaler", quickly_growing_scaler)
    monkeypatch.setattr(SummedLoss, "backward", backward_that_overflows)
    settings = ["training.ema_decay=0.9", "training.batch_size=4", "training.epochs=3"]
    train(arguments_of("unet", clips, tmp_path / "whole", *settings))
    undisturbed = outcome(tmp_path / "whole")
    assert [line["step"] for line in undisturbed["metrics"] if line.get("train/skipped")] == [2, 10]
    # 512 after update 2, doubled by 5 and by 8, halved by 10, and two good ones since
    assert undisturbed["state"]["scaler"]["scale"] == 1024.0
    assert undisturbed["state"]["scaler"]["_growth_tracker"] == 2
    for step in (1, 2, 4, 7, 9):
        launch = arguments_of("unet", clips, tmp_path / str(step), *settings)
        train(launch, stop_after=step)
        saved = last_state(tmp_path / str(step))["scaler"]
        assert saved["_growth_tracker"] == {1: 1, 2: 0, 4: 2, 7: 2, 9: 1}[step]
        train([*launch, "--resume"])
        check_same(tmp_path / str(step), undisturbed, f"stopped after step {step}")


def test_a_run_trains_saves_and_resumes_without_pickle(clips, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    launch = arguments_of("vit_heatmap", clips, tmp_path, *EVERYTHING)
    train(launch, stop_after=4)
    train([*launch, "--resume"])
    assert lines_of(tmp_path)[-1]["step"] == STEPS
    assert {path.suffix for path in (only_run(tmp_path / "checkpoints") / "last").resolve().iterdir()} == {".json", ".md", ".safetensors"}

"""Resuming: which checkpoint is meant, whether the configuration fits, and the optimizer's way through the file."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import MODEL_TEXTS, NAMES, TENSORS, change_manifest, saved_state
from torch import nn
from torch.optim import Optimizer

from tracknet.errors import ConfigError, UserError
from tracknet.schema.data import DataConfig
from tracknet.schema.model import UnetHeatmapConfig
from tracknet.schema.root import Config
from tracknet.schema.runtime import RuntimeConfig
from tracknet.schema.training import AdadeltaConfig, AdamConfig, AdamWConfig, SgdConfig, TrainingConfig
from tracknet.training.checkpoint import CheckpointError, load_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.optimization import build_optimizer
from tracknet.training.optimizer_state import pack_optimizer, unpack_optimizer
from tracknet.training.resume import check_same_run, find_resume


def config(ckpt_dir: Path, seed: int = 42, names: list[str] = NAMES) -> Config:
    data_name, model_name, training_name = names
    runtime = RuntimeConfig(
        seed=seed,
        project_root="/project",
        output_root="/project/outputs",
        log_dir="/project/outputs/logs",
        ckpt_dir=str(ckpt_dir),
        timestamp="20300101-000000",
        run_id=f"run-20300101-000000-s{seed}",
        data_name=data_name,
        model_name=model_name,
        training_name=training_name,
    )
    return Config(data=DataConfig(), model=UnetHeatmapConfig(), training=TrainingConfig(), runtime=runtime)


def make_run(
    ckpt_dir: Path,
    timestamp: str,
    steps: list[int],
    *,
    seed: int = 42,
    names: list[str] = NAMES,
    finished: bool = False,
    keep_last: int = 9,
) -> Path:
    folder = ckpt_dir / f"run-{timestamp}-s{seed}"
    store = CheckpointStore(folder, keep_last)
    for step in steps:
        state = saved_state(step, names=names, seed=seed, finished=finished and step == steps[-1])
        store.save(step, MODEL_TEXTS, TENSORS, state, best=step == steps[0])
    return folder


def break_file(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


# auto


def test_without_resume_nothing_is_resumed(tmp_path: Path) -> None:
    make_run(tmp_path, "20260101-000000", [1])
    assert find_resume(None, tmp_path, config(tmp_path)) is None


@pytest.mark.parametrize("exists", [True, False])
def test_auto_starts_afresh_where_there_is_nothing_and_says_so(tmp_path: Path, exists: bool, caplog: pytest.LogCaptureFixture) -> None:
    ckpt_dir = tmp_path / "checkpoints"
    if exists:
        ckpt_dir.mkdir()
        (ckpt_dir / "notes.txt").write_text("")
        (ckpt_dir / "run-20260101-000000-s42").mkdir()  # killed before its first checkpoint
    with caplog.at_level(logging.INFO):
        assert find_resume("auto", ckpt_dir, config(ckpt_dir)) is None
    assert f"nothing to resume under {ckpt_dir}: starting afresh" in caplog.messages


def test_auto_takes_the_newest_run_of_the_same_names_and_seed(tmp_path: Path) -> None:
    make_run(tmp_path, "20260101-000000", [7])
    wanted = make_run(tmp_path, "20260102-000000", [1, 2])
    make_run(tmp_path, "20260103-000000", [3], seed=43)
    make_run(tmp_path, "20260104-000000", [4], names=["tracknet", "demo", "fast"])
    make_run(tmp_path, "20260105-000000", [5], names=["demo", "demo", "slow"])
    (tmp_path / "run-20260106-000000-s42").mkdir()
    point = find_resume("auto", tmp_path, config(tmp_path))
    assert point is not None
    assert point.checkpoint == wanted / "step-00000002"
    assert (point.run_id, point.timestamp, point.finished) == ("run-20260102-000000-s42", "20260102-000000", False)
    other = find_resume("auto", tmp_path, config(tmp_path, seed=43))
    assert other is not None
    assert other.run_id == "run-20260103-000000-s43"


def test_a_finished_run_is_said_to_be_finished(tmp_path: Path) -> None:
    make_run(tmp_path, "20260101-000000", [1, 2], finished=True)
    point = find_resume("auto", tmp_path, config(tmp_path))
    assert point is not None
    assert point.finished


def test_auto_goes_back_to_the_newest_good_checkpoint_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, "20260101-000000", [1, 2, 3])
    break_file(run / "step-00000003")
    (run / "step-00000002" / "state.json").unlink()
    point = find_resume("auto", tmp_path, config(tmp_path))
    assert point is not None
    assert point.checkpoint == run / "step-00000001"
    text = caplog.text
    assert "optimizer.safetensors" in text
    assert "state.json" in text
    assert f"going on from {run / 'step-00000001'}" in text


def test_a_last_that_points_nowhere_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, "20260101-000000", [1, 2])
    (run / "last").unlink()
    (run / "last").symlink_to("step-00000009")
    for expected in (2, 2):
        point = find_resume("auto", tmp_path, config(tmp_path))
        assert point is not None
        assert load_checkpoint(point.checkpoint).step == expected
        assert "going on from" in caplog.text
        (run / "last").unlink(missing_ok=True)


def test_checkpoints_overtaken_by_a_resume_at_an_earlier_step_come_after_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000", [2, 4, 8, 6])  # resumed at 4, then saved 6
    point = find_resume("auto", tmp_path, config(tmp_path))
    assert point is not None
    assert point.checkpoint.name == "step-00000006"
    break_file(run / "step-00000006")
    point = find_resume("auto", tmp_path, config(tmp_path))
    assert point is not None
    assert point.checkpoint.name == "step-00000004"


def test_a_run_without_any_good_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = make_run(tmp_path, "20260101-000000", [1])
    newer = make_run(tmp_path, "20260102-000000", [2])
    break_file(newer / "step-00000002")
    point = find_resume("auto", tmp_path, config(tmp_path))
    assert point is not None
    assert point.checkpoint == older / "step-00000001"
    assert str(newer) in caplog.text


def test_a_checkpoint_of_a_newer_format_is_never_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000", [1, 2])
    change_manifest(run / "step-00000002", format_version=99)
    with pytest.raises(UserError, match="format_version 99 is newer"):
        find_resume("auto", tmp_path, config(tmp_path))


# A path


@pytest.mark.parametrize(("path", "step"), [("", 3), ("last", 3), ("best", 1), ("step-00000002", 2), ("step-00000002/", 2)])
def test_a_path_names_a_run_or_a_checkpoint(tmp_path: Path, path: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "20260101-000000", [1, 2, 3], names=["other", "names", "here"])
    monkeypatch.chdir(tmp_path)
    for given in (f"{run}/{path}", f"{run.name}/{path}"):
        point = find_resume(given, tmp_path / "elsewhere", config(tmp_path))
        assert point is not None
        assert point.checkpoint == run / f"step-{step:08d}"
        assert point.run_id == run.name


@pytest.mark.parametrize("path", ["run-20260101-000000-s42/step-00000009", "nowhere", "run-20260101-000000-s42/gone", "empty", "file"])
def test_a_path_that_leads_nowhere_lists_what_exists(tmp_path: Path, path: str) -> None:
    run = make_run(tmp_path, "20260101-000000", [1])
    (run / "gone").symlink_to("step-00000007")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"^--resume {tmp_path / path}: there is no checkpoint; there are {run}$"):
        find_resume(str(tmp_path / path), tmp_path, config(tmp_path))
    with pytest.raises(ConfigError, match=f"none exists under {tmp_path / 'nothing'}"):
        find_resume(str(tmp_path / path), tmp_path / "nothing", config(tmp_path))


def test_many_runs_are_not_all_listed(tmp_path: Path) -> None:
    for day in range(1, 14):
        make_run(tmp_path, f"202601{day:02d}-000000", [1])
    with pytest.raises(ConfigError, match=r"run-20260113.*and 3 older ones$") as caught:
        find_resume(str(tmp_path / "x"), tmp_path, config(tmp_path))
    assert "run-20260103" not in str(caught.value)


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000", [1, 2])
    break_file(run / "step-00000002")
    for path in ("last", "step-00000002"):
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
            find_resume(str(run / path), tmp_path, config(tmp_path))
    (run / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json|state\.json"):
        find_resume(str(run / "step-00000002"), tmp_path, config(tmp_path))


def test_a_checkpoint_outside_of_a_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000", [1])
    (tmp_path / "step-00000001").symlink_to(run / "step-00000001")
    with pytest.raises(CheckpointError, match="name the checkpoint's folder itself"):
        find_resume(str(tmp_path / "step-00000001"), tmp_path, config(tmp_path))
    (run / "step-00000001").rename(tmp_path / "copy")
    with pytest.raises(ConfigError, match="not inside a run's folder"):
        find_resume(str(tmp_path / "copy"), tmp_path, config(tmp_path))


# The same run


def resolved() -> dict[str, Any]:
    return {
        "data": {
            "root": "a",
            "licence": None,
            "split": {"train_games": ["1"]},
            "sequence": {"length": 3},
            "background": "none",
            "preprocess": {"resize": [64, 32]},
        }
        | {"synthetic": None, "augment": {"brightness": 0.1}},
        "model": {"model_name": "unet", "backbone": {"channels": [8], "local_files_only": False, "freeze": False}},
        "training": {
            "epochs": 10,
            "batch_size": 8,
            "ema_decay": 0.0,
            "seed": 1,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "init_from": None,
        }
        | {"data_loader": {"num_workers": 2, "drop_last": False}, "scheduler": {"name": "cosine"}},
        "runtime": {"seed": 5, "run_id": "run-1", "timestamp": "1"},
    }


def changed(key: str, value: Any) -> dict[str, Any]:
    config = resolved()
    *parents, name = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[name] = value
    return config


def test_the_same_configuration_is_the_same_run() -> None:
    assert check_same_run(resolved(), resolved()) == []
    assert check_same_run(resolved(), changed("data.preprocess.resize", (64, 32))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.model_name", "vit_heatmap"),
        ("model.backbone.channels", [8, 16]),
        ("model.backbone.freeze", True),
        ("data.split.train_games", ["1", "2"]),
        ("data.sequence.length", 5),
        ("data.background", "median"),
        ("data.licence", "MIT"),
        ("data.preprocess.resize", [32, 64]),
        ("data.synthetic", {"seed": 0}),
        ("training.optimizer.name", "sgd"),
        ("training.optimizer.lr", 1e-4),
        ("training.ema_decay", 0.99),
        ("training.data_loader.drop_last", True),
        ("training.init_from", "somewhere"),
        ("runtime.seed", 6),
    ],
)
def test_a_setting_that_breaks_the_state_is_refused_with_both_values(key: str, value: Any) -> None:
    old = resolved()
    for part in key.split("."):
        old = old[part]
    with pytest.raises(ConfigError) as caught:
        check_same_run(resolved(), changed(key, value))
    assert f"{key} was {old} and is now {value}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_broken_settings_are_named_at_once() -> None:
    both = changed("training.data_loader.drop_last", True)
    both["data"]["background"] = "median"
    told = r"data\.background was none and is now median; training\.data_loader\.drop_last was False and is now True"
    with pytest.raises(ConfigError, match=told):
        check_same_run(resolved(), both)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("training.epochs", 20, "training.epochs: 10 -> 20"),
        ("training.data_loader.num_workers", 0, "training.data_loader.num_workers: 2 -> 0"),
        ("training.batch_size", 16, "training.batch_size: 8 -> 16"),
        ("data.root", "b", "data.root: a -> b"),
        ("data.augment.brightness", 0.2, "data.augment.brightness: 0.1 -> 0.2"),
        ("model.backbone.local_files_only", True, "model.backbone.local_files_only: False -> True"),
        ("training.scheduler.name", "linear", "training.scheduler.name: cosine -> linear"),
        ("model.new_key", 1, "model.new_key: (absent) -> 1"),
    ],
)
def test_other_changes_are_told(key: str, value: Any, line: str) -> None:
    assert check_same_run(resolved(), changed(key, value)) == [line]


def test_a_run_from_before_the_cache_had_forms_goes_on_with_raw_frames_alone() -> None:
    assert check_same_run(resolved(), changed("data.cache_form", "raw")) == ["data.cache_form: (absent) -> raw"]
    with pytest.raises(ConfigError, match=r"data\.cache_form was \(absent\) and is now jpeg"):
        check_same_run(resolved(), changed("data.cache_form", "jpeg"))


def test_the_decay_may_change_while_averages_stay_on() -> None:
    assert check_same_run(changed("training.ema_decay", 0.9), changed("training.ema_decay", 0.99)) == ["training.ema_decay: 0.9 -> 0.99"]
    with pytest.raises(ConfigError, match=r"training\.ema_decay was 0\.9 and is now 0"):
        check_same_run(changed("training.ema_decay", 0.9), resolved())


def test_the_seed_that_holds_is_compared() -> None:
    assert check_same_run(resolved(), changed("training.seed", 2)) == []  # both had --seed 5
    without = [{key: value for key, value in c.items() if key != "runtime"} for c in (resolved(), changed("training.seed", 2))]
    with pytest.raises(ConfigError, match=r"training\.seed was 1 and is now 2"):
        check_same_run(*without)


def test_what_belongs_to_the_launch_is_not_compared() -> None:
    assert check_same_run(resolved(), changed("runtime.run_id", "run-2")) == []


# The optimizer's state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.norm(self.first(x)).mean((2, 3)))
        return result


def train(model: Net, optimizer: Optimizer, steps: range) -> None:
    """With a schedule, and with a first layer that rests for three steps."""
    for step in steps:
        model.first.requires_grad_(step >= 3)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] / (1 + step)
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 5, 5, generator=generator)).square().sum().backward()
        optimizer.step()


def make_optimizer(model: Net, arguments: Any, lr: float | None = None) -> Optimizer:
    optimizer = build_optimizer(arguments, model.parameters())
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = lr or group["lr"]
    return optimizer


OPTIMIZERS = [
    AdamWConfig(betas=[0.8, 0.9]),
    AdamConfig(weight_decay=0.1),
    SgdConfig(nesterov=True),
    SgdConfig(momentum=0.0),
    AdadeltaConfig(),
]


@pytest.mark.parametrize("arguments", OPTIMIZERS, ids=lambda a: f"{a.name}-{getattr(a, 'momentum', '')}")
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 6])
def test_training_goes_on_bit_for_bit_after_a_checkpoint(tmp_path: Path, arguments: Any, stop: int) -> None:
    model = Net()
    optimizer = make_optimizer(model, arguments)
    train(model, optimizer, range(stop))
    tensors, rest = pack_optimizer(optimizer)
    groups = {"optimizer": tensors, "model": model.state_dict()}
    CheckpointStore(tmp_path, 1).save(stop, MODEL_TEXTS, groups, {"optimizer": rest}, False)
    train(model, optimizer, range(stop, 10))

    checkpoint, other = load_checkpoint(tmp_path / "last"), Net()
    other.load_state_dict(checkpoint.tensors["model"])
    resumed = make_optimizer(other, arguments, lr=123.0)  # the saved learning rates are the ones that count
    train(copy.deepcopy(other), resumed, range(2))  # and whatever state it has gives way
    unpack_optimizer(resumed, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    train(other, resumed, range(stop, 10))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert pack_optimizer(resumed)[1] == pack_optimizer(optimizer)[1]


def test_the_unpacked_state_does_not_share_memory_with_what_it_came_from() -> None:
    model = Net()
    optimizer = make_optimizer(model, AdamWConfig())
    train(model, optimizer, range(5))
    tensors, rest = pack_optimizer(optimizer)
    kept = {name: t.clone() for name, t in tensors.items()}
    other = Net()
    resumed = make_optimizer(other, AdamWConfig())
    unpack_optimizer(resumed, kept, rest)
    train(other, resumed, range(5, 8))
    assert all(torch.equal(kept[name], t) for name, t in tensors.items())
    assert all(t.device.type == "cpu" for name, t in pack_optimizer(resumed)[0].items() if name.endswith(".step"))


def packed(arguments: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = Net()
    optimizer = make_optimizer(model, arguments)
    train(model, optimizer, range(5))
    tensors, rest = pack_optimizer(optimizer)
    return dict(tensors), json.loads(json.dumps(rest))


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    tensors, rest = packed(AdamWConfig())
    wrong: list[tuple[str, dict[str, torch.Tensor], dict[str, Any]]] = [
        ("is of SGD, this run has AdamW", *packed(SgdConfig())),
        ("of 5 parameters, the model has 6", tensors, rest | {"shapes": rest["shapes"][:-1]}),
        (r"parameter 0 .* has shape \[1\], the model's has \[4, 3, 3, 3\]", tensors, rest | {"shapes": [[1], *rest["shapes"][1:]]}),
        (r"0\.exp_avg has shape \[7\]", tensors | {"0.exp_avg": torch.zeros(7)}, rest),
        (r"holds 77\.exp_avg", tensors | {"77.exp_avg": torch.zeros(7)}, rest),
        ("other groups", tensors, rest | {"groups": rest["groups"][:1]}),
    ]
    model = Net()
    optimizer = make_optimizer(model, AdamWConfig())
    train(model, optimizer, range(2))
    before = {name: t.clone() for name, t in pack_optimizer(optimizer)[0].items()}
    for message, bad_tensors, bad_rest in wrong:
        with pytest.raises(UserError, match=message):
            unpack_optimizer(optimizer, bad_tensors, bad_rest)
    assert all(torch.equal(before[name], t) for name, t in pack_optimizer(optimizer)[0].items())

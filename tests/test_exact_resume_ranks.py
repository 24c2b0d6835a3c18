"""Runs of several processes that are stopped and resumed, also by another number of processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from clips import write_games
from stopped_runs import EVERYTHING, arguments_of, check_same, last_state, lines_of, noted_keys, noting_keys, outcome, train
from test_launch_started import free_port
from test_train import arguments, losses_of

PROBE = Path(__file__).with_name("exact_resume_probe.py")
FORMAT_1 = Path(__file__).with_name("checkpoint_v1")
SIX = ["training.batch_size=6"]  # of one process; of two, as many windows a step are THREE
THREE = ["training.batch_size=3"]
TO_THE_END = ["training.early_stopping.patience_evaluations=0", "training.epochs=4", "training.optimizer.eps=1e-3"]
DROPPING = ["training.batch_size=4", "training.data_loader.drop_last=true", "training.epochs=3"]
pytestmark = pytest.mark.slow

STEPS, STOPS = 12, (1, 3, 4, 8, 11)  # in the frozen phase, at an evaluation, after it, in an epoch, before the end


@dataclass(frozen=True)
class Training:
    """One of two processes; what it leaves beside its output is named after it."""

    name: str
    folder: str
    arguments: list[str]
    stop_after: int | None = None
    stopped_rank: str = "0"
    short_of_memory: bool = False
    port: int = 0

    def path(self, rank: int, suffix: str) -> Path:
        return Path(self.folder) / f"{self.name}-{rank}.{suffix}"

    @property
    def log(self) -> str:
        return "\n".join(self.path(rank, "log").read_text() for rank in (0, 1))

    @property
    def codes(self) -> list[int]:
        return [int(self.path(rank, "code").read_text()) for rank in (0, 1)]

    def keys(self) -> list[list[tuple[int, int]]]:
        return [noted_keys(self.path(rank, "keys")) for rank in (0, 1)]


def joined(training: Training, sizes: list[int]) -> list[tuple[int, int]]:
    """The windows in the order of the steps, of which each has so many over both ranks; the first rank has the odd one."""
    first, second = training.keys()
    order: list[tuple[int, int]] = []
    for size in sizes:
        half = (size + 1) // 2
        order += first[:half] + second[: size - half]
        first, second = first[half:], second[size - half :]
    assert not first
    assert not second
    return order


class Folder:
    """Where all the trainings of this module happen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clips, self.longer_clips = path / "clips", path / "longer_clips"
        write_games(self.clips, ["game1", "game2"], clips=2, count=10)  # 16 windows
        write_games(self.longer_clips, ["game1", "game2"], clips=2, count=12)  # 20 windows
        self.trainings: dict[str, Training] = {}

    def vit(self, output: str, *more: str) -> list[str]:
        return arguments_of("vit_heatmap", self.clips, self.path / output, *EVERYTHING, *more)

    def unet(self, output: str, *more: str) -> list[str]:
        return arguments_of("unet", self.longer_clips, self.path / output, *DROPPING, *more)

    def format_1(self, output: str, *more: str) -> list[str]:
        settings = ["training.ema_decay=0.9", "model.backbone.channels=[2,4]", "--resume"]
        return arguments(self.clips, self.path / output, *settings, *more)

    def add(self, name: str, launch: list[str], **options: object) -> None:
        self.trainings[name] = Training(name, str(self.path), launch, port=free_port(), **options)  # type: ignore[arg-type]

    def launch(self) -> None:
        """Runs all that were added on two connected processes."""
        plan = self.path / "plan.json"
        plan.write_text(json.dumps([asdict(training) for training in self.trainings.values()]))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "HF_HOME": str(self.path / "hf"),
            "PYTHONPATH": f"{PROBE.parents[1]}{os.pathsep}{PROBE.parent}",
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
        done = subprocess.run([*launcher, str(PROBE), str(plan)], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr

    def resumed(self, name: str) -> Training:
        """A training that must have come to its end on both ranks."""
        training = self.trainings[name]
        assert training.codes == [0, 0], training.log
        return training


def add_runs_of_two(folder: Folder) -> None:
    folder.add("whole", folder.vit("two", *THREE), short_of_memory=True)
    for number, step in enumerate(STOPS):
        launch = folder.vit(f"two-{step}", *THREE)
        stopped_rank = str(number % 2)
        folder.add(f"stopped-{step}", launch, stop_after=step, stopped_rank=stopped_rank, short_of_memory=True)
        folder.add(f"resumed-{step}", [*launch, "--resume"], short_of_memory=True)


def add_changes_of_number(folder: Folder) -> None:
    one = folder.vit("one", *SIX, *TO_THE_END)
    with noting_keys(folder.path / "one-0.keys"):
        train(one)
    for name, step in (("1-2 same", 4), ("1-2 more", 4)):
        with noting_keys(folder.path / f"{name} before.keys"):
            train(folder.vit(name, *SIX, *TO_THE_END), stop_after=step)
    folder.add("1-2 same", [*folder.vit("1-2 same", *THREE, *TO_THE_END), "--resume"])
    folder.add("1-2 more", [*folder.vit("1-2 more", *SIX, *TO_THE_END), "--resume"])
    for name, step in (("2-1 same", 5), ("2-1 less", 4)):
        folder.add(name, folder.vit(name, *THREE, *TO_THE_END), stop_after=step)
    train(folder.unet("drop_last"), stop_after=4)
    folder.add("drop_last", [*folder.unet("drop_last"), "--resume"])
    shutil.copytree(FORMAT_1, folder.path / "format_1" / "checkpoints")
    folder.add("format_1", folder.format_1("format_1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """All that two processes do here has been done, in one launch."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("ranks")
        patch.setenv("TRACKNET_CACHE_DIR", str(path / "cache"))
        folder = Folder(path)
        add_runs_of_two(folder)
        add_changes_of_number(folder)
        folder.launch()
        yield folder


def test_two_ranks_back_off_together(folder):
    folder.resumed("whole")
    lines = [line for line in lines_of(folder.path / "two") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["train/micro_batch_size"] for line in lines][:6] == [3, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("step", STOPS)
def test_two_ranks_stopped_go_on_to_the_bit(folder, step):
    assert folder.trainings[f"stopped-{step}"].codes == [75, 75]
    resumed = folder.resumed(f"resumed-{step}")
    check_same(folder.path / f"two-{step}", outcome(folder.path / "two"), f"stopped after step {step}")
    sizes = [6, 6, 4] * (STEPS // 3)
    order = joined(folder.trainings["whole"], sizes)
    assert joined(folder.trainings[f"stopped-{step}"], sizes[:step]) == order[: sum(sizes[:step])]
    assert joined(resumed, sizes[step:]) == order[sum(sizes[:step]) :]


def test_two_ranks_go_on_where_one_was_stopped(folder):
    resumed = folder.resumed("1-2 same")
    np.testing.assert_allclose(losses_of(folder.path / "1-2 same"), losses_of(folder.path / "one"), rtol=1e-5)
    order = noted_keys(folder.path / "one-0.keys")
    assert noted_keys(folder.path / "1-2 same before.keys") == order[:22]
    assert joined(resumed, [6, 4, 6, 6, 4, 6, 6, 4]) == order[22:]
    assert "a step now has" not in resumed.log


def test_one_process_goes_on_where_two_were_stopped(folder, monkeypatch, tmp_path, capfd):
    assert folder.trainings["2-1 same"].codes == [75, 75]
    with noting_keys(tmp_path / "keys"):
        train([*folder.vit("2-1 same", *SIX, *TO_THE_END), "--resume"])
    np.testing.assert_allclose(losses_of(folder.path / "2-1 same"), losses_of(folder.path / "one"), rtol=1e-5)
    order = noted_keys(folder.path / "one-0.keys")
    assert joined(folder.trainings["2-1 same"], [6, 6, 4, 6, 6]) == order[:28]
    assert noted_keys(tmp_path / "keys") == order[28:]
    log = capfd.readouterr().err
    assert "training.batch_size: 3 -> 6" in log
    assert "a step now has" not in log


def test_two_ranks_with_a_larger_step_see_each_window_once(folder):
    resumed = folder.resumed("1-2 more")
    assert "a step now has 12 windows where it had 6" in resumed.log
    order = noted_keys(folder.path / "one-0.keys")
    assert noted_keys(folder.path / "1-2 more before.keys") + joined(resumed, [10, 12, 4, 12, 4]) == order
    position = last_state(folder.path / "1-2 more")["position"]
    assert (position["epoch"], position["step"], position["finished"]) == (4, 4 + 5, True)
    rates = [line["train/lr"] for line in lines_of(folder.path / "1-2 more") if "train/lr" in line]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert [line["step"] for line in lines_of(folder.path / "1-2 more") if "val/f1_wasb" in line] == [3, 5, 7, 9]


def test_one_process_with_a_smaller_step_sees_each_window_once(folder, tmp_path, capfd):
    assert folder.trainings["2-1 less"].codes == [75, 75]
    with noting_keys(tmp_path / "keys"):
        train([*folder.vit("2-1 less", *THREE, *TO_THE_END), "--resume"])
    assert "a step now has 3 windows where it had 6" in capfd.readouterr().err
    order = noted_keys(folder.path / "one-0.keys")
    assert joined(folder.trainings["2-1 less"], [6, 6, 4, 6]) + noted_keys(tmp_path / "keys") == order
    position = last_state(folder.path / "2-1 less")["position"]
    assert (position["epoch"], position["step"], position["finished"]) == (4, 4 + 4 + 2 * 6, True)


def test_what_is_left_of_an_epoch_and_less_than_a_step_is_dropped(folder):
    resumed = folder.resumed("drop_last")
    assert "a step now has 8 windows where it had 4" in resumed.log
    keys = joined(resumed, [8] * 4)
    assert [epoch for epoch, _ in keys] == [1] * 16 + [2] * 16
    assert len(set(keys)) == 32
    position = last_state(folder.path / "drop_last")["position"]
    assert (position["epoch"], position["step"], position["finished"]) == (3, 8, True)
    assert [line["step"] for line in lines_of(folder.path / "drop_last") if "val/f1_wasb" in line] == [4, 6, 8]


def test_format_1_is_not_resumed_by_another_number_of_processes(folder):
    refused = folder.trainings["format_1"]
    assert refused.codes == [2, 2]
    assert "Traceback" not in refused.log
    *_, line = refused.path(0, "log").read_text().splitlines()
    assert line.startswith("--resume: the run had 4 steps per epoch and would now have 2; ")
    assert "the same number of processes" in line
    assert not list((folder.path / "format_1" / "logs").glob("*"))

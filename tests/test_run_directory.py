"""The run's folder survives crashes and resumes; text goes to stderr and to train.log."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.errors import UserError
from tracknet.utils import run_directory
from tracknet.utils.logging import setup_logging
from tracknet.utils.run_directory import RunDirectory, git_state, write_atomically


@pytest.fixture
def clean_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tracknet")
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)


def strict_lines(run: RunDirectory) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in run.metrics_file.read_text().splitlines()]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5))
def test_metrics_are_strict_json_and_finite_values_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.append_metrics({"step": 7} | {f"m{i}": value for i, value in enumerate(values)})
    (line,) = strict_lines(run)
    assert line == {"step": 7} | {f"m{i}": value if math.isfinite(value) else None for i, value in enumerate(values)}


@given(
    steps=st.lists(st.integers(0, 30), max_size=12).map(sorted),
    resumed=st.integers(0, 30),
    torn=st.sampled_from([b"", b'{"step": 3, "loss"', b'{"step": 1}', b"\x00\x00\x00", b"\x00\x00\n"]),
)
def test_a_resumed_run_repeats_no_step(tmp_path_factory: pytest.TempPathFactory, steps: list[int], resumed: int, torn: bytes) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    for step in steps:
        run.append_metrics({"step": step, "loss": 0.5})
    if torn:
        with run.metrics_file.open("ab") as file:
            file.write(torn)
    kept = [step for step in steps if step <= resumed]
    assert run.truncate_metrics_after(resumed) == len(steps) - len(kept) + (torn != b"")
    run.append_metrics({"step": resumed + 1, "loss": 0.25})
    assert [line["step"] for line in strict_lines(run)] == [*kept, resumed + 1]


def test_run_info_keeps_each_launch_and_its_exit(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "logs" / "run-x")
    run.record_wandb_id("abcd1234")
    run.write_run_info(run_id="run-x", seed=3, world_size=2, device="cpu")
    run.record_exit(75, "stopped by a signal and saved")
    run.write_run_info(run_id="run-x", seed=3, world_size=1, device="cpu")
    info = json.loads(run.info_file.read_text())
    assert (info["run_id"], info["seed"], info["wandb_id"]) == ("run-x", 3, "abcd1234")
    first, second = info["launches"]
    assert (first["exit"]["code"], first["exit"]["message"], second["exit"]) == (75, "stopped by a signal and saved", None)
    assert (first["world_size"], second["world_size"]) == (2, 1)
    assert "pytest" in first["command"]
    assert first["python"] == ".".join(map(str, sys.version_info[:3]))
    assert first["versions"]["torch"].startswith("2.")
    assert set(first["versions"]) == {"tracknet", "torch", "accelerate", "transformers", "wandb"}


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\x00", b"[]", b"{}", b'{"launches": null}', b"\xff"])
def test_a_damaged_run_info_stands_in_no_runs_way(tmp_path: Path, content: bytes) -> None:
    run = RunDirectory(tmp_path)
    run.info_file.write_bytes(content)
    run.write_run_info(run_id="run-x", seed=3, world_size=1, device="cpu")
    run.record_wandb_id("abcd1234")
    run.record_exit(0, "finished")
    info = json.loads(run.info_file.read_text())
    assert (info["run_id"], info["wandb_id"], len(info["launches"])) == ("run-x", "abcd1234", 1)
    assert (tmp_path / "run.json.broken").read_bytes() == content


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from tracknet.utils.run_directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
run.write_run_info(run_id="run-x", seed=3, world_size=1, device="cpu")
print("ready", flush=True)
step = 0
while True:
    step += 1
    run.append_metrics({"step": step} | {f"name{i}": 0.1 for i in range(400)})
    run.record_wandb_id(f"{step:08}")
    run.mark_preempted(75, "SIGTERM", step)
"""


def test_a_kill_at_any_moment_leaves_a_folder_to_go_on_in(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for trial in range(8):
        killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        assert killed.stdout is not None
        killed.stdout.readline()
        time.sleep(0.01 + 0.007 * trial)
        killed.kill()
        killed.wait()
        killed.stdout.close()
        assert len(run.read_run_info()["launches"]) == trial + 1
        if run.preempted_file.exists():
            assert json.loads(run.preempted_file.read_text())["exit_code"] == 75
        run.clear_preempted()
        run.truncate_metrics_after(10**9)
        assert all(line["step"] for line in strict_lines(run)) if run.metrics_file.exists() else True
    assert not (tmp_path / "run.json.broken").exists()


def test_a_mark_says_why_the_run_stopped_and_how_it_goes_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run-x")
    run.clear_preempted()
    run.mark_preempted(75, "SIGTERM", 123)
    mark = json.loads((tmp_path / "run-x" / "PREEMPTED").read_text())
    assert (mark["signal"], mark["step"], mark["exit_code"]) == ("SIGTERM", 123, 75)
    assert "--resume auto" in mark["go_on"]
    assert datetime.fromisoformat(mark["time"]).tzinfo is not None
    run.clear_preempted()
    assert os.listdir(run.path) == []


def test_what_cannot_be_cleared_or_read_is_one_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "PREEMPTED").mkdir()
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "run.json").mkdir()
    for action in (
        run.clear_preempted,
        lambda: run.truncate_metrics_after(0),
        run.read_run_info,
        lambda: run.mark_preempted(75, "SIGTERM", 1),
    ):
        with pytest.raises(UserError) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_pictures_of_later_steps_go_with_their_metrics(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.previews.mkdir()
    names = ["step-00000010-a.jpg", "step-00000011-a.jpg", "step-123456789-b-c.jpg", "step-x.jpg", "mine.jpg"]
    for name in names:
        (run.previews / name).write_bytes(b"")
    run.truncate_metrics_after(10)
    assert sorted(os.listdir(run.previews)) == ["mine.jpg", "step-00000010-a.jpg", "step-x.jpg"]


def test_git_state_names_the_commit_only_of_tracked_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert git_state(package) is None
    git("init", "-q")
    git("add", "package")
    assert git_state(package) is None  # no commit yet
    git("commit", "-q", "-m", "first")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed = True\n")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    assert git_state(installed) is None


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"cannot write .*config.yaml: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.yaml"]


WRITES: dict[str, Callable[[RunDirectory], object]] = {
    "config": lambda run: run.write_config("seed: 1\n"),
    "metrics": lambda run: run.append_metrics({"step": 1}),
    "info": lambda run: run.write_run_info(run_id="run-x", seed=1, world_size=1, device="cpu"),
    "mark": lambda run: run.mark_preempted(75, "SIGTERM", 1),
    "log": lambda run: setup_logging(True, run.log_file),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, write: str, clean_logger: logging.Logger) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    with pytest.raises(UserError) as caught:
        WRITES[write](RunDirectory(tmp_path / "logs" / "run-x"))
    assert "\n" not in str(caught.value)
    assert "training.log_dir" in str(caught.value)


def test_the_main_rank_shows_all_on_stderr_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logger: logging.Logger
) -> None:
    log_file = tmp_path / "run" / "train.log"
    setup_logging(True, log_file)
    setup_logging(True, log_file).info("hello")  # a second call adds no second copy
    clean_logger.warning("look out")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert [line[9:] for line in seen.err.splitlines()] == ["hello", "WARNING: look out"]
    assert [line.split(" ", 2)[2] for line in log_file.read_text().splitlines()] == ["INFO hello", "WARNING look out"]


def test_other_ranks_show_only_errors_and_who_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    logger = setup_logging(False, tmp_path / "train.log")
    logger.warning("look out")
    logger.error("broken")
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == ["[rank 3] ERROR: broken"]
    assert not (tmp_path / "train.log").exists()


def test_what_stands_at_the_last_step_is_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.metrics_of_last_step() == (-1, frozenset())
    for line in ({"step": 9, "train/loss": 1.0}, {"step": 10, "train/loss": 0.5}, {"step": 10, "val/f1": 0.2}):
        run.append_metrics(line)
    assert run.metrics_of_last_step() == (10, {"step", "train/loss", "val/f1"})


@pytest.mark.skipif(os.name != "posix", reason="elsewhere files have no such mode")
def test_a_file_has_the_usual_mode_and_the_umask_which_all_threads_share_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_umask = os.umask
    before = set_umask(0o027)
    changed: list[int] = []
    monkeypatch.setattr(os, "umask", changed.append)
    try:
        write_atomically(tmp_path / "config.yaml", b"seed: 1\n")
    finally:
        set_umask(before)
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == 0o640
    assert changed == []

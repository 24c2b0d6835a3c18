"""Over kills, stops and resumes W&B gets each step once, in order, and all that metrics.jsonl has."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wandb_files import history_of, wandb_files, wandb_records
from wandb_service import wandb_service

from tracknet.schema.training import TrackingConfig
from tracknet.training.tracking import Tracker
from tracknet.training.wandb_rows import MetricsRows, Reached, Row, Unsent, locally_reached, note_reached, reached_with_note
from tracknet.utils.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
EVALUATE_EVERY = 3


@pytest.fixture(autouse=True)
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B setting of the machine reaches a test."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


LAUNCH = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from tracknet.schema.training import TrackingConfig
from tracknet.training import wandb_thread
from tracknet.training.tracking import Tracker
from tracknet.utils.logging import setup_logging
from tracknet.utils.run_directory import RunDirectory

folder, first, last, evaluates_last, ending = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "evaluated", sys.argv[5]
wandb_thread.STOPPED_SECONDS = wandb_thread.FINISH_SECONDS = 60.0  # for a busy machine
run = RunDirectory(folder)
setup_logging(True, run.log_file)
run.truncate_metrics_after(first)
tracker = Tracker(run, TrackingConfig(wandb=sys.argv[6]), {}, is_main=True, run_id="run-x", wandb_id="abcd1234")

def evaluate(step):
    tracker.log_previews(step, lambda: {"game8": np.full((40, 60, 3), step, np.uint8)})
    tracker.log(step, {"val/f1": 1000 + step, "val/nothing": float("nan")})

if first and first % 10 == 0 and ending.startswith("evaluate"):
    evaluate(first)
for step in range(first + 1, last + 1):
    if step % 2 == 0:
        tracker.log(step, {"train/loss": step, "train/lr": 2000 + step})
    if step % 10 == 0 and (step < last or evaluates_last):
        evaluate(step)
if ending.endswith("kill -9 at once"):
    while run.log_file.read_text().count("kept offline") < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if ending.endswith("kill -9 later"):
    time.sleep(4)
    for step in range(last + 2, last + 8, 2):
        tracker.log(step, {"train/loss": step, "train/lr": 2000 + step})
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish(int(ending.split()[-1]))
"""


def launch(folder: Path, first: int, last: int, ending: str, evaluated: str = "evaluated", mode: str = "offline") -> None:
    command = [sys.executable, "-c", LAUNCH, str(folder), str(first), str(last), evaluated, ending, mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if "kill" in ending else 0), done.stderr
    assert "WARNING" not in done.stderr


def metrics_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def test_the_real_client_gets_all_once_over_stops_and_kills(tmp_path: Path) -> None:
    launch(tmp_path, 0, 30, "exit 75", evaluated="stopped before that")
    launch(tmp_path, 30, 57, "evaluate; kill -9 later")  # beyond its checkpoint of step 40, and W&B has a part of that
    launch(tmp_path, 40, 45, "kill -9 at once")
    launch(tmp_path, 40, 70, "exit 0")

    logs = [history_of(wandb_records(path)) for path in wandb_files(tmp_path)]
    assert len(logs) == 4
    assert {57 > row["step"] > 40 for row in logs[1]} == {True, False}  # else the kill tested nothing
    rows = [row for log in logs for row in log]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    seen = [(name, value) for row in rows for name, value in row.items() if name in ("train/loss", "train/lr", "val/f1")]
    expected = [(name, value) for line in metrics_of(RunDirectory(tmp_path)) for name, value in line.items() if name in dict(seen)]
    assert Counter(seen) == Counter(expected)
    assert {row["step"]: row["val/f1"] for row in rows if "val/f1" in row} == {
        step + (step == 30): 1000 + step for step in range(10, 71, 10)
    }
    assert all(row["train/loss"] == row["step"] for row in rows if "train/loss" in row)
    pictures = {row["step"]: row["previews/game8/path"] for row in rows if "previews/game8/path" in row}
    assert set(pictures) == {10, 20, 31, 40, 50, 60, 70}
    assert len(set(pictures.values())) == 7


def test_a_run_that_had_no_client_gives_it_all_of_its_past(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for mode in ("disabled", "offline"):
        one = Tracker(run, TrackingConfig(wandb=mode), {}, is_main=True, run_id="run-x", wandb_id=None)
        first = 0 if mode == "disabled" else 20
        for step in range(first + 1, first + 21):
            one.log(step, {"train/loss": math.nan if step == 5 else step / 7})
        if mode == "disabled":
            one.log_previews(20, lambda: {"a": np.zeros((4, 4, 3), np.uint8)})
        one.finish(0)
    (path,) = wandb_files(tmp_path)
    rows = history_of(wandb_records(path))
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (step, pytest.approx(math.nan if step == 5 else step / 7, rel=0, nan_ok=True)) for step in range(1, 41)
    ]
    assert "previews/a/path" in rows[19]


def test_what_an_upload_removed_is_not_sent_again(tmp_path: Path) -> None:
    launch(tmp_path, 0, 20, "exit 75")
    (path,) = wandb_files(tmp_path)
    path.unlink()  # as `wandb sync --clean`
    launch(tmp_path, 20, 24, "exit 0")
    (path,) = wandb_files(tmp_path)
    assert [row["step"] for row in history_of(wandb_records(path))] == [22, 24]


@given(cut=st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_file_cut_anywhere_tells_the_last_whole_row(whole_file: bytes, tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "wandb" / "offline-run-1-abcd1234" / "run-abcd1234.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(whole_file[: cut % (len(whole_file) + 1)])
    last = max((row["step"] for row in history_of(wandb_records(path))), default=-1) if path.stat().st_size >= 4 else -1
    assert locally_reached(folder, "abcd1234") == Reached(last)
    assert locally_reached(folder, "other") == Reached()


def test_online_a_killed_launch_goes_on_from_what_the_service_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_service() as service:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", service.address)
        monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
        launch(tmp_path, 0, 57, "kill -9 later", mode="online")
        time.sleep(2)  # the client's own process outlives the kill that long
        had = [row["_step"] for row in service.rows]
        launch(tmp_path, 40, 50, "exit 75", mode="online", evaluated="stopped before that")
        launch(tmp_path, 50, 60, "evaluate; exit 0", mode="online")
    steps = [row["_step"] for row in service.rows]
    assert steps == sorted(set(steps))
    assert 0 < len(had) < len(steps)
    seen = Counter((name, value) for row in service.rows for name, value in row.items() if name in ("train/loss", "train/lr", "val/f1"))
    assert not [pair for pair, times in seen.items() if times > 1]
    lines = metrics_of(RunDirectory(tmp_path))
    assert {(name, value) for line in lines for name, value in line.items() if name in ("train/loss", "train/lr", "val/f1")} <= set(seen)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    one = Tracker(RunDirectory(folder), TrackingConfig(wandb="offline"), {}, is_main=True, run_id="run-x", wandb_id="abcd1234")
    for step in range(1, 400):
        one.log(step, {f"val/metric_{i}": step + i for i in range(10)})
    one.finish(0)
    (path,) = wandb_files(folder)
    return path.read_bytes()


Launch = tuple[int, int, str, int]  # steps back from the last one, steps made, ending, and for a kill how many sent rows W&B kept
launches = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.integers(0, 8),
        st.sampled_from(["kill", "kill at the end", "kill at the end before the evaluation", "end", "end before the evaluation"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


@given(launches=launches, log_every=st.integers(1, 3))
@example(launches=[(0, 3, "kill at the end before the evaluation", 0), (0, 2, "kill", 3)], log_every=1)
@settings(max_examples=150)
def test_no_order_of_kills_and_stops_loses_or_repeats(
    tmp_path_factory: pytest.TempPathFactory, launches: list[Launch], log_every: int
) -> None:
    """A model of the client, which keeps any number of the rows that a killed launch sent; the rest is the real code."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    kept: list[Row] = []
    last = 0
    for back, steps, ending, kept_rows in [*launches, (0, 1, "end of the run", 0)]:
        first = max(0, last - back) if back else last
        last = first + steps
        _log_launch(run, first, last, log_every, stops_before_evaluation="before" in ending)
        sent: list[Row] = []
        rows = MetricsRows(run.metrics_file)
        unsent = Unsent(reached_with_note(max((row.step for row in kept), default=-1), run.path, "abcd1234"))
        for row in rows.closed():
            sent += unsent.of(row)
        if ending == "kill":
            kept += sent[:kept_rows]
            continue
        final = rows.last()
        sent += unsent.of(final) if final else ()
        sent += unsent.rest() if ending == "end of the run" else ()
        if sent:
            note_reached(run.path, "abcd1234", sent[-1], ended=not ending.startswith("kill"))
        kept += sent[:kept_rows] if ending.startswith("kill") else sent
    steps_kept = [row.step for row in kept]
    assert steps_kept == sorted(set(steps_kept))
    seen = Counter((name, value) for row in kept for name, value in row.values.items())
    assert not [pair for pair, times in seen.items() if times > 1]
    assert {(name, value) for line in metrics_if_any(run) for name, value in line.items() if name != "step"} <= set(seen)


def _log_launch(run: RunDirectory, first: int, last: int, log_every: int, *, stops_before_evaluation: bool) -> None:
    run.truncate_metrics_after(first)
    is_evaluated = any("val" in line and line["step"] == first for line in metrics_if_any(run))
    if first > 0 and first % EVALUATE_EVERY == 0 and not is_evaluated:
        run.append_metrics({"step": first, "val": first})
    for step in range(first + 1, last + 1):
        if step % log_every == 0:
            run.append_metrics({"step": step, "train": step})
        if step % EVALUATE_EVERY == 0 and not (stops_before_evaluation and step == last):
            run.append_metrics({"step": step, "val": step})


def metrics_if_any(run: RunDirectory) -> list[dict[str, Any]]:
    return metrics_of(run) if run.metrics_file.exists() else []

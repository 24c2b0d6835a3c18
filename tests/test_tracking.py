"""Metrics and previews reach the run's folder and the real W&B client; a dead W&B service stops and delays nothing."""

import json
import logging
import os
import pty
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from wandb_files import BLOCK, history_of, wandb_files, wandb_records

from tracknet.schema.training import TrackingConfig
from tracknet.training import progress
from tracknet.training.progress import Progress
from tracknet.training.tracking import Tracker
from tracknet.utils.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
CONFIG = {"training": {"seed": 42, "optimizer": {"lr": 1e-3}}}


@pytest.fixture(autouse=True)
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B setting of the machine reaches a test."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def tracker(folder: Path, wandb: str, wandb_id: str | None = None, is_main: bool = True) -> Tracker:
    return Tracker(RunDirectory(folder), TrackingConfig(wandb=wandb), CONFIG, is_main=is_main, run_id="run-x", wandb_id=wandb_id)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own; the client logs into its own file."""
    return [record.getMessage() for record in caplog.records if record.name == "tracknet" and record.levelno >= logging.WARNING]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_offline_run_holds_everything_and_a_resumed_one_continues_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hooks = (sys.exit, sys.excepthook)
    picture = np.full((40, 60, 3), (200, 10, 10), np.uint8)
    first = tracker(tmp_path, "offline")
    for step in (10, 20):
        first.log(step, {"train/loss": 1 / step})
    first.log(20, {"val/f1_tracknetv2": 0.5, "val/nothing": float("nan")})
    first.log_previews(20, lambda: {"game8/Clip1 0012": picture})
    first.finish(0)
    second = tracker(tmp_path, "offline", first.state()["wandb_id"])
    second.log(30, {"train/loss": 1 / 30})
    second.finish(1)

    assert capfd.readouterr().out == ""
    assert (sys.exit, sys.excepthook) == hooks
    assert [child.name() for child in psutil.Process().children() if child.name() == "wandb-core"] == []
    assert [line["step"] for line in metrics_of(tmp_path)] == [10, 20, 20, 30]
    assert metrics_of(tmp_path)[2]["val/nothing"] is None
    (preview,) = (tmp_path / "previews").iterdir()
    assert preview.name == "step-00000020-game8-Clip1-0012.jpg"
    assert np.abs(np.asarray(Image.open(preview), int) - picture).max() < 12

    wandb_id = first.state()["wandb_id"]
    assert wandb_id == second.state()["wandb_id"] == json.loads((tmp_path / "run.json").read_text())["wandb_id"]
    logs = [wandb_records(path) for path in wandb_files(tmp_path)]
    assert len(logs) == 2
    for records, code in zip(logs, (0, 1), strict=True):
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.display_name, run.project) == (wandb_id, "run-x", "tracknet")
        config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
        assert config["training"] == CONFIG["training"]
        assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [code]
    rows = history_of(logs[0]) + history_of(logs[1])
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert [row["train/loss"] for row in rows] == [1 / 10, 1 / 20, 1 / 30]
    assert rows[1]["val/f1_tracknetv2"] == 0.5
    stored = wandb_files(tmp_path)[0].parent / "files" / rows[1]["previews/game8-Clip1-0012/path"]
    assert stored.read_bytes() == preview.read_bytes()


def test_a_file_of_many_blocks_is_read_whole(tmp_path: Path) -> None:
    one = tracker(tmp_path, "offline")
    for step in range(1, 400):
        one.log(step, {f"val/metric_{i}": step + i for i in range(10)})
    one.finish(0)
    (path,) = wandb_files(tmp_path)
    assert path.stat().st_size > 2 * BLOCK
    assert [row["val/metric_9"] for row in history_of(wandb_records(path))] == [step + 9 for step in range(1, 400)]


def test_online_without_a_key_says_how_to_log_in_and_stays_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = tracker(tmp_path, "online")
    one.log(1, {"train/loss": 0.5})
    one.finish(0)
    (warning,) = warnings_of(caplog)
    (path,) = wandb_files(tmp_path)
    assert "wandb login" in warning
    assert f"wandb sync {path.parent}" in warning
    assert [row["train/loss"] for row in history_of(wandb_records(path))] == [0.5]


RUN = """
import signal, sys, time
from pathlib import Path
from tracknet.schema.training import TrackingConfig
from tracknet.training import wandb_thread
from tracknet.training.tracking import Tracker
from tracknet.utils.logging import setup_logging
from tracknet.utils.run_directory import RunDirectory
# Gives up on the service after 2 s; a busy machine may then take its time over the offline run.
if sys.argv[2] != "stop":
    wandb_thread.FINISH_SECONDS, wandb_thread.KILLED_SECONDS = 32.0, 30.0
run = RunDirectory(Path(sys.argv[1]))
setup_logging(True, run.log_file)
def hooks():
    return sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
before = hooks()
tracker = Tracker(run, TrackingConfig(wandb="online"), {}, is_main=True, run_id="run-x", wandb_id=None)
for step in range(1, 101):
    tracker.log(step, {"train/loss": 1 / step})
    time.sleep(0.01)
if sys.argv[2] == "finish":
    tracker.finish(0)
    assert hooks() == before
if sys.argv[2] == "stop":
    began = time.monotonic()
    tracker.finish(75)
    print(time.monotonic() - began)
"""


def started(folder: Path, address: str, ending: str) -> subprocess.Popen[str]:
    key = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "WANDB_BASE_URL": address}
    command = [sys.executable, "-c", RUN, str(folder), ending]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | key, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Address of a service that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_service_hangs_nothing_and_loses_nothing(tmp_path: Path, silent_server: str) -> None:
    dead = "http://127.0.0.1:9"
    cases = {"dead": (dead, "finish"), "silent": (silent_server, "finish"), "no finish": (silent_server, "leave")}
    runs = {name: started(tmp_path / name, *case) for name, case in cases.items()}
    for name, run in runs.items():
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out) == (0, ""), err
        assert "Traceback" not in err
        assert [line["step"] for line in metrics_of(tmp_path / name)] == list(range(1, 101))
        assert err.count("WARNING") == 1
    for name in ("dead", "silent"):
        (path,) = wandb_files(tmp_path / name)
        assert [row["step"] for row in history_of(wandb_records(path))] == list(range(1, 101))
        assert str(path.parent) in (tmp_path / name / "train.log").read_text()


def test_after_a_stop_signal_a_silent_service_gets_little_time(tmp_path: Path, silent_server: str) -> None:
    run = started(tmp_path, silent_server, "stop")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "Traceback" not in err
    assert float(out) < 6  # 4 s by its own clock, and the rest for a busy machine; after any other end it waits 7 before it gives up
    assert err.count("WARNING") == 1
    later = tracker(tmp_path, "offline", json.loads((tmp_path / "run.json").read_text())["wandb_id"])
    later.finish(0)
    rows = [row["step"] for path in wandb_files(tmp_path) for row in history_of(wandb_records(path))]
    assert rows == list(range(1, 101))  # whatever the first launch had no time for, the next one brings


CRASH = """
import sys, time
from pathlib import Path
import psutil
from tracknet.schema.training import TrackingConfig
from tracknet.training.tracking import Tracker
from tracknet.utils.logging import setup_logging
from tracknet.utils.run_directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
setup_logging(True, run.log_file)
tracker = Tracker(run, TrackingConfig(wandb="offline"), {}, is_main=True, run_id="run-x", wandb_id=None)
while "kept offline" not in run.log_file.read_text():
    time.sleep(0.02)
(service,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
service.kill()
for step in range(1, 201):
    tracker.log(step, {"train/loss": 0.5})
    time.sleep(0.005)
tracker.finish(0)
"""


def test_a_crash_of_the_client_turns_it_off_with_the_reason(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert "Traceback" not in run.stderr  # nor at exit, where W&B's own hook would wait for its service or print one
    assert run.stderr.count("WARNING") == run.stderr.count("W&B failed and is off") == 1
    assert len(metrics_of(tmp_path)) == 200


def test_a_client_that_stands_still_blocks_nothing_and_gets_all_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    release, real_init = threading.Event(), wandb.init

    def slow_init(**arguments: Any) -> Any:
        release.wait(60)
        return real_init(**arguments)

    monkeypatch.setattr(wandb, "init", slow_init)
    one = tracker(tmp_path, "offline")
    for step in range(1, 5001):
        one.log(step, {"train/loss": 0.5})
    release.set()
    one.finish(0)
    assert warnings_of(caplog) == []
    (path,) = wandb_files(tmp_path)
    assert [row["step"] for row in history_of(wandb_records(path))] == [line["step"] for line in metrics_of(tmp_path)] == [*range(1, 5001)]


def test_a_client_that_cannot_be_imported_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    one = tracker(tmp_path, "offline")
    one.log(1, {"train/loss": 0.5})
    one.finish(0)
    (warning,) = warnings_of(caplog)
    assert "cannot be imported" in warning
    assert len(metrics_of(tmp_path)) == 1


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    other = tracker(tmp_path / "run", "offline", is_main=False)
    other.log(1, {"train/loss": 0.5})
    other.log_previews(1, lambda: {"a": np.zeros((4, 4, 3), np.uint8)})
    other.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_disabled_needs_no_client(tmp_path: Path) -> None:
    one = tracker(tmp_path, "disabled")
    one.log(1, {"train/loss": 0.5})
    one.finish(0)
    assert metrics_of(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    assert one.state() == {"wandb_id": None}
    assert not (tmp_path / "wandb").exists()


def test_plain_lines_give_rate_and_time_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "tracknet")
    shown = Progress(900, 100, True, 20)
    for step in range(101, 141):
        clock[0] += 0.25
        shown.update(step, loss=0.01234, lr=3.9e-3, samples=16)
        if step == 120:
            shown.show(F1=0.8125)
            with shown.paused():
                clock[0] += 10
    shown.close()
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "step 120/900  loss 0.0123  lr 3.9e-03  64 samples/s  left 0:03:15"
    assert second == "step 140/900  loss 0.0123  lr 3.9e-03  64 samples/s  F1 0.812  left 0:06:20"  # 20 s for 40 steps, evaluation included


def test_other_ranks_show_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tracknet")
    shown = Progress(10, 0, False, 1)
    shown.update(1, loss=0.5, lr=0.1, samples=8)
    shown.close()
    assert caplog.records == []


BAR = """
import sys, time
from pathlib import Path
from tracknet.training.progress import Progress
from tracknet.utils.logging import setup_logging
logger = setup_logging(True, Path(sys.argv[1]))
progress = Progress(40, 10, True, 5)
for step in range(11, 41):
    time.sleep(0.02)
    progress.update(step, loss=0.25, lr=1e-3, samples=4)
    if step == 20:
        logger.info("evaluated")
progress.close()
"""


def test_a_terminal_shows_a_bar_and_text_stands_above_it(tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 120))
    log_file = tmp_path / "train.log"
    run = subprocess.run([sys.executable, "-c", BAR, str(log_file)], cwd=ROOT, stderr=inner, stdout=subprocess.PIPE, timeout=60, check=True)
    os.close(inner)
    seen = b""
    while piece := _read(outer):
        seen += piece
    os.close(outer)
    assert run.stdout == b""
    screen = seen.decode().replace("\r\n", "\n")
    assert "40/40" in screen
    assert "step/s" in screen
    assert "samples/s" in screen
    assert "loss 0.2500" in screen
    (line,) = [line for line in screen.split("\n") if "evaluated" in line]
    assert line.rsplit("\r", 1)[-1].endswith(" evaluated")  # a line of its own
    assert "step 20/40" not in screen
    logged = log_file.read_text()
    assert [f"step {step}/40" in logged for step in (15, 20, 40)] == [True, True, True]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_what_an_earlier_launch_wrote_of_a_step_is_not_written_again(tmp_path: Path) -> None:
    tracker(tmp_path, "disabled").log(10, {"train/loss": 1.0, "val/f1": 0.5})
    resumed = tracker(tmp_path, "disabled")  # at 10: killed before a checkpoint knew of the evaluation
    resumed.log(10, {"val/f1": 0.5})
    resumed.log(10, {"val/f1": 0.5, "val/f1_wasb": 0.4})
    resumed.log(11, {"train/loss": 0.9})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "train/loss": 1.0, "val/f1": 0.5}, {"step": 10, "val/f1_wasb": 0.4}, {"step": 11, "train/loss": 0.9}]

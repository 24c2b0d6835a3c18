"""Jobs on the background thread are done in order, off the caller's thread, and what they raise is told."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tracknet.errors import UserError
from tracknet.schema.training import TrackingConfig
from tracknet.training.background import BackgroundThread
from tracknet.training.tracking import Tracker
from tracknet.utils.run_directory import RunDirectory

PICTURE = np.zeros((4, 4, 3), np.uint8)


def tracker(folder: Path) -> Tracker:
    return Tracker(RunDirectory(folder), TrackingConfig(wandb="disabled"), {}, is_main=True, run_id="run", wandb_id=None)


def test_jobs_run_in_order_off_the_callers_thread_and_settle_waits_for_them() -> None:
    thread, gate, done = BackgroundThread("test"), threading.Event(), []
    for number in range(3):
        thread.add(lambda number=number: (gate.wait(), done.append((number, threading.current_thread().name))))
    assert not thread.settle(0.01)
    assert done == []
    gate.set()
    assert thread.settle()
    assert done == [(0, "test"), (1, "test"), (2, "test")]


def test_a_failed_job_is_told_once_and_does_not_end_the_thread() -> None:
    thread, done = BackgroundThread("test"), []
    thread.add(lambda: 1 / 0)
    thread.add(lambda: done.append(1))
    thread.settle()
    with pytest.raises(ZeroDivisionError):
        thread.check()
    thread.check()
    assert done == [1]


def test_previews_are_drawn_while_training_goes_on_and_are_there_before_a_later_step(tmp_path: Path) -> None:
    one, gate = tracker(tmp_path), threading.Event()
    one.log_previews(10, lambda: {"a": PICTURE} if gate.wait(60) else {})
    one.log(10, {"val/f1": 0.5})  # does not wait
    assert not list(tmp_path.glob("previews/*.jpg"))
    threading.Timer(0.05, gate.set).start()
    one.log(20, {"train/loss": 0.5})
    assert [path.name for path in tmp_path.glob("previews/*.jpg")] == ["step-00000010-a.jpg"]


def test_a_preview_that_cannot_be_written_is_told_in_a_later_step_or_at_the_end(tmp_path: Path) -> None:
    one = tracker(tmp_path)
    (tmp_path / "previews").write_text("a file in the folder's place")
    for tell in (lambda: one.log(20, {"train/loss": 0.5}), one.settle_previews):
        one.log_previews(10, lambda: {"a": PICTURE})
        with pytest.raises(UserError, match="previews"):
            tell()
    one.settle_previews()


def test_previews_under_way_are_written_before_the_run_ends(tmp_path: Path) -> None:
    one, gate = tracker(tmp_path), threading.Event()
    one.log_previews(10, lambda: {"a": PICTURE} if gate.wait(60) else {})
    threading.Timer(0.05, gate.set).start()
    one.finish(0)
    assert list(tmp_path.glob("previews/*.jpg"))


def test_memory_that_runs_out_in_drawing_is_told_in_one_line(tmp_path: Path) -> None:
    def draw() -> dict[str, NDArray[np.uint8]]:
        raise MemoryError

    one = tracker(tmp_path)
    one.log_previews(10, draw)
    with pytest.raises(UserError, match="out of memory"):
        one.settle_previews()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_where_no_thread_may_step_back_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError("as in a sandbox")

    monkeypatch.setattr(os, "setpriority", forbidden)
    thread, done = BackgroundThread("test"), []
    thread.add(lambda: done.append(1))
    assert thread.settle(5)
    assert done == [1]

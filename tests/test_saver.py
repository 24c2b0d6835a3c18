"""Saving in the background: what was handed over is what is saved, the caller goes on meanwhile, and no failure is lost."""

import errno
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import MODEL_TEXTS, assert_good, names_in, tensors_of

from tracknet.errors import UserError
from tracknet.training.checkpoint import load_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.durable import NewFile, only_writer
from tracknet.training.saver import BackgroundSaver
from tracknet.training.snapshot import Snapshot


class Gate:
    """Holds the first write of each save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = CheckpointStore.save

        def save(store: CheckpointStore, *arguments: Any) -> Path:
            self.reached.set()
            assert self.opened.wait(60)
            return real(store, *arguments)

        monkeypatch.setattr(CheckpointStore, "save", save)


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[BackgroundSaver]:
    saver = BackgroundSaver(CheckpointStore(tmp_path, 1), lambda _: None)
    yield saver
    saver.close()


def save(saver: BackgroundSaver, step: int, **state: Any) -> None:
    saver.save(step, MODEL_TEXTS, tensors_of(step), {"step": step} | state, False)


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def write(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "write", write)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_caller_goes_on_and_may_change_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: BackgroundSaver) -> None:
    gate = Gate(monkeypatch)
    tensors, state = tensors_of(1), {"step": 1, "deep": {"list": [1]}}
    saver.save(1, MODEL_TEXTS, tensors, state, False)
    assert gate.reached.wait(60)
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    tensors.clear()
    state["deep"]["list"].append(2)  # type: ignore[index]
    state["step"] = 7
    assert saver.is_busy
    assert names_in(tmp_path) == set()
    gate.opened.set()
    saver.wait()
    assert not saver.is_busy
    assert assert_good(tmp_path / "last") == 1
    assert load_checkpoint(tmp_path / "last").state["deep"] == {"list": [1]}


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: BackgroundSaver) -> None:
    gate = Gate(monkeypatch)
    save(saver, 1)
    second = threading.Thread(target=save, args=(saver, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert names_in(tmp_path) == set()
    gate.opened.set()
    second.join(60)
    saver.wait()
    assert assert_good(tmp_path / "last") == 2


def test_after_each_save_something_is_done_on_the_thread(tmp_path: Path) -> None:
    done: list[tuple[int, set[str], bool]] = []
    in_front = threading.current_thread()
    store = CheckpointStore(tmp_path, 1)
    saver = BackgroundSaver(store, lambda step: done.append((step, names_in(tmp_path), threading.current_thread() is in_front)))
    for step in (1, 2):
        save(saver, step)
    saver.close()
    assert done == [(step, {f"step-{step:08d}", "last"}, False) for step in (1, 2)]


def test_a_failure_is_told_and_costs_no_checkpoint(tmp_path: Path, saver: BackgroundSaver, caplog: pytest.LogCaptureFixture) -> None:
    save(saver, 1)
    saver.wait()
    assert saver.failure is None
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, FULL)
        save(saver, 2)
        for _ in range(2):
            with pytest.raises(UserError, match=r"step 2 could not be written to .*No space left on device") as caught:
                saver.wait()
    assert saver.failure is caught.value
    assert caplog.records[-1].getMessage() == str(caught.value)
    assert assert_good(tmp_path / "last") == 1
    assert names_in(tmp_path) == {"step-00000001", "last"}
    save(saver, 3)  # the disk has room again
    saver.wait()
    assert saver.failure is None
    assert assert_good(tmp_path / "last") == 3


def test_a_failure_is_in_the_log_also_if_nobody_asks(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for error, line in ((FULL, "No space left on device"), (KeyError("programming"), "saving in the background failed")):
        saver = BackgroundSaver(CheckpointStore(tmp_path, 1), lambda _: None)
        with pytest.MonkeyPatch.context() as patch:
            fail(patch, error)
            save(saver, 1)
            saver.close()
        assert line in caplog.records[-1].getMessage()


def test_a_programming_error_keeps_its_type(monkeypatch: pytest.MonkeyPatch, saver: BackgroundSaver) -> None:
    fail(monkeypatch, KeyError("programming"))
    save(saver, 1)
    with pytest.raises(KeyError, match="programming"):
        saver.wait()
    with pytest.raises(KeyError, match="programming"):
        saver.check()
    with pytest.raises(KeyError, match="programming"):
        save(saver, 2)
    assert saver.failure is None


def test_memory_that_runs_out_on_the_thread_is_one_line(monkeypatch: pytest.MonkeyPatch, saver: BackgroundSaver) -> None:
    fail(monkeypatch, MemoryError("no room"))
    save(saver, 1)
    with pytest.raises(UserError, match="out of memory while a checkpoint was saved: no room"):
        saver.wait()


def test_memory_that_runs_out_in_the_copy_is_one_line(tmp_path: Path, saver: BackgroundSaver) -> None:
    save(saver, 1)
    huge = torch.zeros(1).expand(2**45)  # 128 TiB
    saver.save(2, MODEL_TEXTS, {"model": {"huge": huge}}, {}, False)
    with pytest.raises(UserError, match=r"out of memory while a checkpoint was saved: no .* GiB of host memory for the copy"):
        saver.wait()
    assert assert_good(tmp_path / "last") == 1
    save(saver, 3)
    saver.wait()
    assert assert_good(tmp_path / "last") == 3


def test_a_state_that_json_does_not_hold_is_refused_at_once(saver: BackgroundSaver) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        save(saver, 1, loss=float("nan"))


def test_weights_that_are_not_finite_are_a_failure(saver: BackgroundSaver) -> None:
    tensors = tensors_of(1)
    tensors["model"]["layer.weight"][0, 0] = torch.nan
    saver.save(1, MODEL_TEXTS, tensors, {}, False)
    with pytest.raises(UserError, match=r"layer\.weight holds NaN or infinity"):
        saver.wait()


def test_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: BackgroundSaver) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "Pickler", refuse)
    save(saver, 1)
    saver.wait()
    assert assert_good(tmp_path / "last") == 1


def test_a_save_is_finished_before_the_interpreter_exits(tmp_path: Path) -> None:
    code = f"""
import time, torch
from pathlib import Path
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.saver import BackgroundSaver
saver = BackgroundSaver(CheckpointStore(Path({str(tmp_path)!r}), 1), lambda step: print("written", step))
real = CheckpointStore.save
CheckpointStore.save = lambda *arguments: (time.sleep(0.5), real(*arguments))
saver.save(1, {MODEL_TEXTS}, {{"model": {{"a": torch.zeros(1_000_000)}}}}, {{}}, False)
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, "written 1\n")
    assert load_checkpoint(tmp_path / "last").step == 1


# The copy in memory


def every_layout() -> dict[str, dict[str, torch.Tensor]]:
    flat = torch.arange(120.0)
    return {
        "a": {
            "plain": flat.view(2, 60),
            "channels_last": torch.randn(3, 4, 5, 2).to(memory_format=torch.channels_last),
            "transposed": flat.view(10, 12).t(),
            "expanded": torch.randn(3, 1).expand(3, 4),
            "every second": flat[::2],
            "number": torch.tensor(3),
            "yes": torch.tensor([True, False, True]),
            "half": torch.randn(3).bfloat16(),
        },
        "b": {"plain": flat.view(2, 60)[:1], "none": torch.zeros(0, 3), "": torch.ones(1, dtype=torch.int8)},
        "c": {},
    }


def test_a_snapshot_keeps_values_and_layouts_and_its_memory() -> None:
    snapshot, tensors = Snapshot(), every_layout()
    for _ in range(3):
        copies = snapshot.take(tensors)
        assert {name: list(group) for name, group in copies.items()} == {name: list(group) for name, group in tensors.items()}
        for name, group in tensors.items():
            for key, tensor in group.items():
                copy = copies[name][key]
                assert torch.equal(copy, tensor)
                assert copy.dtype == tensor.dtype
                if key in ("channels_last", "transposed", "plain"):
                    assert copy.stride() == tensor.stride()
                assert copy.data_ptr() % copy.element_size() == 0
        places = {copy.data_ptr() for group in copies.values() for copy in group.values() if copy.numel()}
        assert len(places) == 10  # none shares memory with another
        size = snapshot.byte_count
        smaller = snapshot.take({"a": {"one": torch.ones(2)}})
        assert torch.equal(smaller["a"]["one"], torch.ones(2))
        assert snapshot.byte_count == size
    larger = snapshot.take({"a": {"one": torch.ones(10_000)}})
    assert torch.equal(larger["a"]["one"], torch.ones(10_000))


def test_a_snapshot_is_a_copy_of_one_moment() -> None:
    snapshot, tensors = Snapshot(), every_layout()
    kept = {key: tensor.clone() for key, tensor in tensors["a"].items()}
    copies = snapshot.take(tensors)
    tensors["a"]["plain"].fill_(-1)
    tensors["a"]["channels_last"].fill_(-1)
    assert all(torch.equal(copies["a"][key], tensor) for key, tensor in kept.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_workers_do_not_get_the_copy() -> None:
    """They would make each page of it be moved at the next copy."""
    snapshot = Snapshot()
    copy = snapshot.take({"a": {"x": torch.ones(2**20)}})["a"]["x"]
    start = copy.data_ptr()

    def is_mapped() -> bool:
        spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        return any(int(low, 16) <= start < int(high, 16) for low, high in spans)

    assert is_mapped()
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert copy.sum() == 2**20
    else:
        os._exit(int(is_mapped()))


def test_reserving_makes_room_on_the_thread(tmp_path: Path) -> None:
    saver = BackgroundSaver(CheckpointStore(tmp_path, 1), lambda _: None)
    saver.reserve(1_000_000, pinned=False)
    saver.wait()
    reserved = saver._snapshot.byte_count
    assert reserved >= 1_000_000
    save(saver, 1)
    saver.wait()
    assert saver._snapshot.byte_count == reserved
    assert assert_good(tmp_path / "last") == 1
    saver.reserve(2**47, pinned=False)
    with pytest.raises(UserError, match="out of memory while a checkpoint was saved"):
        saver.wait()
    saver.close()


def test_a_forked_child_holds_no_file_of_a_save(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"), NewFile(tmp_path / "file"):
        child = os.fork()
        if child == 0:
            held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
            os._exit(sum(name.startswith(str(tmp_path)) for name in held))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

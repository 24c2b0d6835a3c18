"""Checkpoints: whatever happens while one is written, the folder holds a good one and nothing bad is read."""

import errno
import fcntl
import json
import os
import pickle
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tracknet.errors import UserError
from tracknet.training import durable
from tracknet.training.checkpoint import CheckpointError, CheckpointStore, load_checkpoint, saved_steps


def tensors_of(step: int, size: int = 1000) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "optimizer": {"0.exp_avg": torch.randn(size, generator=generator), "0.step": torch.tensor(float(step))},
        "weights": {"layer.weight": torch.randn(7, 3, generator=generator), "layer.count": torch.tensor(step)},
    }


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "tracknet"}')
    save_file({"layer.weight": torch.full((7, 3), 0.5)}, folder / "model.safetensors", metadata={"format": "pt"})


def save(store: CheckpointStore, step: int, *, best: bool = False, size: int = 1000, **state: Any) -> Path:
    return store.save(step, write_model, tensors_of(step, size), {"step": step} | state, best)


def assert_good(path: Path) -> int:
    """Loads a checkpoint, checks every value in it and gives its step."""
    checkpoint = load_checkpoint(path)
    size = len(checkpoint.tensors["optimizer"]["0.exp_avg"])
    for name, group in tensors_of(checkpoint.step, size).items():
        assert checkpoint.tensors[name].keys() == group.keys()
        assert all(torch.equal(checkpoint.tensors[name][key], value) for key, value in group.items())
    assert checkpoint.state["step"] == checkpoint.step
    assert torch.equal(load_file(checkpoint.path / "model.safetensors")["layer.weight"], torch.full((7, 3), 0.5))
    return checkpoint.step


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {".lock"}


# What is there afterwards


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state: dict[str, Any] = {"text": "Bälle", "numbers": [1, 0.1, 1e-300], "nothing": None, "yes": True, "deep": {"a": []}}
    folder = save(CheckpointStore(tmp_path / "run", 2), 123, **state)
    assert folder == tmp_path / "run" / "step-00000123"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "state.json",
        "optimizer.safetensors",
        "weights.safetensors",
    }
    assert assert_good(tmp_path / "run" / "last") == 123
    checkpoint = load_checkpoint(folder)
    assert checkpoint.state == {"step": 123} | state
    assert checkpoint.path == folder
    assert os.readlink(tmp_path / "run" / "last") == "step-00000123"
    assert not (tmp_path / "run" / "best").is_symlink()


def test_files_have_the_rights_of_ordinary_files(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    assert {p.stat().st_mode for p in folder.iterdir()} == {(folder / "state.json").stat().st_mode}


def test_tensors_that_share_memory_or_are_views_survive(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    group = {
        "a": flat[:6].view(2, 3),
        "b": flat[6:].view(3, 2).t(),
        "tied": flat[:6].view(2, 3),
        "empty": torch.zeros(0),
        "none": torch.zeros(0),
    }
    folder = CheckpointStore(tmp_path, 1).save(1, write_model, {"weights": group, "nothing": {}}, {}, False)
    loaded = load_checkpoint(folder).tensors
    assert loaded["nothing"] == {}
    assert all(torch.equal(loaded["weights"][name], value) for name, value in group.items())


@settings(max_examples=15, deadline=None)
@given(
    saves=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=8),
    keep_last=st.integers(1, 3),
)
def test_the_newest_and_the_best_are_kept(tmp_path_factory: pytest.TempPathFactory, saves: list[tuple[int, bool]], keep_last: int) -> None:
    """In whatever order steps come: a resume at an earlier step goes on before later checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    store = CheckpointStore(folder, keep_last)
    best = None
    for step, is_best in saves:
        save(store, step, best=is_best, size=4)
        overtaken = best is not None and best >= step  # by a run that was resumed at an earlier step
        best = step if is_best or overtaken else best
        assert assert_good(folder / "last") == step
        if best is not None:
            assert assert_good(folder / "best") == best
        steps = saved_steps(folder)
        assert len(steps) <= keep_last + (best is not None)
        assert step in steps
        assert names_in(folder) <= {f"step-{s:08d}" for s in steps} | {"last", "best"}
    ascending = sorted({step for step, _ in saves})
    if [step for step, _ in saves] == ascending:
        assert set(saved_steps(folder)) == set(ascending[-keep_last:]) | ({best} - {None})


def test_a_step_that_is_there_already_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save(store, 5, best=True, finished=False)
    save(store, 5, finished=True)
    assert load_checkpoint(tmp_path / "best").state["finished"] is True
    assert names_in(tmp_path) == {"step-00000005", "last", "best"}


def test_a_replacement_that_was_cut_short_is_found_and_put_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save(store, 5)
    aside = tmp_path / f".replaced-step-00000005-{'0' * 32}"
    (tmp_path / "step-00000005").rename(aside)  # the process was killed here
    assert assert_good(saved_steps(tmp_path)[5]) == 5
    save(store, 6)
    assert names_in(tmp_path) == {"step-00000005", "step-00000006", "last"}
    assert assert_good(tmp_path / "step-00000005") == 5


# What is not ours


def test_leftovers_of_killed_processes_go_and_nothing_else_does(tmp_path: Path) -> None:
    hexadecimal = "0123456789abcdef" * 2
    ours = [f".saving-step-00000007-{hexadecimal}", f".deleted-step-00000002-{hexadecimal}"]
    foreign_folders = [
        "notes",
        ".saving",
        ".saving-step-00000007",
        "step-7",
        "step-00000009",
        "step-00000003.bak",
        f"saving-step-00000007-{hexadecimal}",
    ]
    foreign_files = ["readme.txt", ".hidden", "step-00000004", "last.txt", ".link-1"]
    for name in ours + foreign_folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    for name in foreign_files:
        (tmp_path / name).write_text(name)
    (tmp_path / f".link-{hexadecimal}").symlink_to("step-00000001")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (tmp_path / f".deleted-step-00000001-{hexadecimal}").symlink_to(outside)
    (tmp_path / "step-00000001").symlink_to(outside)
    store = CheckpointStore(tmp_path, 1)
    for step in (20, 21, 22):
        save(store, step)
    assert names_in(tmp_path) == {*foreign_folders, *foreign_files, "step-00000001", "step-00000022", "last"}
    assert all((tmp_path / name / "file").read_text() == name for name in foreign_folders)
    assert all((tmp_path / name).read_text() == name for name in foreign_files)
    assert (outside / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_file_that_stands_where_a_link_belongs_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"^training\.ckpt_dir: .*{name} is not a link made by TrackNet"):
        save(CheckpointStore(tmp_path, 1), 1, best=True)
    assert (tmp_path / name).read_text() == "mine"
    assert not saved_steps(tmp_path)


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "Pickler", refuse)
    store = CheckpointStore(tmp_path, 1)
    save(store, 1, best=True)
    save(store, 2)
    assert assert_good(tmp_path / "last") == 2
    assert assert_good(tmp_path / "best") == 1


# Disks that fail


def break_nth_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int) -> Callable[[], int]:
    """From its n-th call on (0 is the first) the function says that the disk is full; gives the number of calls so far."""
    real, calls = getattr(owner, name), [0]

    def full(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, full)
    return lambda: calls[0]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (Path, "write_text"), (Path, "chmod"), (Path, "mkdir"), (Path, "rename"), (Path, "symlink_to"), (Path, "replace")],
)
def test_a_disk_that_fails_at_any_call_leaves_the_earlier_checkpoints(tmp_path: Path, owner: Any, name: str) -> None:
    n = 0
    while True:
        folder = tmp_path / str(n)
        store = CheckpointStore(folder, 1)
        save(store, 1, best=True)
        with pytest.MonkeyPatch.context() as patch:
            calls = break_nth_call(patch, owner, name, n)
            try:
                save(store, 2)
            except UserError as error:
                assert str(error).startswith("training.ckpt_dir: the checkpoint of step 2 could not be written to")  # noqa: PT017
                assert "No space left on device" in str(error)  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
            survived = calls() <= n
        assert assert_good(folder / "last") in (1, 2)
        assert assert_good(folder / "best") == 1
        save(store, 3)
        assert names_in(folder) == {"step-00000001", "step-00000003", "last", "best"}
        if survived:
            assert n > 0, f"{name} is never called"
            return
        n += 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_clear_line_and_costs_no_checkpoint(small_disk: Path) -> None:
    """Wherever the disk fills up, from the first file to the last."""
    run, filler = small_disk / "run", small_disk / "filler"
    store = CheckpointStore(run, 1)
    save(store, 1, size=20_000)
    failures = 0
    for free in range(0, 160 * 1024, 4096):
        disk = os.statvfs(small_disk)
        filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
        try:
            save(store, 2, size=20_000)
        except UserError as error:
            failures += 1
            assert str(error).startswith("training.ckpt_dir: the checkpoint of step 2 could not be written to ")  # noqa: PT017
            assert "No space left on device" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            assert names_in(run) == {"step-00000001", "last"}
        assert assert_good(run / "last") in (1, 2)
        filler.unlink()
        if len(saved_steps(run)) == 1 and 2 in saved_steps(run):
            break
    assert failures > 15
    assert names_in(run) == {"step-00000002", "last"}


def test_a_folder_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^training\.ckpt_dir: .*Not a directory"):
        save(CheckpointStore(tmp_path / "file" / "run", 1), 1)


def test_a_model_that_was_not_written_whole_replaces_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)

    def forget_config(folder: Path) -> None:
        write_model(folder)
        (folder / "config.json").unlink()

    with pytest.raises(UserError, match=r"config\.json"):
        store.save(2, forget_config, {}, {}, False)
    assert names_in(tmp_path) == {"step-00000001", "last"}
    assert assert_good(tmp_path / "last") == 1


def test_programming_errors_keep_their_type_and_leave_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        save(store, 1, loss=float("nan"))
    with pytest.raises(ValueError, match="no name for a file"):
        store.save(1, write_model, {"../outside": {}}, {}, False)
    assert names_in(tmp_path) == set()


# Processes that die, and two at once


def fork_a_writer(folder: Path, first_step: int) -> int:
    """A child that saves for ever; gives its process number once it has begun."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        assert os.read(reading, 1) == b"."
        os.close(reading)
        return child
    try:
        os.write(writing, b".")
        store = CheckpointStore(folder, 1)
        for step in range(first_step, first_step + 10_000):
            save(store, step // 2, best=step % 6 == 0, size=50_000)  # each step twice: the second time it is replaced
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_writer_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(0)
    save(CheckpointStore(tmp_path, 1), 1, size=50_000)
    newest = 1
    for _ in range(12):
        child = fork_a_writer(tmp_path, 2 * newest + 2)
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = {step: path for step, path in saved_steps(tmp_path).items() if assert_good(path) == step}
        assert steps
        assert max(steps) >= newest
        newest = max(steps)
    save(CheckpointStore(tmp_path, 1), newest + 1, best=True)
    assert names_in(tmp_path) == {f"step-{newest + 1:08d}", "last", "best"}
    assert newest > 3, "no child ever finished a save: the moments are too early"


@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_writers_in_one_folder_take_turns(tmp_path: Path) -> None:
    children = [fork_a_writer(tmp_path, first) for first in (2, 1000)]
    end = time.monotonic() + 1.0
    while time.monotonic() < end or not saved_steps(tmp_path):
        time.sleep(0.01)
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "a writer failed"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert all(assert_good(path) == step for step, path in saved_steps(tmp_path).items())


def test_a_lock_that_is_never_given_back_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "LOCK_WAIT_S", 0.1)
    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process has been writing here"):
            save(CheckpointStore(tmp_path, 1), 1)
    save(CheckpointStore(tmp_path, 1), 1)
    assert assert_good(tmp_path / "last") == 1


# Damage


FILES = ["config.json", "model.safetensors", "state.json", "optimizer.safetensors", "weights.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1) / name
    content = file.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(content) // 2, len(content) - 1}):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf"{name}: .*damaged") as caught:
            load_checkpoint(tmp_path / "last")
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: .*No such file"):
        load_checkpoint(tmp_path / "last")
    file.mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}: "):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_header_that_claims_too_much_and_a_pickle_are_refused(tmp_path: Path, name: str) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1) / name
    for content in ((2**60).to_bytes(8, "little") + b"{}" * 50, pickle.dumps({"a": 1}) * 10):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: .*damaged"):
            load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": None},
        {"format_version": 0},
        {"format_version": "1"},
        {"step": "1"},
        {"tensors": None},
        {"tensors": ["../../x"]},
        {"tensors": [3]},
        {"state": []},
    ],
)
def test_a_state_file_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"state\.json: not the state of a TrackNet checkpoint"):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff\xfe", b"{'a': 1}"])
def test_a_state_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (save(CheckpointStore(tmp_path, 1), 1) / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json: not"):
        load_checkpoint(tmp_path / "last")


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2, "tensors": {"other": "form"}}))
    with pytest.raises(UserError, match=r"state\.json: format_version 2 is newer than this TrackNet reads \(up to 1\)") as caught:
        load_checkpoint(tmp_path / "last")
    assert not isinstance(caught.value, CheckpointError)


def test_a_link_that_points_nowhere_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "last").symlink_to("step-00000001")
    (tmp_path / "best").symlink_to("best")
    for name in ("last", "best", "step-00000001"):
        with pytest.raises(CheckpointError, match=rf"{name}: there is no checkpoint"):
            load_checkpoint(tmp_path / name)

"""Checkpoints: whatever happens while one is written, the folder holds a good one."""

import errno
import fcntl
import hashlib
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from small_checkpoints import FILES, MODEL_TEXTS, assert_good, names_in, save, tensors_of
from torch import nn
from transformers import AutoModel

from tracknet.errors import UserError
from tracknet.models import build_model
from tracknet.training import durable
from tracknet.training.checkpoint import load_checkpoint, saved_steps
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.tensor_file import CHUNK_BYTES, read_tensors, write_tensors
from tracknet.utils.config import build_cfg, typed

OLD = Path(__file__).parent / "checkpoint_v1" / "run-20261124-120004-s42" / "step-00000006"


# What is there afterwards


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state: dict[str, Any] = {"text": "Bälle", "numbers": [1, 0.1, 1e-300], "nothing": None, "yes": True, "deep": {"a": []}}
    folder = save(CheckpointStore(tmp_path / "run", 2), 123, **state)
    assert folder == tmp_path / "run" / "step-00000123"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "README.md",
        "model.safetensors",
        "state.json",
        "optimizer.safetensors",
        "weights.safetensors",
        "manifest.json",
    }
    assert assert_good(tmp_path / "run" / "last") == 123
    checkpoint = load_checkpoint(folder)
    assert checkpoint.state == {"step": 123} | state
    assert checkpoint.path == folder
    assert checkpoint.format_version == 2
    assert {name: (folder / name).read_text() for name in MODEL_TEXTS} == MODEL_TEXTS
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
    folder = CheckpointStore(tmp_path, 1).save(1, MODEL_TEXTS, {"model": group, "weights": group, "nothing": {}}, {}, False)
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
        overtaken = best is not None and best > step  # by a run that was resumed at an earlier step
        best = step if is_best else None if overtaken else best
        assert assert_good(folder / "last") == step
        assert (assert_good(folder / "best") if (folder / "best").is_symlink() else None) == best
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
        (tmp_path / name / ("state.json" if name in ours else "file")).write_text(name)
    for name in foreign_files:
        (tmp_path / name).write_text(name)
    (tmp_path / f".link-{hexadecimal}").symlink_to("step-00000001")
    (tmp_path / f".link-{hexadecimal[::-1]}").mkdir()
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (tmp_path / f".deleted-step-00000001-{hexadecimal}").symlink_to(outside)
    (tmp_path / "step-00000001").symlink_to(outside)
    store = CheckpointStore(tmp_path, 1)
    for step in (20, 21, 22):
        save(store, step)
    foreign_folders_and_files = {*foreign_folders, *foreign_files, f".link-{hexadecimal[::-1]}"}
    assert names_in(tmp_path) == foreign_folders_and_files | {"step-00000001", "step-00000022", "last"}
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


def test_notes_in_a_checkpoint_are_left_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    folder = save(store, 1)
    (folder / "notes.txt").write_text("good one")
    (folder / "ema_export.safetensors").write_text("of a user")
    (folder / "more").mkdir()
    assert assert_good(tmp_path / "last") == 1
    save(store, 1, again=True)
    assert {p.name for p in folder.iterdir()} == {*FILES, "notes.txt", "ema_export.safetensors", "more"}
    (folder / "notes.txt").write_text("better one")
    save(store, 2)
    assert {p.name for p in folder.iterdir()} == {"notes.txt", "ema_export.safetensors", "more"}
    assert (folder / "notes.txt").read_text() == "better one"
    save(store, 3)
    assert names_in(tmp_path) == {"step-00000001", "step-00000003", "last"}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_stands_under_the_name_of_a_checkpoint_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    store, place = CheckpointStore(tmp_path, 1), tmp_path / "step-00000002"
    save(store, 1)
    if kind == "folder":
        place.mkdir()
        (place / "mine").write_text("")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to("step-00000001")
    with pytest.raises(UserError, match=r"^training\.ckpt_dir: .*step-00000002 is not a checkpoint made by TrackNet; move it away"):
        save(store, 2)
    assert os.path.lexists(place)
    assert names_in(tmp_path) == {"step-00000001", "step-00000002", "last"}
    assert assert_good(tmp_path / "last") == 1


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is not a file made by TrackNet"):
        save(CheckpointStore(tmp_path, 1), 1)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path.parent / "elsewhere")
    with pytest.raises(UserError, match="symbolic links"):
        save(CheckpointStore(tmp_path, 1), 1)
    assert not (tmp_path.parent / "elsewhere").exists()


def test_format_1_gives_way_to_format_2(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / OLD.name)
    save(CheckpointStore(tmp_path, 1), 7)
    assert names_in(tmp_path) == {"step-00000007", "last"}


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
    [
        *((os, name) for name in ("fsync", "open", "write", "readv", "lstat", "fstat")),
        *((Path, name) for name in ("mkdir", "rename", "symlink_to", "replace", "iterdir")),
    ],
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


@pytest.mark.parametrize("config", ["", "[]", '{"a": 1', '{"a": NaN}'])
def test_a_configuration_that_is_none_replaces_nothing(tmp_path: Path, config: str) -> None:
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    with pytest.raises(UserError, match=r"config\.json: not"):
        store.save(2, MODEL_TEXTS | {"config.json": config}, tensors_of(2), {}, False)
    assert names_in(tmp_path) == {"step-00000001", "last"}
    assert assert_good(tmp_path / "last") == 1


def test_programming_errors_keep_their_type_and_leave_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        save(store, 1, loss=float("nan"))
    with pytest.raises(ValueError, match="can have the groups"):
        store.save(1, MODEL_TEXTS, {"model": {}, "../outside": {}}, {}, False)
    with pytest.raises(ValueError, match="can have the groups"):
        store.save(1, MODEL_TEXTS, {"optimizer": {}}, {}, False)
    with pytest.raises(ValueError, match="complex"):
        store.save(1, MODEL_TEXTS, {"model": {"a": torch.zeros(1, dtype=torch.complex64)}}, {}, False)
    assert names_in(tmp_path) == set()


# Processes that die, and two at once


def fork_a_writer(folder: Path, first_step: int) -> tuple[int, int]:
    """A child that saves for ever; gives its process number, and a pipe in which it puts a dot before each save."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    try:
        store = CheckpointStore(folder, 1)
        for step in range(first_step, first_step + 10_000):
            os.write(writing, b".")
            save(store, step // 2, best=step % 6 == 0, size=50_000)  # each step twice: the second time it is replaced
    finally:
        os._exit(1)


def kill_after(child: int, reading: int, saves: int, seconds: float) -> None:
    """So many seconds after it has begun its next save but these."""
    for _ in range(saves + 1):
        assert os.read(reading, 1) == b".", "a writer failed"
    time.sleep(seconds)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "a writer failed"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_writer_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(0)
    start = time.monotonic()
    save(CheckpointStore(tmp_path, 1), 1, size=50_000)
    usual_s = time.monotonic() - start
    newest = 1
    for _ in range(12):
        child, reading = fork_a_writer(tmp_path, 2 * newest + 2)
        kill_after(child, reading, moments.randrange(3), moments.uniform(0.0, usual_s))
        steps = {step: path for step, path in saved_steps(tmp_path).items() if assert_good(path) == step}
        assert steps
        assert max(steps) >= newest
        newest = max(steps)
    save(CheckpointStore(tmp_path, 1), newest + 1, best=True)
    assert names_in(tmp_path) == {f"step-{newest + 1:08d}", "last", "best"}
    assert newest > 3


@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_writers_in_one_folder_take_turns(tmp_path: Path) -> None:
    writers = [fork_a_writer(tmp_path, first) for first in (2, 1000)]
    for child, reading in writers:
        kill_after(child, reading, 8, 0.0)
    steps = saved_steps(tmp_path)
    assert steps
    assert all(assert_good(path) == step for step, path in steps.items())


def test_a_lock_that_is_never_given_back_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "LOCK_WAIT_S", 0.1)
    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process has been writing here"):
            save(CheckpointStore(tmp_path, 1), 1)
    save(CheckpointStore(tmp_path, 1), 1)
    assert assert_good(tmp_path / "last") == 1


# The files themselves


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NUMBERS = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@settings(max_examples=40, deadline=None)
@given(
    forms=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(NUMBERS), st.lists(st.integers(0, 5), max_size=4), st.booleans()),
        max_size=6,
    )
)
def test_tensor_files_are_those_of_safetensors_to_the_byte(forms: dict[str, tuple[torch.dtype, list[int], bool]]) -> None:
    tensors = {}
    for name, (dtype, shape, transposed) in forms.items():
        tensor = (torch.rand(shape) * 3).to(dtype)
        tensors[name] = tensor.mT if transposed and tensor.dim() > 1 else tensor
    written = bytearray()
    write_tensors(tensors, lambda content: written.extend(content), finite=True)
    assert bytes(written) == safetensors_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        file.write_bytes(written)
        read, sha256 = read_tensors(file, finite=True, keep=True)
        assert sha256 == hashlib.sha256(written).hexdigest()
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_large_tensors_go_through_in_pieces(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, CHUNK_BYTES // 4 + 1), "b": torch.randn(CHUNK_BYTES // 2, 3).T}
    folder = CheckpointStore(tmp_path, 1).save(1, MODEL_TEXTS, {"model": tensors}, {}, False)
    read = load_checkpoint(folder).tensors["model"]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    expected = safetensors_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == expected
    tensors["a"][-1, -1] = torch.inf
    with pytest.raises(UserError, match="a holds NaN or infinity"):
        CheckpointStore(tmp_path, 1).save(2, MODEL_TEXTS, {"model": tensors}, {}, False)


def test_a_disk_that_reads_back_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit goes wrong on the way to the disk, in each write of a save in turn."""
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    real, calls, bad = os.write, 0, 0

    def write(descriptor: int, content: memoryview) -> int:
        nonlocal calls
        calls += 1
        return real(descriptor, bytes([content[0] ^ 1]) + bytes(content[1:]) if calls == bad else content)

    monkeypatch.setattr(os, "write", write)
    while bad <= calls:
        bad, calls = bad + 1, 0
        try:
            save(store, 2)
        except UserError as error:
            assert "reads back as something else than was written" in str(error)  # noqa: PT017
            assert names_in(tmp_path) == {"step-00000001", "last"}
            assert assert_good(tmp_path / "last") == 1
        else:
            assert calls < bad
    assert bad > len(FILES)


def test_a_checkpoint_is_the_model_folder_that_transformers_would_have_written(tmp_path: Path) -> None:
    config = typed(build_cfg("tennis", "unet", "tennis", overrides=["model.backbone.channels=[4,8]"], dry_run=True))
    torch.manual_seed(0)
    model = build_model(config.model, config.data, (64, 32))
    nn.Module.to(model, memory_format=torch.channels_last)
    folder = CheckpointStore(tmp_path, 1).save(1, model.model_texts(), {"model": dict(model.state_dict())}, {}, False)
    model.save_pretrained(tmp_path / "own")
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    loaded = AutoModel.from_pretrained(folder)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

"""A folder that somebody has made to do harm, given to `--resume`: one line, a code of 1 or 2, and no code of theirs is run."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import FaultTable
from safetensors.torch import load_file, save_file
from test_train import arguments, only_run

from tracknet.scripts.train import main
from tracknet.training.manifest import MANIFEST_FILE, FileRecord, Manifest, file_names
from tracknet.training.untrusted import sha256_of

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore:.*fork")]

GROUPS = ("optimizer", "weights")
LINKED_OUT = ("model.safetensors", "optimizer.safetensors", "state.json", MANIFEST_FILE)
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")
DEEP = 200_000
SECONDS = 120  # in which a launch has refused it


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._mark), "w")


@pytest.fixture(scope="module")
def sound(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a run has left."""
    output = tmp_path_factory.mktemp("sound")
    command = [sys.executable, "-m", "tracknet.scripts.train", *arguments(clips, output, "training.epochs=1", in_cache_of(clips))]
    subprocess.run(command, check=True, capture_output=True)
    return (only_run(output / "checkpoints") / "last").resolve()


def in_cache_of(clips: Path) -> str:
    return f"data.cache_dir={clips.parent / 'cache'}"


def sign(folder: Path) -> None:
    """Writes the manifest anew: who makes a hostile folder makes its hashes too."""
    step = json.loads((folder / MANIFEST_FILE).read_text())["step"]
    files = {name: FileRecord((folder / name).stat().st_size, sha256_of((folder / name).read_bytes())) for name in file_names(GROUPS)}
    (folder / MANIFEST_FILE).write_text(Manifest(step, GROUPS, files).as_text())


def with_bytes(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content((folder / name).read_bytes()))
        sign(folder)

    return change


def with_tensors(name: str, change_tensors: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        change_tensors(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        sign(folder)

    return change


def with_state(change_state: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        change_state(state)
        (folder / "state.json").write_text(json.dumps(state))
        sign(folder)

    return change


def linked_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parents[1] / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def swapped_for(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


def spoil_first(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Puts a number into the first tensor of floats."""
    return lambda tensors: next(t for t in tensors.values() if t.is_floating_point()).view(-1)[:1].fill_(value)


def attacks(mark: Path) -> dict[str, Callable[[Path], object]]:
    pickled = pickle.dumps(Payload(mark))
    huge = json.dumps({"x": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}})
    negative = json.dumps({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}})
    overlapping = json.dumps({name: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for name in "ab"})
    return {
        **{f"a pickle as {group}.safetensors": with_bytes(f"{group}.safetensors", lambda _: pickled) for group in ("model", *GROUPS)},
        "a pickle as state.json": with_bytes("state.json", lambda _: pickled),
        "a header of 2^60 bytes": with_bytes("model.safetensors", lambda _: header("{}", 2**60)),
        "a header of 2^64 - 1 bytes": with_bytes("optimizer.safetensors", lambda _: header("{}", 2**64 - 1)),
        "a tensor of 2^60 bytes": with_bytes("weights.safetensors", lambda _: header(huge)),
        "a tensor of negative size": with_bytes("optimizer.safetensors", lambda _: header(negative)),
        "two tensors in one place": with_bytes("optimizer.safetensors", lambda _: header(overlapping) + bytes(8)),
        "a header that is a JSON bomb": with_bytes("model.safetensors", lambda _: header('{"a":' * DEEP)),
        "a deep state": with_bytes("state.json", lambda _: b"[" * DEEP),
        "a deep state that is whole": with_bytes("state.json", lambda _: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        "a deep config": with_bytes("config.json", lambda _: b'{"a":' * DEEP),
        "a deep manifest": lambda folder: (folder / MANIFEST_FILE).write_bytes(b'{"a":' * DEEP),
        "a number of a million digits": with_bytes("state.json", lambda text: text.rstrip()[:-1] + b',"x":' + b"9" * 10**6 + b"}"),
        "a state of 200 MB": with_bytes("state.json", lambda text: text + b" " * 200_000_000),
        "a state with NaN": with_bytes("state.json", lambda text: text.rstrip()[:-1] + b',"x":NaN}'),
        "a state that is not UTF-8": with_bytes("state.json", lambda _: b"\xff\xfe{}"),
        "NaN in the model": with_tensors("model.safetensors", spoil_first(float("nan"))),
        "infinity in the weights": with_tensors("weights.safetensors", spoil_first(float("inf"))),
        "NaN in the optimizer": with_tensors("optimizer.safetensors", spoil_first(float("nan"))),
        "tensors of another model": with_tensors("model.safetensors", lambda tensors: tensors.update(other=torch.ones(3))),
        "a model without tensors": with_tensors("model.safetensors", dict.clear),
        "a tensor of another shape": with_tensors("weights.safetensors", lambda tensors: tensors.update({min(tensors): torch.ones(3, 5)})),
        "an optimizer of another shape": with_tensors("optimizer.safetensors", lambda t: t.update({min(t): torch.ones(3, 5)})),
        "an optimizer that lacks a tensor": with_tensors("optimizer.safetensors", lambda tensors: tensors.pop(min(tensors))),
        "an optimizer without tensors": with_tensors("optimizer.safetensors", dict.clear),
        "a state without a position": with_state(lambda state: state.pop("position")),
        "a position of another step": with_state(lambda state: state["position"].update(step=10**18)),
        "a negative epoch": with_state(lambda state: state["position"].update(epoch=-1)),
        "a config that is a list": with_state(lambda state: state.update(config=[])),
        "a config with sections of another kind": with_state(
            lambda state: state["config"].update(data=3, model=[], training={"epochs": {}})
        ),
        "sizes of another kind": with_state(lambda state: state.update(micro_batch_sizes={"whole_model": -1})),
        "an optimizer's state of another kind": with_state(lambda state: state["optimizer"].update(groups=[{"parameters": ["x"]}])),
        "more groups than the optimizer has": with_state(lambda s: s["optimizer"].update(groups=s["optimizer"]["groups"] * 3)),
        **{
            f"a link out as {name}": linked_out(name)
            for name in ("model.safetensors", "optimizer.safetensors", "state.json", MANIFEST_FILE)
        },
        "a pipe as state.json": swapped_for("state.json", os.mkfifo),
        "a device as the model": swapped_for("model.safetensors", lambda file: file.symlink_to("/dev/zero")),
        "a folder as config.json": swapped_for("config.json", Path.mkdir),
    }


@pytest.mark.parametrize("name", attacks(Path()))
def test_a_hostile_folder(name: str, sound: Path, clips: Path, tmp_path: Path, faults: FaultTable) -> None:
    mark = tmp_path / "code-was-run"
    folder = tmp_path / "hostile" / sound.parent.name / sound.name
    shutil.copytree(sound, folder)
    attacks(mark)[name](folder)
    code, said = resume(clips, tmp_path / "out", folder)
    wrong = "code was run" if mark.exists() else ""
    if code not in (1, 2):
        wrong = f"code {code}"
    elif len(said) != 1:
        wrong = f"{len(said)} lines: {said}"
    faults.record("a hostile folder: one line, and none of its code is run", not wrong, f"{name}: {wrong}")


def resume(clips: Path, output: Path, folder: Path) -> tuple[int, list[str]]:
    """The exit code, and the lines on stderr beside the log. In a child, for a hostile file may do anything to its process."""
    said = output.with_suffix(".txt")
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(SECONDS)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            os._exit(main([*arguments(clips, output, "training.epochs=2", in_cache_of(clips)), "--resume", str(folder)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), [line for line in said.read_text().splitlines() if not LOG_LINE.match(line)]

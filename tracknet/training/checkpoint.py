"""Checkpoints on disk: written beside their final name, flushed, verified, renamed; read only if they are whole. No pickle.

Layout of a run's folder::

    step-00000123/                a checkpoint
        config.json, model.safetensors    a complete model folder
        state.json                        format_version, step, the names of the tensor files, the caller's state
        optimizer.safetensors, ...        one file per group of tensors
    last -> step-00000123         the newest
    best -> step-00000100
    .lock                         held by the process that is writing
"""

import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tracknet.errors import UserError
from tracknet.training.durable import flush, flush_tree, only_writer

log = logging.getLogger("tracknet")

FORMAT_VERSION = 1
STATE_FILE = "state.json"
LAST, BEST = "last", "best"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+")
# What a killed process may leave. saving: incomplete; deleted: on its way out; replaced: complete, gives way to a newer one of its step.
_LEFTOVER = re.compile(r"\.(?:(saving|deleted|replaced)-(step-\d{8,})|link)-[0-9a-f]{32}")


class CheckpointError(UserError):
    """A checkpoint that is not there or is damaged; another one may be good."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose files are all there and well-formed; its tensors are still on disk.

    Attributes:
        path: its folder, no link.
        step: updates made.
        tensor_names: names of the groups of tensors.
        state: the caller's state.
    """

    path: Path
    step: int
    tensor_names: tuple[str, ...]
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: as `CheckpointInfo`, with the groups of tensors (name -> tensors by name, on the CPU)."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Verifies a checkpoint without reading its tensors: that all files are there, JSON, format version, headers and sizes of tensor files.

    Args:
        path: a checkpoint's folder or a link to one.

    Raises:
        CheckpointError: it is not there or is damaged.
        UserError: a newer version of TrackNet wrote it.
    """
    folder = Path(os.path.realpath(path))
    if not folder.is_dir():
        raise CheckpointError(f"{path}: there is no checkpoint")
    file = folder / STATE_FILE
    match _read_json(file):
        case {"format_version": int(version)} if version > FORMAT_VERSION:
            raise UserError(f"{file}: format_version {version} is newer than this TrackNet reads (up to {FORMAT_VERSION}); update TrackNet")
        case {"format_version": 1, "step": int(step), "tensors": [*names], "state": dict(state)} if all(map(_is_tensor_name, names)):
            pass
        case _:
            raise CheckpointError(f"{file}: not the state of a TrackNet checkpoint; the checkpoint is damaged")
    _read_json(folder / "config.json")
    for name in ("model", *names):
        with _open_tensors(folder / f"{name}.safetensors"):
            pass
    return CheckpointInfo(folder, step, tuple(names), state)


def load_checkpoint(path: Path) -> Checkpoint:
    """Verifies a checkpoint and reads all of it but the model's own files.

    Args:
        path: a checkpoint's folder or a link to one.

    Raises:
        CheckpointError: it is not there or is damaged.
        UserError: a newer version of TrackNet wrote it.
    """
    info = inspect_checkpoint(path)
    tensors = {name: _read_tensors(info.path / f"{name}.safetensors") for name in info.tensor_names}
    return Checkpoint(info.path, info.step, tensors, info.state)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; the checkpoint is damaged") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object; the checkpoint is damaged")
    return content


@contextmanager
def _open_tensors(file: Path) -> Iterator[Any]:
    """The open file; opening it checks its header and that the file is as long as the header says."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {error}; the checkpoint is damaged") from error


def _is_tensor_name(name: object) -> bool:
    return isinstance(name, str) and _TENSOR_NAME.fullmatch(name) is not None and name != "model"


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with _open_tensors(file) as opened:
        # copied out of the file's mapping: the checkpoint may be pruned while the tensors live
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def saved_steps(run_folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by step, good or not; among them one whose replacement was cut short."""
    found: dict[int, Path] = {}
    for entry in run_folder.iterdir():
        leftover = _LEFTOVER.fullmatch(entry.name)
        name = leftover[2] if leftover and leftover[1] == "replaced" else entry.name
        if (match := _STEP_NAME.fullmatch(name)) and entry.is_dir() and not entry.is_symlink():
            step = int(match[1])
            if name == entry.name or step not in found:
                found[step] = entry
    return found


def linked_step(run_folder: Path, name: str) -> int | None:
    """The step to which `last` or `best` points, whether it is there or not; None without such a link."""
    link = run_folder / name
    match = _STEP_NAME.fullmatch(link.readlink().name) if link.is_symlink() else None
    return int(match[1]) if match else None


class CheckpointStore:
    """Writes the checkpoints of one run.

    Whenever the process or the machine dies, every checkpoint in the folder is either complete or under a temporary name, and nothing
    old has been deleted before the new was verified. Writers wait for each other. Only what this class has made is ever removed.

    Args:
        run_folder: `<ckpt_dir>/<run_id>`; made at the first save.
        keep_last: so many newest checkpoints are kept, and the best one besides.
    """

    def __init__(self, run_folder: Path, keep_last: int) -> None:
        self._folder = run_folder
        self._keep_last = keep_last

    def save(
        self,
        step: int,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: bool,
    ) -> Path:
        """Writes a checkpoint, points `last` (and `best`) to it and prunes the old ones. For one process only: the main rank.

        A checkpoint of this step that is there already is replaced.

        Args:
            step: updates made.
            write_model: writes `config.json` and `model.safetensors` into the folder that it is given.
            tensors: groups of tensors by name; `optimizer` becomes `optimizer.safetensors`.
            state: whatever JSON holds exactly; no NaN and no infinity.
            best: whether it is the best checkpoint so far; it is in any case where the one so far is at this step or later.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: it could not be written; all earlier checkpoints are as they were.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with only_writer(self._folder):
                self._tidy()
                linked = linked_step(self._folder, BEST)
                if linked is not None and linked >= step:
                    best = True  # the other one is of a future that this run, resumed at an earlier step, will not have
                folder = self._write(step, write_model, tensors, state)
                # best before last: a run that resumes from `last` believes that `best` is as good as its state says
                for name in (BEST, LAST) if best else (LAST,):
                    self._link(name, folder.name)
                flush(self._folder)
                flush(self._folder.parent)
                self._prune(step)
        except (OSError, SafetensorError, CheckpointError) as error:
            problem = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
            raise UserError(
                f"training.ckpt_dir: the checkpoint of step {step} could not be written to {self._folder}: {problem};"
                " the earlier checkpoints are as they were"
            ) from error
        return folder

    def _write(
        self, step: int, write_model: Callable[[Path], None], tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Writes all files under a temporary name, verifies them and moves the folder to its name."""
        final = self._folder / f"step-{step:08d}"
        temporary = self._temporary("saving", final.name)
        temporary.mkdir()
        try:
            _write_files(temporary, step, write_model, tensors, state)
            flush_tree(temporary)
            inspect_checkpoint(temporary)
            if final.exists():
                replaced = self._temporary("replaced", final.name)
                final.rename(replaced)
                temporary.rename(final)
                self._discard(replaced)
            else:
                temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # gives the space back; what cannot be removed now goes at the next save
            raise
        flush(self._folder)
        return final

    def _temporary(self, purpose: str, step_name: str) -> Path:
        return self._folder / f".{purpose}-{step_name}-{uuid.uuid4().hex}"

    def _link(self, name: str, target: str) -> None:
        temporary = self._folder / f".link-{uuid.uuid4().hex}"
        temporary.symlink_to(target)
        temporary.replace(self._folder / name)

    def _tidy(self) -> None:
        """Removes what killed processes left; nobody else is writing now. A checkpoint whose replacement was cut short is put back."""
        for name in (LAST, BEST):
            if os.path.lexists(self._folder / name) and not (self._folder / name).is_symlink():
                raise FileExistsError(errno.EEXIST, f"{name} is not a link made by TrackNet; move it away")
        for entry in list(self._folder.iterdir()):
            if not (leftover := _LEFTOVER.fullmatch(entry.name)):
                continue
            if leftover[1] == "replaced" and not (self._folder / leftover[2]).exists():
                entry.rename(self._folder / leftover[2])
            else:
                self._discard(entry)

    def _prune(self, step: int) -> None:
        """Keeps the newest checkpoints up to the step just saved, then those of a later step (from before a resume at an earlier one)."""
        steps = {number: folder for number, folder in saved_steps(self._folder).items() if (folder / STATE_FILE).is_file()}
        newest = sorted(steps, key=lambda number: (number > step, -number))
        for number in newest[self._keep_last :]:
            if number != linked_step(self._folder, BEST):
                self._discard(steps[number])

    def _discard(self, entry: Path) -> None:
        """Removes a checkpoint or a leftover; failing that it warns, for what had to be saved is saved."""
        try:
            if entry.is_symlink():
                entry.unlink()
            elif _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)
            else:  # renamed first, so that a checkpoint is never seen half deleted
                shutil.rmtree(entry.rename(self._temporary("deleted", entry.name)))
        except OSError as error:
            log.warning("%s could not be removed: %s", entry, error.strerror)


def _write_files(
    folder: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> None:
    write_model(folder)
    for name, group in tensors.items():
        if not _is_tensor_name(name):
            raise ValueError(f"{name!r} is no name for a file of tensors")
        save_file(_on_cpu(group), folder / f"{name}.safetensors", metadata={"format": "pt"})
    content = {"format_version": FORMAT_VERSION, "step": step, "tensors": sorted(tensors), "state": dict(state)}
    state_file = folder / STATE_FILE
    state_file.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        file.chmod(state_file.stat().st_mode & 0o777)  # as any new file; safetensors lets only its owner read it


def _on_cpu(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none sharing memory with another one, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in group.items():
        own = tensor.detach().to("cpu").contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        result[name] = own
    return result

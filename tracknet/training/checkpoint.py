"""Checkpoints on disk: what they are, and reading them only if they are whole. No pickle; `checkpoint_store` writes them.

Layout of a run's folder::

    step-00000123/                a checkpoint
        config.json, model.safetensors    a complete model folder
        README.md                         its card; not in older checkpoints
        state.json                        the caller's state
        optimizer.safetensors, ...        one file per group of tensors
        manifest.json                     format_version, step, the size and sha256 of each file; written last
    last -> step-00000123         the newest
    best -> step-00000100
    .lock                         held by the process that is writing

Format 1 had no manifest: its state.json holds format_version, step, tensors (names of the groups) and state. It is still read. Files of
others in a checkpoint's folder are left alone.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from tracknet.training.manifest import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL,
    STATE_FILE,
    FileRecord,
    are_tensor_names,
    is_step,
    read_manifest,
    tensor_file_name,
)
from tracknet.training.tensor_file import read_header, read_tensors
from tracknet.training.untrusted import CheckpointError, damaged, opened, parse_json, read_bytes, sha256_of

__all__ = [
    "BEST",
    "LAST",
    "MANIFEST_FILE",
    "STATE_FILE",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "inspect_checkpoint",
    "linked_step",
    "load_checkpoint",
    "saved_steps",
    "verify_checkpoint",
]

LAST, BEST = "last", "best"
WEIGHTS = "weights"  # the group of the weights that are trained, where the model's are their average
MUST_BE_FINITE = frozenset({MODEL, WEIGHTS})

STEP_NAME = re.compile(r"step-([0-9]{8,18})")
# What a killed process may leave. saving: incomplete; deleted: on its way out; replaced: complete, gives way to a newer one of its step.
LEFTOVER_NAME = re.compile(r"\.(?:(saving|deleted|replaced)-(step-[0-9]{8,18})|link)-[0-9a-f]{32}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose files are all there and well-formed; its tensors are still on disk.

    Attributes:
        path: its folder, no link.
        step: updates made.
        tensor_names: names of the groups of tensors; that of the model, which each checkpoint has, is not among them.
        state: the caller's state.
        format_version: 1 or 2.
    """

    path: Path
    step: int
    tensor_names: tuple[str, ...]
    state: dict[str, Any]
    format_version: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: as `CheckpointInfo`, with the groups of tensors (name -> tensors by name, on the CPU), `model` among them."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    format_version: int


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Looks a checkpoint over without reading its tensors.

    Reads the manifest, the card and the JSON files whole and compares their sha256; of the tensor files, the headers and the sizes.

    Args:
        path: a checkpoint's folder, or `last` or `best` beside one.

    Raises:
        CheckpointError: it is not there or is damaged.
        UserError: a newer version of TrackNet wrote it.
    """
    return _inspect(path)[0]


def verify_checkpoint(path: Path) -> CheckpointInfo:
    """As `inspect_checkpoint`, and reads every file to its end: all sha256, and no NaN or infinity in the model and the weights.

    Takes a few megabytes of memory and as long as reading the files does.

    Raises:
        CheckpointError: it is not there or is damaged.
        UserError: a newer version of TrackNet wrote it.
    """
    info, files = _inspect(path)
    for _ in _read_groups(info, files, keep=False):
        pass
    return info


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint whole, verified as by `verify_checkpoint`: the bytes that are hashed are those that are returned.

    Raises:
        CheckpointError: it is not there or is damaged.
        UserError: a newer version of TrackNet wrote it.
    """
    info, files = _inspect(path)
    return Checkpoint(info.path, info.step, dict(_read_groups(info, files, keep=True)), info.state, info.format_version)


def saved_steps(run_folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by step, good or not; among them one whose replacement was cut short."""
    found: dict[int, Path] = {}
    for entry in run_folder.iterdir():
        leftover = LEFTOVER_NAME.fullmatch(entry.name)
        name = leftover[2] if leftover and leftover[1] == "replaced" else entry.name
        if (match := STEP_NAME.fullmatch(name)) and entry.is_dir() and not entry.is_symlink():
            step = int(match[1])
            if name == entry.name or step not in found:
                found[step] = entry
    return found


def linked_step(run_folder: Path, name: str) -> int | None:
    """The step to which `last` or `best` points, whether it is there or not; None without such a link."""
    link = run_folder / name
    match = STEP_NAME.fullmatch(os.readlink(link)) if link.is_symlink() else None
    return int(match[1]) if match else None


def _inspect(path: Path) -> tuple[CheckpointInfo, dict[str, FileRecord]]:
    """The checkpoint, and what its files must be; format 1 does not say the latter."""
    folder = _real_folder(path)
    info, files = _format_2(folder) if os.path.lexists(folder / MANIFEST_FILE) else (_format_1(folder), {})
    match = STEP_NAME.fullmatch(folder.name)
    if match and int(match[1]) != info.step:
        raise damaged(folder, f"it holds the checkpoint of step {info.step}")
    for name in (MODEL, *info.tensor_names):
        read_header(folder / tensor_file_name(name))
    return info, files


def _real_folder(path: Path) -> Path:
    """The folder at a path; a link is followed only to its neighbour, which may not be a link again."""
    folder = path
    if path.is_symlink():
        target = os.readlink(path)
        if not STEP_NAME.fullmatch(target):
            raise CheckpointError(f"{path}: a link to {target!a}, not to a checkpoint beside it; name the checkpoint's folder itself")
        folder = path.parent / target
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: a link, not a checkpoint; name the checkpoint's folder itself")
    if not folder.is_dir():
        raise CheckpointError(f"{path}: there is no checkpoint")
    return Path(os.path.realpath(folder))


def _format_2(folder: Path) -> tuple[CheckpointInfo, dict[str, FileRecord]]:
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        with opened(folder / name) as descriptor:
            size = os.fstat(descriptor).st_size
        if size != record.byte_count:
            raise damaged(folder / name, f"{size} bytes long, its manifest says {record.byte_count}")
    contents = {}
    for name in (CARD_FILE, CONFIG_FILE, STATE_FILE):
        if name in manifest.files:
            contents[name] = read_bytes(folder / name)
            _check_sha256(folder / name, sha256_of(contents[name]), manifest.files)
    parse_json(folder / CONFIG_FILE, contents[CONFIG_FILE])
    state = parse_json(folder / STATE_FILE, contents[STATE_FILE])
    return CheckpointInfo(folder, manifest.step, manifest.tensor_names, state, 2), dict(manifest.files)


def _format_1(folder: Path) -> CheckpointInfo:
    parse_json(folder / CONFIG_FILE, read_bytes(folder / CONFIG_FILE))
    file = folder / STATE_FILE
    match parse_json(file, read_bytes(file)):
        case {"format_version": 1, "step": step, "tensors": [*names], "state": dict(state)} if is_step(step) and are_tensor_names(names):
            return CheckpointInfo(folder, step, tuple(names), state, 1)
        case {"format_version": _}:
            raise damaged(file, "not the state of a TrackNet checkpoint")
    raise damaged(folder / MANIFEST_FILE, "No such file")


def _read_groups(info: CheckpointInfo, files: dict[str, FileRecord], *, keep: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    paths = {name: info.path / tensor_file_name(name) for name in (MODEL, *info.tensor_names)}
    total = 0
    for path in paths.values():
        with opened(path) as descriptor:
            total += os.fstat(descriptor).st_size
    if total > psutil.virtual_memory().total:
        raise CheckpointError(f"{info.path}: {total / 2**30:.1f} GiB of tensors are more than this machine's memory holds")
    for name, path in paths.items():
        tensors, sha256 = read_tensors(path, finite=name in MUST_BE_FINITE, keep=keep)
        _check_sha256(path, sha256, files)
        yield name, tensors


def _check_sha256(path: Path, sha256: str, files: dict[str, FileRecord] | Any) -> None:
    if files and files[path.name].sha256 != sha256:
        raise damaged(path, "its content is not what its manifest says (sha256)")

"""The list of a checkpoint's files with their sizes and sha256, written last: without it there is no checkpoint of format 2."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracknet.errors import UserError
from tracknet.training.untrusted import damaged, parse_json, read_bytes, sha256_of

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
CARD_FILE = "README.md"  # not in older checkpoints
MODEL = "model"  # the group of tensors that with config.json makes a model folder

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size, and its sha256 in hexadecimal."""

    byte_count: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's list of files.

    Attributes:
        step: updates made.
        tensor_names: names of the groups of tensors, the model's apart.
        files: by name; no other file belongs to the checkpoint.
    """

    step: int
    tensor_names: tuple[str, ...]
    files: Mapping[str, FileRecord]

    def as_text(self) -> str:
        """What the file holds."""
        files = {name: {"bytes": record.byte_count, "sha256": record.sha256} for name, record in sorted(self.files.items())}
        content = {"format_version": FORMAT_VERSION, "step": self.step, "tensors": list(self.tensor_names), "files": files}
        return json.dumps(content | {"sha256": _own_sha256(content)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, proven whole by its own hash; the files are not looked at.

    Raises:
        CheckpointError: it is not there or is damaged.
        UserError: a newer version of TrackNet wrote it.
    """
    file = folder / MANIFEST_FILE
    content = parse_json(file, read_bytes(file))
    own = content.pop("sha256", None)
    if own != _own_sha256(content):  # before anything else: a flipped bit in the version is no newer version
        raise damaged(file, "its content is not what its own sha256 says")
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise newer_version(file, version)
    match content:
        case {"format_version": 2, "step": step, "tensors": [*names], "files": dict(files)} if (
            is_step(step) and are_tensor_names(names) and {*files, CARD_FILE} == set(file_names(names))
        ):
            return Manifest(step, tuple(names), {name: _record(file, record) for name, record in files.items()})
    raise damaged(file, "not the manifest of a TrackNet checkpoint")


def newer_version(file: Path, version: int) -> UserError:
    """The refusal of a checkpoint that this TrackNet cannot know how to read."""
    return UserError(f"{file}: format_version {version} is newer than this TrackNet reads (up to {FORMAT_VERSION}); update TrackNet")


def file_names(tensor_names: Sequence[str]) -> list[str]:
    """The files of a checkpoint with these groups of tensors, its manifest apart."""
    return [CONFIG_FILE, CARD_FILE, STATE_FILE, *(tensor_file_name(name) for name in (MODEL, *tensor_names))]


def tensor_file_name(group: str) -> str:
    """The file of a group of tensors."""
    return f"{group}.safetensors"


def are_tensor_names(names: Sequence[object]) -> bool:
    """Whether these can be the groups of a checkpoint beside its model: plain words, none twice."""
    return all(isinstance(name, str) and _TENSOR_NAME.fullmatch(name) and name != MODEL for name in names) and len(set(names)) == len(names)


def is_step(value: object) -> bool:
    """Whether this can be a number of updates."""
    return type(value) is int and 0 <= value < 2**63


def _record(manifest: Path, value: object) -> FileRecord:
    match value:
        case {"bytes": byte_count, "sha256": str(sha256)} if is_step(byte_count) and _SHA256.fullmatch(sha256):
            return FileRecord(byte_count, sha256)
    raise damaged(manifest, "not the manifest of a TrackNet checkpoint")


def _own_sha256(content: Mapping[str, Any]) -> str:
    """Of everything in the manifest but this hash, in one form that does not hang on spaces and order."""
    return sha256_of(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

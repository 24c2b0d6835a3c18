"""Files that anybody may have made: opened only where they are plain files, and read as JSON with bounds."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tracknet.errors import UserError

MAX_JSON_BYTES = 16 * 2**20  # far above any state of ours; what such a file makes of memory stays near 20 times as much
MAX_JSON_DEPTH = 64


class CheckpointError(UserError):
    """A checkpoint that is not there or is damaged; another one may be good."""


def damaged(file: Path, what: str) -> CheckpointError:
    """The error that says what is wrong with a checkpoint's file, in one line."""
    return CheckpointError(f"{file}: {' '.join(what.split())}; the checkpoint is damaged")


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """The descriptor of a plain file, open for reading.

    Links are not followed, for they may lead out of the folder. Neither a pipe nor a device is waited for.

    Raises:
        CheckpointError: it is not there, not a plain file, or cannot be read; also where reading it fails inside.
    """
    try:
        if not stat.S_ISREG(os.lstat(file).st_mode):  # asked before, for opening a device may do something
            raise damaged(file, "not a plain file")
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise damaged(file, "not a plain file")
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise damaged(file, error.strerror or str(error)) from error


def read_bytes(file: Path) -> bytes:
    """The content of a small file.

    Raises:
        CheckpointError: as `opened`, or it is larger than `MAX_JSON_BYTES`.
    """
    with opened(file) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise damaged(file, f"larger than {MAX_JSON_BYTES // 2**20} MiB")
    return content


def sha256_of(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """A JSON object as RFC 8259 has it: UTF-8, no name twice, no NaN or infinity, no deeper than `MAX_JSON_DEPTH`.

    Args:
        file: named in errors.
        content: its bytes.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        parsed = json.loads(
            content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise damaged(file, "not a JSON object")
    level: list[Any] = [parsed]
    for _ in range(MAX_JSON_DEPTH):
        containers = (value for value in level if isinstance(value, dict | list))
        level = [child for value in containers for child in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise damaged(file, f"nested deeper than {MAX_JSON_DEPTH} levels")
    return parsed


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number

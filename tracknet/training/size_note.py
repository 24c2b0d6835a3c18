"""A note beside a run's checkpoints: the micro-batch sizes that a step ended with which could not be tried again.

A restart takes them in place of the checkpoint's own; a later checkpoint has them, and the note goes.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tracknet.errors import UserError
from tracknet.training.microbatch import MicroBatchSize, is_saved_size
from tracknet.training.untrusted import parse_json, read_bytes
from tracknet.utils.run_directory import write_atomically

FILE = "micro_batch_sizes.json"
_WITHOUT = "remove it to go on with the checkpoint's micro-batch sizes"


def write_size_note(run_folder: Path, sizes: Mapping[str, MicroBatchSize], step: int) -> None:
    """Any rank may call this, at the same time as another one too.

    Args:
        run_folder: with the run's checkpoints.
        sizes: by phase.
        step: updates made when memory ran out.

    Raises:
        UserError: it could not be written.
    """
    content = {"step": step, "sizes": {phase: size.as_json() for phase, size in sizes.items()}}
    write_atomically(run_folder / FILE, json.dumps(content, indent=1).encode())


def read_size_note(run_folder: Path, phases: Collection[str]) -> dict[str, Any] | None:
    """The sizes by phase, as `MicroBatchSize.restore` takes them; None where there is no note.

    Args:
        run_folder: with the run's checkpoints.
        phases: that the note must have.

    Raises:
        UserError: it cannot be read, or is not what `write_size_note` writes.
    """
    file = run_folder / FILE
    match _read(file):
        case None:
            return None
        case {"step": int(), "sizes": dict(sizes)} if set(sizes) == set(phases) and all(map(is_saved_size, sizes.values())):
            return sizes
    raise UserError(f"{file}: not the micro-batch sizes of a run; {_WITHOUT}")


def remove_size_note(run_folder: Path, saved_step: int) -> None:
    """After a checkpoint that has the sizes: one of a later step than the note. A note that came while it was written stays.

    Raises:
        UserError: it cannot be read or removed.
    """
    file = run_folder / FILE
    match _read(file):
        case {"step": int(step)} if step < saved_step:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{file} cannot be removed: {error.strerror}") from error


def _read(file: Path) -> Any:
    if not os.path.lexists(file):
        return None
    try:
        return parse_json(file, read_bytes(file))
    except UserError as error:
        raise UserError(f"{error}; {_WITHOUT}") from error

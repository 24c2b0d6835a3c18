"""A note beside a run's checkpoints: the micro-batch sizes that a step ended with which could not be tried again.

A restart takes them in place of the checkpoint's own; the next checkpoint has them, and the note goes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracknet.errors import UserError
from tracknet.training.durable import flush
from tracknet.training.microbatch import MicroBatchSize
from tracknet.utils.run_directory import write_atomically

FILE = "micro_batch_sizes.json"


def write_size_note(run_folder: Path, sizes: Mapping[str, MicroBatchSize]) -> None:
    """Any rank may call this, at the same time as another one too.

    Raises:
        UserError: it could not be written.
    """
    content = {phase: size.as_json() for phase, size in sizes.items()}
    write_atomically(run_folder / FILE, json.dumps(content, indent=1).encode())
    flush(run_folder)


def read_size_note(run_folder: Path) -> dict[str, Any] | None:
    """The sizes by phase, as `MicroBatchSize.restore` takes them; None where there is no note.

    Raises:
        UserError: it cannot be read.
    """
    file = run_folder / FILE
    try:
        sizes = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}; remove it to go on with the checkpoint's micro-batch sizes") from error
    if not isinstance(sizes, dict):
        raise UserError(f"{file}: not a JSON object; remove it to go on with the checkpoint's micro-batch sizes")
    return sizes


def remove_size_note(run_folder: Path) -> None:
    """After a checkpoint that has the sizes."""
    (run_folder / FILE).unlink(missing_ok=True)

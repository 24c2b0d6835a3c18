"""How a worker tells launch.sh its exit code and error: `accelerate launch` turns every failure into 1."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TRACKNET_EXIT_FILE"  # set by launch.sh


def write_exit_record(code: int, message: str, environ: Mapping[str, str]) -> None:
    """Leaves `{"code", "message"}` in the file that the environment names; without one nothing is written.

    Any process may call it. The first one wins: it failed by itself, the others because it was gone.
    """
    if VARIABLE not in environ:
        return
    with contextlib.suppress(FileExistsError), Path(environ[VARIABLE]).open("x", encoding="utf-8") as file:
        json.dump({"code": code, "message": message}, file)


def clear_exit_record(environ: Mapping[str, str]) -> None:
    """Removes the record of an attempt that `--max_restarts` has followed with this one; for the first process of each machine."""
    if VARIABLE in environ:
        Path(environ[VARIABLE]).unlink(missing_ok=True)

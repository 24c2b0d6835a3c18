"""A launcher's restart: after a failure, `--max_restarts` starts all processes again from the top."""

import contextlib
import socket
from collections.abc import Mapping
from typing import Any

import psutil

RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun and `accelerate launch` for several processes
CLOCK_SECONDS = 5.0


def launcher_of(environ: Mapping[str, str]) -> list[Any] | None:
    """What this process's launcher is known by, the same after each of its restarts; None where no launcher restarts it.

    Returns:
        machine, process id and start time in seconds, for JSON; see `same_launcher`.
    """
    if RESTART_COUNT not in environ:
        return None
    with contextlib.suppress(psutil.Error, OSError):
        parent = psutil.Process().parent()
        return [socket.gethostname(), parent.pid, parent.create_time()] if parent else None
    return None


def same_launcher(one: object, other: object) -> bool:
    """Whether two values of `launcher_of` are of the same one."""
    match one, other:
        case [host, int(pid), float(started)], [other_host, int(other_pid), float(other_started)]:
            # the start time is that of the machine plus ticks, and the former moves when the clock is set
            return bool(host == other_host and pid == other_pid and abs(started - other_started) < CLOCK_SECONDS)
    return False

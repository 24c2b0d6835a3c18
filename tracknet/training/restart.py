"""A launcher's restart: after a failure, `--max_restarts` starts all processes again from the top."""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun and `accelerate launch` for several processes
CLOCK_SECONDS = 5.0
_SCHEME = "tracknet-attempt"


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


def needs_keys_of_its_own(environ: Mapping[str, str]) -> bool:
    """Whether this attempt's processes must not meet under the keys of an earlier one.

    On several machines each launcher counts its own restarts, so that the count names no common attempt; there torch's own way remains.
    """
    return was_restarted(environ) and environ.get("GROUP_WORLD_SIZE") == "1"


def was_restarted(environ: Mapping[str, str]) -> bool:
    """Whether the launcher has started this process again after a failure."""
    return int(environ.get(RESTART_COUNT, "0")) > 0


def new_attempt_init_method() -> str:
    """How the processes of a restart meet: the `init_method` of `torch.distributed.init_process_group`.

    It is torch's way through the environment, but for the keys in the store, which are this attempt's own. `accelerate launch` keeps one
    store for all its restarts: a process that is quicker than another would read where that one could be reached in the attempt before,
    and wait for it until the timeout.
    """
    register_rendezvous_handler(_SCHEME, _join)  # type: ignore[no-untyped-call]
    return f"{_SCHEME}://"


def _join(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    yield PrefixStore(f"attempt-{os.environ[RESTART_COUNT]}", store), rank, world_size

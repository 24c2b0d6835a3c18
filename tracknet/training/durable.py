"""Writing that survives: flushing to the disk, and one writer at a time in a folder."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tracknet.errors import UserError

log = logging.getLogger("tracknet")

LOCK_WAIT_S = 60.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems without locks answer


def flush(path: Path) -> None:
    """Brings a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Brings all files and folders below `folder`, and itself, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            flush(Path(parent) / name)
        flush(Path(parent))


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the lock of an existing folder (its file `.lock`), which the system takes back from a process that dies.

    On a file system without locks it only warns.

    Raises:
        UserError: another process kept the lock for `LOCK_WAIT_S`.
    """
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        locked = _lock(file, folder)
        try:
            yield
        finally:
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file too


def _lock(file: IO[str], folder: Path) -> bool:
    """Whether the lock was taken; False where the file system has none."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                waited = f"another process has been writing here for {LOCK_WAIT_S:.0f} s"
                raise UserError(f"training.ckpt_dir: {folder}: {waited}; let only one run write to it") from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: its file system has no locks; no two processes may write there at once", folder)
            return False
        else:
            return True

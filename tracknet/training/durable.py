"""Writing that survives: files that are on the disk when they are said to be, and one writer at a time in a folder."""

import errno
import fcntl
import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracknet.errors import UserError

log = logging.getLogger("tracknet")

LOCK_WAIT_S = 60.0
PIECE_BYTES = 4 * 2**20  # read and hashed at once, without Python's lock
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems without locks answer

_open_here: set[int] = set()  # descriptors that a forked child must not keep: a lock and the space of a removed file would hang on them


def _close_in_child() -> None:
    for descriptor in _open_here:
        os.close(descriptor)
    _open_here.clear()


os.register_at_fork(after_in_child=_close_in_child)


def flush(path: Path) -> None:
    """Brings a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NewFile:
    """Writes a file that is not there yet, and hashes what it is given.

    Used as a context: when it ends, the content is on the disk. `byte_count` and `sha256` then say what must be there.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.byte_count = 0

    def __enter__(self) -> "NewFile":
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _open_here.add(self._descriptor)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            _open_here.discard(self._descriptor)
            os.close(self._descriptor)

    def write(self, content: bytes | memoryview) -> None:
        """Appends all of it."""
        self._digest.update(content)
        self.byte_count += len(content)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    @property
    def sha256(self) -> str:
        """Of what was given, in hexadecimal."""
        return self._digest.hexdigest()


def sha256_on_disk(path: Path) -> str:
    """Of what a file holds. Where the system heeds the request, it is read from the disk, not from the memory that the writer filled."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while count := os.readv(descriptor, [piece]):
            digest.update(piece[:count])
    finally:
        os.close(descriptor)
    return digest.hexdigest()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the lock of an existing folder (its file `.lock`), which the system takes back from a process that dies.

    On a file system without locks it only warns.

    Raises:
        UserError: another process kept the lock for `LOCK_WAIT_S`.
    """
    # neither a link out of the folder nor a pipe in its place
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(folder / ".lock", flags, 0o666)
    _open_here.add(descriptor)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError(errno.EEXIST, ".lock is not a file made by TrackNet; move it away")
        locked = _lock(descriptor, folder)
        try:
            yield
        finally:
            if locked:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file too
    finally:
        _open_here.discard(descriptor)
        os.close(descriptor)


def _lock(file: int, folder: Path) -> bool:
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

"""The files of the frame cache: each is written whole or not at all, and all together stay within a limit.

Several processes and machines may share the folder. Names are unique while a file is written, and what has been used within a day is never
removed: another run may be reading it, which on a network disk would die of it.
"""

import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tracknet.errors import UserError

KEY = re.compile(r"-([0-9a-f]{16})\.")  # in the names of the cache's own files; others in the folder are left alone
PART = ".part"
IN_USE_S = 24 * 3600.0  # after its last use a file may be in use for so long; a part that has not grown for so long was left behind
LISTING_S = 5.0  # for so long a listing of the folder holds, less what this process adds; listing it for each clip would be slow
LEAST_FREE = 2_000_000_000, 0.02  # bytes, and of the disk: what stays free for checkpoints and all else
NPY_HEADER = 128  # bytes
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

log = logging.getLogger("tracknet")


class NoRoomError(Exception):
    """The limit leaves no room, whatever were removed that may be."""


class DiskRefusesError(UserError):
    """The disk is full or may not be written; names `data.cache_dir`."""


@dataclass(frozen=True)
class _File:
    path: Path
    key: str
    size: int  # bytes
    used: float  # seconds since the epoch

    @property
    def is_old(self) -> bool:
        """Whether nobody uses it any more."""
        return time.time() - self.used > IN_USE_S


class CacheFolder:
    """A folder of files that can be made again; those with one key in their names belong together.

    Each process that writes may overshoot the limit by what it writes within a few seconds beside others.

    Args:
        path: made when needed.
        limit: bytes of all files together; None for no limit.

    Attributes:
        own_keys: of this run; their files never make room for others.
        reserved: bytes that are kept for small files, see `save`.
        refuses: whether the disk takes nothing more, as far as is known; that is said once, and not tried again.
    """

    def __init__(self, path: Path, limit: int | None) -> None:
        self.path = path
        self.limit = limit
        self.own_keys: set[str] = set()
        self.reserved = 0
        self.refuses = False
        self._files: list[_File] = []
        self._listed_at = float("-inf")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": [], "_listed_at": float("-inf")}

    def used_bytes(self) -> int:
        """Bytes of all files of the cache."""
        return sum(file.size for file in self._list())

    def has_room(self, size: int) -> bool:
        """Whether a large file may be written, once everything is removed that may be."""
        if self.refuses:
            return False
        if self.limit is None:
            return True
        files = self._listing()
        in_use = self._keys_in_use(files)
        return size + self.reserved + sum(file.size for file in files if file.key in in_use) <= self.limit

    @contextmanager
    def writing(self, path: Path, size: int) -> Iterator[BinaryIO]:
        """A large file beside its final name, renamed when it is whole and gone when it is not. Where the limit asks for it, old files go.

        Args:
            path: final name, in the folder.
            size: bytes that are expected.

        Raises:
            NoRoomError: the limit leaves no room beside what is reserved.
            DiskRefusesError: the disk is full or nearly so, read-only or not this user's.
            UserError: anything else that the disk says.
        """
        with self._writing(path, size, is_large=True) as file:
            yield file

    def save(self, path: Path, array: NDArray[Any]) -> bool:
        """Writes a small array, where need be into what is reserved; whether the folder has taken it."""
        if self.refuses:
            return False
        try:
            with self._writing(path, array.nbytes + NPY_HEADER, is_large=False) as file:
                write_array(file, array)
        except NoRoomError:
            return False
        except UserError as error:
            self.refuse(error)
            return False
        self.reserved = max(0, self.reserved - array.nbytes)
        return True

    def refuse(self, error: UserError) -> None:
        """The disk takes nothing more: says so, once."""
        if not self.refuses:
            log.warning("%s; going on: what is not in the cache is decoded whenever it is read", error)
        self.refuses = True

    @contextmanager
    def _writing(self, path: Path, size: int, is_large: bool) -> Iterator[BinaryIO]:
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
        try:
            self._make_room(size + (self.reserved if is_large else 0), part)
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_disk(size)
            try:
                with part.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                written = part.stat().st_size
                self._make_room(written + (self.reserved if is_large else 0), part)  # it may have become larger
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            mend = "make room or choose another place with data.cache_dir=FOLDER"
            kind = DiskRefusesError if error.errno in REFUSALS else UserError
            raise kind(f"data.cache_dir: cannot write {self.path} ({error.strerror}); {mend}") from error
        self._files = [file for file in self._files if file.path not in (part, path)]
        self._files.append(_File(path, key_of(path.name), written, time.time()))

    def touch(self, path: Path) -> None:
        """Notes that a file is in use; its time of access would not tell, as many disks are mounted without."""
        with suppress(OSError):  # a cache that is somebody else's is read all the same
            os.utime(path)

    def tidy(self) -> None:
        """Removes what killed processes have left, and old files that a lower limit has no room for."""
        for file in self._list():
            if file.path.suffix == PART and file.is_old:
                with suppress(OSError):  # another process was faster, or it is somebody else's
                    file.path.unlink()
        with suppress(NoRoomError):  # what is in use stays
            self._make_room(0, self.path)

    def _check_disk(self, size: int) -> None:
        disk = shutil.disk_usage(self.path)
        kept = max(LEAST_FREE[0], LEAST_FREE[1] * disk.total)
        if disk.free - size < kept:
            raise OSError(errno.ENOSPC, f"{disk.free / 1e9:.3g} GB are free, and {kept / 1e9:.3g} GB are kept for all else")

    def _make_room(self, size: int, part: Path) -> None:
        """Sees to it that so much may be written into `part`."""
        if self.limit is None or size + sum(file.size for file in self._listing() if file.path != part) <= self.limit:
            return
        files = [file for file in self._list() if file.path != part]
        excess = size + sum(file.size for file in files) - self.limit
        in_use = self._keys_in_use(files)
        groups = _by_last_use(file for file in files if file.key not in in_use)
        if sum(file.size for group in groups for file in group) < excess:
            raise NoRoomError
        for group in groups:
            if excess <= 0:
                break
            for file in group:
                with suppress(OSError):  # another process was faster, or it is somebody else's
                    file.path.unlink()
                    excess -= file.size
        self._list()
        if excess > 0:
            raise NoRoomError

    def _keys_in_use(self, files: list[_File]) -> set[str]:
        """The keys whose files stay: those of the run, and those of which any file was used lately, as not each file's use is noted."""
        return self.own_keys.union(file.key for file in files if not file.is_old)

    def _listing(self) -> list[_File]:
        """All files of the cache as they were a short while ago."""
        return self._files if time.monotonic() - self._listed_at < LISTING_S else self._list()

    def _list(self) -> list[_File]:
        """All files of the cache, parts too."""
        found: list[_File] = []
        with suppress(OSError), os.scandir(self.path) as entries:  # no folder yet, or none that can be read: writing will say why
            for entry in entries:
                if key := key_of(entry.name):
                    with suppress(FileNotFoundError):  # removed since
                        status = entry.stat()
                        found.append(_File(Path(entry.path), key, status.st_size, status.st_mtime))
        self._files, self._listed_at = found, time.monotonic()
        return found


def write_array(file: BinaryIO, array: NDArray[Any]) -> None:
    """Writes an .npy. NumPy's own functions do not say why a write fails, and so not that the disk is full."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.tobytes())


def key_of(name: str) -> str:
    """The key in a file's name; empty where it is none of the cache's."""
    found = KEY.findall(name)
    return found[-1] if found else ""


def _by_last_use(files: Iterator[_File]) -> list[list[_File]]:
    """The files of each key together, the longest unused first."""
    groups: dict[str, list[_File]] = {}
    for file in files:
        groups.setdefault(file.key, []).append(file)
    return sorted(groups.values(), key=lambda group: max(file.used for file in group))

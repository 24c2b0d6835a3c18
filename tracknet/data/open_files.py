"""The files of the cache that a process has open."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracknet.data.stored_frames import DamagedError, StoredArray, StoredFrames, open_frames

FILES_OPEN = 128  # each holds a file handle


class OpenFiles:
    """Opens files of the cache when they are asked for, and keeps some open. Forked processes may go on with them."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __reduce__(self) -> "tuple[type[OpenFiles], tuple[()]]":
        return OpenFiles, ()

    def frames(self, path: Path, form: str, count: int, size_wh: tuple[int, int]) -> StoredFrames:
        """The frames of a clip. Raises DamagedError, see `open_frames`."""
        frames: StoredFrames = self._open[path] if path in self._open else open_frames(path, form, count, size_wh)
        self._keep(path, frames)
        return frames

    def array(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """An array, memory-mapped, see `StoredArray`; None where it is not there or damaged."""
        try:
            stored: StoredArray = self._open[path] if path in self._open else StoredArray(path, shape, dtype)
            self._keep(path, stored)
            return stored.array
        except DamagedError:
            self.forget(path)
            return None

    def forget(self, path: Path) -> None:
        """Opens the file anew when it is asked for next."""
        self._open.pop(path, None)

    def _keep(self, path: Path, stored: Any) -> None:
        self._open[path] = stored
        self._open.move_to_end(path)
        if len(self._open) > FILES_OPEN:
            self._open.popitem(last=False)

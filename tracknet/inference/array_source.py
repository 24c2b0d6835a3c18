"""Pictures in memory as footage."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracknet.data.decode import resize_picture
from tracknet.errors import DataError
from tracknet.inference.source import SourceInfo, TimedFrame


class ArraySource:
    """Pictures that a program gives; see `FrameSource`. An iterator can be read once.

    Args:
        pictures: (H, W, 3) uint8 RGB each; one array (N, H, W, 3) will do.
        fps: frames per second; without it the times are not known.

    Raises:
        DataError: there are none, or the first is something else.
    """

    def __init__(self, pictures: Iterable[NDArray[np.uint8]], fps: float | None) -> None:
        self.notes: list[str] = []
        rest = iter(pictures)
        first = next(rest, None)
        if first is None:
            raise DataError("no pictures were given")
        self._pictures = pictures if isinstance(pictures, np.ndarray | list | tuple) else chain([first], rest)
        count = len(pictures) if isinstance(pictures, np.ndarray | list | tuple) else None
        self.info = SourceInfo(Path("arrays"), "arrays", _size(first, 0), fps, count)

    def frames(self, size_wh: tuple[int, int] | None, first: int = 0) -> Iterator[TimedFrame]:
        """See `FrameSource`. Raises DataError where a picture is something else than uint8 RGB."""
        for number, picture in enumerate(self._pictures):
            original_wh = _size(picture, number)
            if number >= first:
                time_s = float("nan") if self.info.fps is None else number / self.info.fps
                yield TimedFrame(number, time_s, resize_picture(picture, size_wh or original_wh), original_wh)


def _size(picture: object, number: int) -> tuple[int, int]:
    if not isinstance(picture, np.ndarray):
        raise DataError(f"picture {number} is a {type(picture).__name__}; give NumPy arrays (H, W, 3), uint8 RGB")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise DataError(f"picture {number} is {picture.dtype} of the shape {picture.shape}; give (H, W, 3), uint8 RGB")
    return picture.shape[1], picture.shape[0]

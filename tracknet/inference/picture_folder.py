"""A folder of numbered pictures as footage."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tracknet.data.decode import PICTURES_IN_FLIGHT, Frame, picture_size, read_picture
from tracknet.data.formats import PICTURES, natural_order
from tracknet.errors import DataError, shown
from tracknet.inference.source import SourceInfo, TimedFrame

NOT_KNOWN = float("nan")
Read = tuple[Frame, tuple[int, int]] | DataError  # a picture with its own size, or why there is none


class PictureFolder:
    """The pictures of a folder in natural order of their names, as the clips of a data set are read; see `FrameSource`.

    A picture that cannot be read is left out with a note that names it. Pictures have no times.

    Raises:
        DataError: the folder holds no pictures, or not one that can be read.
    """

    def __init__(self, path: Path) -> None:
        self._paths = pictures_in(path)
        if not self._paths:
            raise DataError(f"{shown(path)}: a folder without pictures; it needs {', '.join(PICTURES)}, or give a video file")
        size_wh = self._first_size()
        self.info = SourceInfo(path, path.resolve().name, size_wh, None, len(self._paths))
        self.notes: list[str] = []

    def frames(self, size_wh: tuple[int, int] | None, first: int = 0) -> Iterator[TimedFrame]:
        """See `FrameSource`."""
        self.notes.clear()
        number, broken, resized = 0, list[str](), list[str]()
        for path, read in zip(self._paths, self._reads(self._paths, size_wh), strict=True):
            if isinstance(read, DataError):
                broken.append(str(read))
                continue
            picture, original_wh = read
            if original_wh != self.info.size_wh:
                resized.append(path.name)
            if number >= first:
                yield TimedFrame(number, NOT_KNOWN, picture, original_wh)
            number += 1
        self.notes += _notes(self.info, broken, resized)

    def _first_size(self) -> tuple[int, int]:
        for path in self._paths:
            try:
                return picture_size(path)
            except DataError as error:
                reason = error
        raise reason

    def _reads(self, paths: Sequence[Path], size_wh: tuple[int, int] | None) -> Iterator[Read]:
        cores = os.cpu_count() or 1
        in_flight = min(2 * cores, PICTURES_IN_FLIGHT)  # they may be large
        with ThreadPoolExecutor(cores) as threads:  # Pillow and OpenCV let go of the interpreter's lock
            for start in range(0, len(paths), in_flight):
                yield from threads.map(lambda path: _read(path, size_wh), paths[start : start + in_flight])


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that are frames, in their order. Raises DataError where the folder cannot be listed."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "_"))]
        return sorted((e for e in entries if e.suffix.lower() in PICTURES and e.is_file()), key=natural_order)
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be listed ({error.strerror})") from error


def _read(path: Path, size_wh: tuple[int, int] | None) -> Read:
    try:
        original_wh = picture_size(path)
        return read_picture(path, original_wh, size_wh or original_wh), original_wh
    except DataError as error:
        return error


def _notes(info: SourceInfo, broken: list[str], resized: list[str]) -> Iterator[str]:
    if broken:
        yield f"{len(broken)} of {info.frame_count_reported} pictures left out; later ones count without them; the first: {broken[0]}"
    if resized:
        yield (
            f"{len(resized)} pictures are of another size than the first, {info.size_wh[0]}x{info.size_wh[1]}; "
            f"the first of them is {shown(resized[0])}; positions are in px of their own picture"
        )

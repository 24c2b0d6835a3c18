"""Any frames of a video by their numbers, the same to the byte as those of a pass from its start."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import av
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from tracknet.data.decode import BROKEN_VIDEO, Frame, broken_video, check_frame, scaled_frame, video_stream
from tracknet.errors import DataError

THREADS = 1  # each worker has a core; and a forked process that frees what has threads waits for ever for them, which it has not inherited

log = logging.getLogger("tracknet")


class _StrayedError(Exception):
    """After a jump other frames came than the file's table says."""


class VideoReader:
    """A video, open for reading windows of it in any order; for one thread of one process.

    It jumps to a key frame where each frame has a time of its own, and one key frame before the last that could do: in streams with open
    groups of pictures or a gradual refresh the first frames behind a key frame may lack something, and no decoder tells. Where the times do
    not serve, or other frames come than they promise, it decodes from the start of the file, on from where it stands where it can.

    Args:
        path: of the video.
        length: frames, as its labels say.
        original_wh: size of each frame, px.
        size_wh: size to give, px.

    Raises:
        DataError: the video cannot be read.
    """

    def __init__(self, path: Path, length: int, original_wh: tuple[int, int], size_wh: tuple[int, int]) -> None:
        self._path, self._length, self._original_wh, self._size_wh = path, length, original_wh, size_wh
        self._reformatter = VideoReformatter()
        try:
            self._container = av.open(str(path))
            self._stream = video_stream(path, self._container)
            self._stream.codec_context.thread_count = THREADS
            self._times, self._keys = _table(self._container, self._stream, length)
            if not self._times:
                log.info("%s: has no times to jump by; windows that are not in the cache are decoded from its start", path)
            self._frames, self._next = self._from_start(), 0
        except BROKEN_VIDEO as error:
            raise broken_video(path, error) from error

    def read(self, first: int, count: int) -> list[Frame]:
        """Frames `first` to `first + count - 1`, each (H, W, 3) uint8, RGB.

        Raises:
            DataError: one of them is damaged or missing.
        """
        try:
            try:
                return self._read(first, count)
            except _StrayedError:
                log.info("%s: other frames come after a jump than its times promise; it is decoded from its start from now on", self._path)
                self._times, self._keys = [], []
                self._frames, self._next = self._from_start(), 0
                return self._read(first, count)
        except BROKEN_VIDEO as error:
            self._frames, self._next = iter(()), self._length  # where it stands is not known
            raise broken_video(self._path, error) from error

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def _read(self, first: int, count: int) -> list[Frame]:
        place = bisect_right(self._keys, first) - 2
        key = self._keys[place] if place >= 0 else 0  # the file may also show frames before its first key frame: an edit list hides that
        if not key <= self._next <= first:
            self._frames, self._next = (self._from_key(key), key) if key else (self._from_start(), 0)
        frames = []
        while self._next < first + count:
            frame = next(self._frames, None)
            if frame is None:
                raise DataError(f"{self._path}: ends before frame {self._next}, but its labels are for {self._length}")
            check_frame(self._path, self._next, frame, self._original_wh)
            if self._next >= first:
                frames.append(scaled_frame(self._reformatter, frame, self._size_wh, THREADS))
            self._next += 1
        return frames

    def _from_start(self) -> Iterator[av.VideoFrame]:
        """All frames; the file is opened anew, which no file can refuse."""
        self._container.close()
        self._container = av.open(str(self._path))
        self._stream = video_stream(self._path, self._container)
        self._stream.codec_context.thread_count = THREADS
        yield from self._container.decode(self._stream)

    def _from_key(self, key: int) -> Iterator[av.VideoFrame]:
        """The frames from a key frame on. Raises _StrayedError where one of them is not the one expected."""
        self._container.seek(self._times[key], stream=self._stream)
        number = None
        for frame in self._container.decode(self._stream):
            if number is None:
                if frame.pts is not None and frame.pts < self._times[key]:
                    continue  # shown before the key frame, or FFmpeg has gone to an earlier one
                if frame.pict_type != PictureType.I:
                    raise _StrayedError
                number = key
            if number >= self._length or frame.pts != self._times[number]:
                raise _StrayedError
            yield frame
            number += 1


def _table(container: "av.container.InputContainer", stream: "av.video.stream.VideoStream", length: int) -> tuple[list[int], list[int]]:
    """The time of each frame in the order shown, and the numbers of the key frames; both empty where they are not to be relied on."""
    times, key_times = [], []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        if packet.pts is None or packet.is_corrupt:
            return [], []
        times.append(packet.pts)
        if packet.is_keyframe:
            key_times.append(packet.pts)
    times.sort()
    if len(times) != length or not key_times or any(one == other for one, other in pairwise(times)):
        return [], []
    return times, [bisect_left(times, time) for time in sorted(key_times)]

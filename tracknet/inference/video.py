"""A video file as footage: every frame that can be decoded, upright, with its time; what was wrong with the file is said in a few notes."""

import stat
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import VideoReformatter

from tracknet.data.decode import BROKEN_VIDEO, scaled_frame
from tracknet.errors import DataError, shown
from tracknet.inference.decoding import decoded_frames, first_video, open_container, reason_of
from tracknet.inference.orientation import orientation_of
from tracknet.inference.picture_folder import PictureFolder
from tracknet.inference.source import FrameSource, SourceInfo, TimedFrame
from tracknet.inference.video_notes import VideoNotes
from tracknet.inference.video_times import VideoTimes, stamp_s

TRANSPORT_PACKETS = (188, 192, 204)  # bytes, of the kinds of MPEG transport streams
DURATION_INSTEAD_OF_COUNT = ("matroska,webm", "flv")  # formats whose header has no number of frames, but when they end
SHORTER_S = 1.0  # by which a whole file may end before the time in its header


def open_source(path: Path) -> FrameSource:
    """Opens a video file or a folder of pictures.

    Args:
        path: whatever PyAV opens, or a folder with pictures as in a data set.

    Raises:
        DataError: it is neither, or not one frame of it can be decoded.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)}: no such file or folder") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)}: cannot be opened ({reason_of(error)})") from error
    if stat.S_ISDIR(status.st_mode):
        return PictureFolder(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shown(path)}: neither a file nor a folder; a video must be a file, as it is read more than once")
    if status.st_size == 0:
        raise DataError(f"{shown(path)}: is empty, 0 bytes")
    return VideoFile(path)


class VideoFile:
    """The first video stream of a file, covers left aside; see `FrameSource`.

    Frames come in the order in which they are shown, each that the decoder gives out, also those that it flags as damaged. Where packets
    cannot be decoded, or the file breaks off, what can be decoded still comes. Times are the file's own time stamps, counted from the first
    frame. Interlaced frames stay as they are, both fields in one picture; pixels that are not square are not stretched; high dynamic range
    is not tone mapped. Colours and scaling are those of `decode.scaled_frame`, as in training and evaluation.

    Attributes:
        start_s: time stamp of the first frame, seconds on the file's clock; 0 where it has none.
        pixel_aspect: width of a displayed pixel through its height.

    Raises:
        DataError: no video that can be decoded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: list[str] = []
        notes = VideoNotes()
        try:
            with open_container(path) as container:
                stream = first_video(path, container)
                rate, count = stream.average_rate or stream.guessed_rate, stream.frames or None
                self._torn = container.format.name == "mpegts" and all(path.stat().st_size % size for size in TRANSPORT_PACKETS)
                self._duration_s, aspect = _duration_s(container), stream.sample_aspect_ratio or Fraction(1)
            frame = next(decoded_frames(path, notes), None)
        except BROKEN_VIDEO as error:
            raise DataError(f"{shown(path)}: no video that can be read ({reason_of(error)})") from error
        if frame is None:
            raise DataError(f"{shown(path)}: not one frame of its video can be decoded ({notes.losses.reason or 'it holds none'})")
        size_wh = orientation_of(frame).upright_wh((frame.width, frame.height))
        self.start_s = stamp_s(frame, frame.pts if frame.pts is not None else frame.dts) or 0.0
        self.pixel_aspect = 1 / aspect if orientation_of(frame).transpose else aspect
        self.info = SourceInfo(path, path.stem, size_wh, float(rate) if rate else None, count)

    def frames(self, size_wh: tuple[int, int] | None, first: int = 0) -> Iterator[TimedFrame]:
        """See `FrameSource`."""
        self.notes.clear()
        notes, times, reformatter = VideoNotes(), VideoTimes(self.info.fps), VideoReformatter()
        try:
            for number, frame in enumerate(decoded_frames(self._path, notes)):
                time_s, turn = times.next(frame), orientation_of(frame)
                own_wh = turn.upright_wh((frame.width, frame.height))
                notes.see(frame, own_wh, turn)
                if number >= first:
                    picture = turn.upright(scaled_frame(reformatter, frame, turn.upright_wh(size_wh or own_wh)))
                    yield TimedFrame(number, time_s, picture, own_wh)
        except BROKEN_VIDEO as error:
            raise DataError(f"{shown(self._path)}: cannot be read any more ({reason_of(error)})") from error
        if self._torn:
            self.notes.append("breaks off: the file ends amid a packet of its transport stream; what was decoded is kept")
        self.notes += notes.lines(self.info, times)
        ends_s = self.start_s + times.last_s + max(notes.last_frame_s or 0.0, 1 / self.info.fps if self.info.fps else 0.0)
        if self._duration_s is not None and ends_s < self._duration_s - SHORTER_S and not self._holds_after(self._duration_s - SHORTER_S):
            self.notes.append(f"the header reports {self._duration_s:.1f} s, the video ends at {ends_s:.1f} s; perhaps the file breaks off")

    def _holds_after(self, clock_s: float) -> bool:
        """Whether the file goes on until then, be it with sound only."""
        try:
            with open_container(self._path) as container:
                for packet in container.demux():
                    if packet.pts is not None and (packet.pts + (packet.duration or 0)) * packet.time_base >= clock_s:
                        return True
        except BROKEN_VIDEO:  # what was decoded has been given out, and this asks only how far the file goes
            pass
        return False


def _duration_s(container: "av.container.InputContainer") -> float | None:
    """When a file ends, on its own clock, by the header of a format that does not count its frames; elsewhere FFmpeg may be guessing."""
    known = container.format.name in DURATION_INSTEAD_OF_COUNT
    return container.duration / av.time_base if known and container.duration else None

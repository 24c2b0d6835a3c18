"""Takes all frames out of a video file, however broken it is."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar, cast

import av
from av.stream import Disposition

from tracknet.data.decode import BROKEN_VIDEO
from tracknet.errors import DataError, shown
from tracknet.inference.video_notes import Losses, VideoNotes

FAILURES_IN_A_ROW = 20  # of reading on behind a damaged place, before the file counts as broken off
TEXT_AS_ANIMATION = "tty"  # FFmpeg's reader that draws any text file
MOST_AT_WORK = 32  # frames at once in FFmpeg's decoders, of up to 16 threads; where more lack, the file itself has no frame for each packet
LAST = None  # instead of a packet: the decoder shall give out what it holds back
STILLS = Disposition.attached_pic | Disposition.timed_thumbnails  # a cover or thumbnails that look like a video stream

StreamT = TypeVar("StreamT", bound="av.stream.Stream")


def open_container(path: Path) -> "av.container.InputContainer":
    """The file opened by FFmpeg. An absolute path, as FFmpeg would take `12:30.mp4` for a protocol; tags in any encoding are let pass."""
    return av.open(str(path.absolute()), metadata_errors="replace")


def first_video(path: Path, container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """The first stream of moving pictures.

    Raises:
        DataError: there is none.
    """
    if container.format.name == TEXT_AS_ANIMATION:
        raise DataError(f"{shown(path)}: a text file, no video")
    for stream in container.streams.video:
        if not stream.disposition & STILLS:
            return stream
    kinds = sorted({"a cover picture" if stream.type == "video" else stream.type for stream in container.streams})
    raise DataError(f"{shown(path)}: holds no video, only {' and '.join(kinds) or 'nothing'}")


def decoded_frames(path: Path, notes: VideoNotes) -> Iterator[av.VideoFrame]:
    """All frames of the first video in the order in which they are shown; a damaged packet costs that packet only.

    FFmpeg decodes several frames at once. Where it meets damage as it gives out its last frames, it drops those still at work; when frames
    lack that no damage explains, they are fetched by decoding the file again one by one.

    Args:
        path: the file.
        notes: its `losses` hold what could not be decoded; whole when the frames are through.

    Raises:
        DataError: the file holds no video.
        av.FFmpegError, OSError, ValueError: it cannot be opened.
    """
    yield from _decode(path, notes.losses, "AUTO")
    if 0 < notes.losses.unused <= MOST_AT_WORK:
        given, notes.losses = notes.losses.frames, Losses()
        yield from islice(_decode(path, notes.losses, "NONE"), given, None)


def reason_of(error: Exception) -> str:
    """What FFmpeg or Python says, on one line."""
    return shown(" ".join(str(getattr(error, "strerror", None) or error).split()))


def _decode(path: Path, losses: Losses, thread_type: Literal["AUTO", "NONE"]) -> Iterator[av.VideoFrame]:
    with open_container(path) as container:
        stream = first_video(path, container)
        stream.thread_type = thread_type
        for packet in chain(packets_to_the_end(container, stream, losses.break_off), (LAST,)):
            losses.packets += packet is not LAST
            try:
                frames = stream.decode(packet)
            except av.error.EOFError:
                return
            except BROKEN_VIDEO as error:
                losses.damage(reason_of(error))
                continue
            losses.frames += len(frames)
            for frame in frames:
                frame.time_base = stream.time_base  # those given out last come without
                yield frame


def packets_to_the_end(
    container: "av.container.InputContainer", stream: StreamT, on_break_off: Callable[[str], None] = lambda reason: None
) -> "Iterator[av.Packet[StreamT]]":
    """The stream's packets; reads on behind what is damaged.

    Args:
        container: the open file.
        stream: one of its streams.
        on_break_off: called with the reason where no reading on is possible before the end of the file.
    """
    failures = 0
    while failures < FAILURES_IN_A_ROW:
        try:
            for packet in container.demux(stream):
                failures = 0
                if packet.size:
                    yield cast("av.Packet[StreamT]", packet)
            return
        except BROKEN_VIDEO as error:
            failures += 1
            reason = reason_of(error)
    on_break_off(reason)

"""Writes a video again with the ball drawn into it, in a form that browsers play."""

import math
import os
import uuid
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TypeGuard

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from tracknet.data.decode import Frame
from tracknet.errors import UserError, shown
from tracknet.inference.decoding import open_container, reason_of
from tracknet.inference.sound import SoundTrack, sound_streams
from tracknet.inference.source import FrameSource
from tracknet.inference.track import BallTrack
from tracknet.inference.trail import BallPainter
from tracknet.inference.video import VideoFile, open_source

TICKS_PER_S = 90000  # time stamps of the output; holds 24, 25, 30, 50, 60 frames/s and their 1000/1001 exactly
FPS_ELSE = 25  # of pictures without times
SLOWEST_RATE = Fraction(1, 1001)
BT709 = 1  # of colours, in the numbers of ITU-T H.273
LIMITED_RANGE = 1
QUALITY = {"crf": "20", "preset": "veryfast", "bf": "0"}  # reordered frames of uneven times would make the mp4 report too short a time
FOREVER = float("inf")


def write_overlay(source_path: Path, track: BallTrack, out_path: Path) -> list[str]:
    """Decodes the footage once more and writes it with the ball and its trail as H.264 (yuv420p) in an mp4 that plays as it loads.

    Every decoded frame is there at its own time. The picture is upright; an odd width or height grows by one px, a copy of the last column
    or row; where the resolution changes, all frames get the size of the first. The first sound track is kept: copied if it is AAC, MP3,
    Opus or FLAC, else as AAC. Pictures of a folder are shown at the track's rate, else at 25 frames/s.

    Args:
        source_path: video file or folder of pictures.
        track: where the ball is; frames without a row, or whose row shows no ball, stay as they are.
        out_path: the mp4; stands there only when it is whole.

    Returns:
        One line for each thing that was not as it should be with the footage.

    Raises:
        DataError: the footage cannot be read.
        UserError: the file cannot be written, or would take the footage's place.
    """
    source = open_source(source_path)
    if out_path.exists() and out_path.samefile(source_path):
        raise UserError(f"{shown(out_path)}: is the footage itself; choose another place for the overlay")
    beside = out_path.with_name(f"{out_path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            silent = _write_with_sound(source, track, beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(out_path)
        finally:
            beside.unlink(missing_ok=True)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{shown(out_path)}: the overlay cannot be written ({reason_of(error)})") from error
    return source.notes + silent


def _write_with_sound(source: FrameSource, track: BallTrack, path: Path) -> list[str]:
    """Writes the overlay, without its sound where that does not go into an mp4; then gives a line about it."""
    if not _has_sound(source):
        _write(source, track, path, None)
        return []
    try:
        _write(source, track, path, source.start_s)
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.PatchWelcomeError) as error:
        _write(source, track, path, None)
        return [f"the sound is left out of the overlay, it cannot go into an mp4 ({reason_of(error)})"]
    return []


def _write(source: FrameSource, track: BallTrack, path: Path, sound_from_s: float | None) -> None:
    """Writes the overlay; the sound from this time of the source on, none for None."""
    size_wh = source.info.size_wh
    painter = BallPainter(track, size_wh)
    with ExitStack() as stack:
        output = stack.enter_context(av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "faststart"}))
        pictures = _PictureTrack(output, source, track)
        sound = None if sound_from_s is None else stack.enter_context(SoundTrack(source.info.path, sound_from_s, output))
        for frame in source.frames(size_wh):
            time_s = frame.number / pictures.fps if math.isnan(frame.time_s) else frame.time_s
            picture = np.array(frame.picture)
            painter.draw(picture, frame.number, time_s, frame.original_wh)
            if sound:
                sound.write_until(time_s)
            pictures.write(picture, time_s)
        pictures.finish()
        if sound:
            sound.write_until(FOREVER)


def _has_sound(source: FrameSource) -> TypeGuard[VideoFile]:
    if not isinstance(source, VideoFile):
        return False
    with open_container(source.info.path) as container:
        return bool(sound_streams(container))


class _PictureTrack:
    """The H.264 stream of an mp4."""

    def __init__(self, output: "av.container.OutputContainer", source: FrameSource, track: BallTrack) -> None:
        self._output = output
        rate = max(Fraction(source.info.fps or track.fps or FPS_ELSE).limit_denominator(1001), SLOWEST_RATE)
        self.fps = float(rate)
        self._stream = output.add_stream("libx264", rate=rate, options=QUALITY)
        self._stream.width, self._stream.height = (length + length % 2 for length in source.info.size_wh)
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = Fraction(1, TICKS_PER_S)
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        if isinstance(source, VideoFile):
            context.sample_aspect_ratio = source.pixel_aspect
        self._reformatter = VideoReformatter()
        self._last_pts = -1

    def write(self, picture: Frame, time_s: float) -> None:
        """A picture at its time; times rise."""
        width, height = self._stream.width, self._stream.height
        missing_rows, missing_columns = height - picture.shape[0], width - picture.shape[1]
        even: Frame = np.asarray(cv2.copyMakeBorder(picture, 0, missing_rows, 0, missing_columns, cv2.BORDER_REPLICATE), dtype=np.uint8)
        rgb = av.VideoFrame.from_ndarray(even, format="rgb24")
        frame = self._reformatter.reformat(rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709)
        self._last_pts = max(round(time_s * TICKS_PER_S), self._last_pts + 1)
        frame.pts, frame.time_base = self._last_pts, Fraction(1, TICKS_PER_S)
        self._mux(frame)

    def finish(self) -> None:
        """Writes what the encoder holds back."""
        self._mux(None)

    def _mux(self, frame: av.VideoFrame | None) -> None:
        self._output.mux(self._stream.encode(frame))

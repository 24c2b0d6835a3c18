"""Pictures and videos to RGB frames of the network's input size. Nothing broken passes in silence."""

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tracknet.data.index import Clip
from tracknet.errors import DataError

PICTURES_IN_FLIGHT = 32  # decoded ahead of the reader, so that a long clip does not fill the memory
BROKEN_PICTURE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)  # what Pillow raises
BROKEN_VIDEO = (av.FFmpegError, OSError, ValueError)

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's; from deeper ones it makes white pictures

Frame = NDArray[np.uint8]  # (H, W, 3), RGB


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in px, from the file's header. Raises DataError where it is no picture."""
    try:
        with Image.open(path) as image:
            return image.size
    except BROKEN_PICTURE as error:
        raise _broken_picture(path, error) from error


def video_size(path: Path) -> tuple[int, int]:
    """Width and height in px, from the file's header. Raises DataError where it is no video."""
    try:
        with av.open(str(path)) as container:
            stream = video_stream(path, container)
            return stream.codec_context.width, stream.codec_context.height
    except BROKEN_VIDEO as error:
        raise broken_video(path, error) from error


def decode_clip(clip: Clip, size_wh: tuple[int, int], threads: int | None = None) -> Iterator[Frame]:
    """All frames of a clip in order, resized to `size_wh`.

    Args:
        clip: the footage.
        size_wh: to make, px.
        threads: at work at once; None is one for each core that this process may use.

    Yields:
        (H, W, 3) uint8, RGB; exactly `clip.length` of them.

    Raises:
        DataError: a picture is unreadable, truncated, of more than 8 bits per colour or of another size than the clip's first; the video
            has another number of frames than the labels.
    """
    threads = threads or available_cores()
    return _decode_video(clip, size_wh, threads) if clip.frame_names is None else _decode_pictures(clip, clip.frame_names, size_wh, threads)


def read_picture(path: Path, original_wh: tuple[int, int], size_wh: tuple[int, int]) -> Frame:
    """One picture, resized; a JPEG is decoded at the smallest resolution that suffices.

    Raises:
        DataError: see `decode_clip`.
    """
    try:
        with Image.open(path) as image:
            if image.size != original_wh:
                raise DataError(f"{path}: is {_by(image.size)}, but the clip's first picture is {_by(original_wh)}")
            if image.mode not in EIGHT_BIT_MODES:
                raise DataError(f"{path}: its pixels are of Pillow's mode {image.mode}; save it with 8 bits per colour, grey or RGB")
            reduction = _reduction(original_wh, size_wh)
            if reduction > 1:
                image.draft("RGB", (original_wh[0] // reduction, original_wh[1] // reduction))
            picture = np.asarray(image.convert("RGB"))  # raises where the file is truncated; OpenCV would fill the rest with grey
    except BROKEN_PICTURE as error:
        raise _broken_picture(path, error) from error
    return resize_picture(picture, size_wh)


def _reduction(original_wh: tuple[int, int], size_wh: tuple[int, int]) -> int:
    """The largest reduction of the JPEG decoder that keeps at least `size_wh`; it divides the picture, so that no position shifts."""
    for factor in (8, 4, 2):
        if all(original % factor == 0 and original // factor >= size for original, size in zip(original_wh, size_wh, strict=True)):
            return factor
    return 1


def resize_picture(picture: Frame, size_wh: tuple[int, int]) -> Frame:
    """A picture (H, W, 3) uint8 resized to a width and height in px; itself where it has that size."""
    height, width = picture.shape[:2]
    if (width, height) == size_wh:
        return picture
    shrinks = size_wh[0] <= width and size_wh[1] <= height
    resized: Frame = np.asarray(cv2.resize(picture, size_wh, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), dtype=np.uint8)
    return resized


def _decode_pictures(clip: Clip, names: Sequence[str], size_wh: tuple[int, int], threads: int) -> Iterator[Frame]:
    with ThreadPoolExecutor(threads) as pool:  # Pillow and OpenCV let go of the interpreter's lock
        for start in range(0, len(names), PICTURES_IN_FLIGHT):
            paths = [clip.source / name for name in names[start : start + PICTURES_IN_FLIGHT]]
            yield from pool.map(lambda path: read_picture(path, clip.size_wh, size_wh), paths)


def _decode_video(clip: Clip, size_wh: tuple[int, int], threads: int) -> Iterator[Frame]:
    count = 0
    for frame in _video_frames(clip.source, clip.size_wh, size_wh, threads):
        count += 1
        if count <= clip.length:
            yield frame
    if count != clip.length:
        raise DataError(f"{clip.source}: has {count} frames, but its labels are for {clip.length}")


def _video_frames(path: Path, original_wh: tuple[int, int], size_wh: tuple[int, int], threads: int = 1) -> Iterator[Frame]:
    """Every frame of a video."""
    reformatter, number = VideoReformatter(), 0
    try:
        with av.open(str(path)) as container:
            stream = video_stream(path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            for frame in container.decode(stream):
                check_frame(path, number, frame, original_wh)
                yield scaled_frame(reformatter, frame, size_wh, threads)
                number += 1
    except BROKEN_VIDEO as error:
        raise broken_video(path, error) from error


def check_frame(path: Path, number: int, frame: av.VideoFrame, original_wh: tuple[int, int]) -> None:
    """Raises DataError where a frame is damaged or of another size than the first."""
    if frame.is_corrupt:
        raise DataError(f"{path}: frame {number} is damaged")
    if (frame.width, frame.height) != original_wh:
        raise DataError(f"{path}: frame {number} is {_by((frame.width, frame.height))}, but the first is {_by(original_wh)}")


def scaled_frame(reformatter: VideoReformatter, frame: av.VideoFrame, size_wh: tuple[int, int], threads: int = 0) -> Frame:
    """A decoded frame of a video as RGB, (H, W, 3) uint8.

    FFmpeg's swscale resizes as it changes the colours, several times faster than a resize afterwards. Training, evaluation and prediction
    scale here, so that they see the same pixels.

    Args:
        reformatter: one per video; keeps swscale's tables.
        frame: of any pixel format and size.
        size_wh: the size to make, px.
        threads: of swscale; 0 is one per core. They change no pixel.
    """
    shrinks = size_wh[0] <= frame.width and size_wh[1] <= frame.height
    interpolation = Interpolation.AREA if shrinks else Interpolation.BILINEAR
    scaled = reformatter.reformat(frame, width=size_wh[0], height=size_wh[1], format="bgr24", interpolation=interpolation, threads=threads)
    return np.asarray(cv2.cvtColor(scaled.to_ndarray(), cv2.COLOR_BGR2RGB), dtype=np.uint8)


def available_cores() -> int:
    """CPU cores that this process may use; a launcher or Slurm may have given it a part of the machine only."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def video_stream(path: Path, container: "av.container.InputContainer") -> "av.video.stream.VideoStream":
    """The video in an open file. Raises DataError where there is none."""
    if not container.streams.video:
        raise DataError(f"{path}: holds no video")
    return container.streams.video[0]


def _by(size_wh: tuple[int, int]) -> str:
    return f"{size_wh[0]}x{size_wh[1]}"


def _broken_picture(path: Path, error: Exception) -> DataError:
    reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
    return DataError(f"{path}: unreadable picture ({reason})")


def broken_video(path: Path, error: Exception) -> DataError:
    """What the user is told of one of `BROKEN_VIDEO`."""
    return DataError(f"{path}: unreadable video ({' '.join(str(getattr(error, 'strerror', None) or error).split())})")

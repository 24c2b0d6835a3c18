"""Makes small videos of every kind that the reader has to cope with. The number of each picture can be read off it."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tracknet.data.decode import Frame

SILENT_265 = {"x265-params": "log-level=none"}  # options of libx265
BITS = 10  # two rows of five squares


def numbered(number: int, size_wh: tuple[int, int] = (160, 96)) -> Frame:
    """(H, W, 3): a picture that says its number in bright and dark squares, all in the upper left three quarters; the rest is grey."""
    width, height = size_wh
    picture = np.full((height, width, 3), 110, np.uint8)
    step_x, step_y = width * 3 // 4 // 5, height * 3 // 4 // 2
    for bit in range(BITS):
        row, column = divmod(bit, 5)
        place = slice(row * step_y, (row + 1) * step_y), slice(column * step_x, (column + 1) * step_x)
        picture[place] = 220 if number >> bit & 1 else 30
    return picture


def number_of(picture: Frame) -> int:
    """The number that a `numbered` picture says, at any size."""
    height, width = picture.shape[:2]
    step_x, step_y = width * 3 / 4 / 5, height * 3 / 4 / 2
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, 5)
        value = picture[int((row + 0.5) * step_y), int((column + 0.5) * step_x)].mean()
        number |= int(value > 125) << bit
    return number


def write_numbered(
    path: Path,
    count: int = 30,
    *,
    first: int = 0,
    size_wh: tuple[int, int] = (160, 96),
    codec: str = "libx264",
    container: str | None = None,
    pix_fmt: str = "yuv420p",
    fps: Fraction | int = 25,
    times_ms: Sequence[int | None] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: float = 0,
    mirror_x: bool = False,
    colour: dict[str, int] | None = None,
    sound: str | None = None,
    sound_rate: int = 48000,
    sound_s: float | None = None,
    pixel_aspect: Fraction | None = None,
    interlaced: bool = False,
) -> Path:
    """A video of `count` numbered pictures; the picture sizes are those stored, before the rotation.

    Args:
        path: where; its ending chooses the container, unless `container` does.
        first: number of the first picture.
        times_ms: time stamps; None counts by `fps`.
        rotation: degrees, as `VideoStream.set_display_rotation` takes them.
        sound: codec of a sound track, as long as the video unless `sound_s` says so, with a click at each second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size_wh, pix_fmt
        for key, value in (colour or {}).items():
            setattr(stream.codec_context, key, value)
        if rotation or mirror_x:
            stream.set_display_rotation(rotation, hflip=mirror_x)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        track = output.add_stream(sound, rate=sound_rate) if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(first + number, size_wh), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if track is not None:
            seconds = float(count / fps) if times_ms is None else (times_ms[-1] or 0) / 1000
            for sound_frame in clicks(sound_s or seconds):
                output.mux(track.encode(sound_frame))
            output.mux(track.encode())
    return path


def clicks(seconds: float, rate: int = 48000) -> Iterable[av.AudioFrame]:
    """Silence with a 20 ms tone at the start of each second, in frames of 1024 samples."""
    samples = np.arange(round(seconds * rate))
    tone = np.where(samples % rate < rate // 50, 0.8 * np.sin(samples * 2 * np.pi * 1000 / rate), 0).astype(np.float32)
    for start in range(0, len(tone), 1024):
        piece = tone[start : start + 1024]
        frame = av.AudioFrame.from_ndarray(np.stack([piece, piece]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame


def decode_count(path: Path, thread_type: str = "NONE") -> int:
    """Frames that a plain loop of PyAV decodes, skipping what raises; for files with one video stream."""
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = thread_type
        for packet in container.demux(stream):
            try:
                count += len(packet.decode())
            except (av.error.InvalidDataError, av.error.EOFError):
                continue
    return count


def damaged_copy(path: Path, packets: Sequence[int], seed: int = 0) -> Path:
    """A copy whose listed video packets hold noise; headers and tables stay whole."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(container.streams.video[0]) if packet.size]
    data = bytearray(path.read_bytes())
    noise: NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, max(size for _, size in places), np.uint8)
    for number in packets:
        start, size = places[number]
        data[start + 4 : start + size] = noise[4:size].tobytes()  # the first 4 bytes, a length in mp4, stay
    copy = path.with_stem(f"{path.stem}_damaged")
    copy.write_bytes(data)
    return copy


def cut_copy(path: Path, share: float) -> Path:
    """A copy of the first `share` of the bytes."""
    copy = path.with_stem(f"{path.stem}_cut")
    copy.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return copy

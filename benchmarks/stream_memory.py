"""How much memory a long video takes: `uv run python benchmarks/stream_memory.py --checkpoint DIR --clip rally.mp4 --frames 10000`.

Repeats a clip until the video is as long as asked for (its packets are copied, nothing is encoded again), lets `predict` run over it and
reads the resident memory of the process. Warm-up are the first 3,000 frames: ten blocks of 300 frames with their backgrounds, for the
short peaks at a block's end do not all come in the first of them.
"""

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import psutil

from tracknet.inference.outputs import Outputs
from tracknet.inference.prediction import Request, predict
from tracknet.inference.summary import model_about
from tracknet.inference.tracker import BallTracker

WARM_UP_FRAMES = 3000
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Memory:
    """Resident memory in 1e6 bytes: the most up to the end of the warm-up, and the most behind it, the writing of the table included."""

    warm: float
    later: float

    @property
    def growth(self) -> float:
        return self.later - self.warm


def repeat_clip(clip: Path, frames: int, path: Path) -> None:
    """Writes a video of at least so many frames that shows the clip over and over; it must begin with a key frame and keep its order."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        packets = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in source.demux(stream) if packet.dts is not None]
        assert stream.average_rate is not None
        assert stream.time_base is not None
        length = round(Fraction(len(packets)) / stream.average_rate / stream.time_base)
        for round_number in range(-(-frames // len(packets))):
            for content, pts, dts, is_keyframe in packets:
                assert pts is not None
                assert dts is not None
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = copy, stream.time_base, is_keyframe
                packet.pts, packet.dts = pts + round_number * length, dts + round_number * length
                output.mux(packet)


def measure(tracker: BallTracker, model: dict[str, str], video: Path, folder: Path, warm_up_frames: int) -> tuple[Memory, str]:
    """Predicts the video into the folder, and says how much memory that took and what came out."""
    outputs, process, over = Outputs(folder, video.stem), psutil.Process(), threading.Event()
    warm = later = 0.0

    def sample() -> None:
        nonlocal warm, later
        while not over.wait(SAMPLE_SECONDS):
            resident = process.memory_info().rss / 1e6
            if later or rows(outputs.part) >= warm_up_frames:
                later = max(later, resident)
            else:
                warm = max(warm, resident)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        line = predict(video, outputs, Request(tracker, model, resume=False, overlay=False), print)
    finally:
        over.set()
        sampler.join()
    assert later, "the video ended within the warm-up"
    return Memory(warm, later), line


def rows(part: Path) -> int:
    """Frames found so far."""
    try:
        return part.read_bytes().count(b"\n") - 2
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    tracker = BallTracker.from_pretrained(arguments.checkpoint, device=arguments.device)
    with tempfile.TemporaryDirectory() as name:
        video = Path(name) / "long.mp4"
        repeat_clip(arguments.clip, arguments.frames, video)
        start = time.monotonic()
        memory, line = measure(tracker, model_about(arguments.checkpoint), video, Path(name) / "out", WARM_UP_FRAMES)
    print(line)
    print(f"{memory.warm:.0f} MB at most in the first {WARM_UP_FRAMES} frames, {memory.later:.0f} MB behind: {memory.growth:+.1f} MB")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

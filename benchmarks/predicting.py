"""From a video to its table, and ONNX against PyTorch: `uv run python benchmarks/predicting.py`, about five minutes.

The video is a real rally, 1280x720, encoded anew as H.264 with x264's own settings; the network is the tennis recipe's U-Net with random
weights, T = 3 and a background: what it finds does not change how long it takes.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from footage import tennis_videos, write_h264
from ratios import Row, alternate, seconds, significant, speed_up

from tracknet.data.decode import scaled_frame
from tracknet.inference.export import export_model
from tracknet.inference.network import TorchNetwork, load_network
from tracknet.inference.outputs import name_outputs
from tracknet.inference.prediction import Request, predict
from tracknet.inference.summary import model_about
from tracknet.inference.tracker import BATCH_WINDOWS, BallTracker
from tracknet.models import build_model
from tracknet.utils.config import build_cfg, typed

FRAMES = 1002  # whole windows
SIZE_WH, T = (512, 288), 3
CORES = 2
NAIVE = "infer_on_video.py of yastrebksv/TrackNet"


def _tennis_frames() -> Iterator[av.VideoFrame]:
    """The tennis clips one behind the other, again and again."""
    videos = tennis_videos()
    while True:
        for video in videos:
            with av.open(str(video)) as container:
                yield from container.decode(video=0)


def save_network(folder: Path) -> Path:
    config = typed(build_cfg("tennis", "unet", "tennis", dry_run=True))
    build_model(config.model, config.data, SIZE_WH).save_pretrained(folder)
    return folder


@contextmanager
def cores(count: int) -> Iterator[None]:
    """This thread, and those that it starts, on so many cores; PyTorch with so many threads."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(allowed)[:count])
    torch.set_num_threads(count)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def video_to_csv(video: Path, tracker: BallTracker, model: dict[str, str], folder: Path, count: int) -> None:
    """All that `tracknet.scripts.predict` does for a video, once torch is there and the network is loaded."""
    shutil.rmtree(folder, ignore_errors=True)
    with cores(count):
        predict(video, name_outputs([video], folder)[0], Request(tracker, model, resume=False, overlay=False), lambda line: None)


def decode_alone(video: Path) -> None:
    """Decoding and scaling on one core, and nothing else."""
    with cores(1), av.open(str(video)) as container:
        stream, reformatter = container.streams.video[0], VideoReformatter()
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for frame in container.decode(stream):
            scaled_frame(reformatter, frame, SIZE_WH)


def network_alone(network: TorchNetwork) -> None:
    """As many windows as the video has, in the stream's batches, on one core."""
    frames, background = _windows(BATCH_WINDOWS)
    with cores(1):
        for _ in range(FRAMES // (T * BATCH_WINDOWS)):
            network(frames, background)


def naive_loop(video: Path, model: Any) -> list[tuple[float, float] | None]:
    """The public script's `infer_model` and `postprocess` with this network, without gradients, and frames read as they are needed."""
    capture, last = cv2.VideoCapture(str(video)), deque[np.ndarray](maxlen=T)
    background = _windows(1)[1]
    track: list[tuple[float, float] | None] = []
    with cores(CORES), torch.no_grad():
        while True:
            has_frame, frame = capture.read()
            if not has_frame:
                return track
            last.append(frame)
            if len(last) == T:
                pictures = [np.rollaxis(cv2.resize(picture, SIZE_WH), 2, 0) for picture in last]
                window = torch.from_numpy(np.stack(pictures))[None]
                track.append(_circle(torch.sigmoid(model(window, background))[0, -1].numpy()))


def _circle(heatmap: np.ndarray) -> tuple[float, float] | None:
    _, spots = cv2.threshold((heatmap * 255).astype(np.uint8), 127, 255, cv2.THRESH_BINARY)
    circles = cv2.HoughCircles(spots, cv2.HOUGH_GRADIENT, dp=1, minDist=1, param1=50, param2=2, minRadius=2, maxRadius=7)
    return None if circles is None else (float(circles[0][0][0]), float(circles[0][0][1]))


def _windows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    width, height = SIZE_WH
    frames = torch.randint(0, 256, (count, T, 3, height, width), dtype=torch.uint8)
    return frames, frames[:, 0].clone()


def video_rows(video: Path, model: Path, folder: Path, pairs: int) -> list[Row]:
    tracker = BallTracker.from_pretrained(model, device="cpu")
    network = tracker.network
    assert isinstance(network, TorchNetwork)
    about = model_about(model)
    ours = partial(video_to_csv, video, tracker, about, folder)
    limits = {"network alone on one thread": partial(network_alone, network), "decode alone on one core": partial(decode_alone, video)}
    rates = {name: FRAMES / median(seconds(limit) for _ in range(3)) for name, limit in limits.items()}
    slower = min(rates, key=lambda name: rates[name])
    mine, limit = alternate(partial(ours, CORES), limits[slower], pairs=pairs)
    single, both = alternate(partial(ours, 1), lambda: [work() for work in limits.values()], pairs=pairs)
    mine_too, naive = alternate(partial(ours, CORES), partial(naive_loop, video, network._model), pairs=pairs)
    said = f"{_per_second(mine)} frames/s; " + ", ".join(f"{name} {significant(rate)}" for name, rate in rates.items())
    return [
        Row(f"video to CSV, {CORES} cores", f"the slower limit: {slower}", ">= 0.8 of its frames/s", speed_up(mine, limit), said),
        Row(
            "video to CSV, 1 core",
            "both limits one after the other, 1 core",
            "none",
            speed_up(single, both),
            f"{_per_second(single)} and {_per_second(both)} frames/s",
        ),
        Row(
            f"video to CSV, {CORES} cores",
            f"a window at a time, each frame in {T} windows, {CORES} threads ({NAIVE})",
            ">= 2",
            speed_up(mine_too, naive),
            f"{_per_second(mine_too)} and {_per_second(naive)} frames/s; same network; T = {T} windows alone make {T} of it on that side",
        ),
    ]


def _per_second(times: Sequence[float]) -> str:
    return significant(FRAMES / median(times))


def onnx_rows(model: Path, folder: Path, pairs: int) -> list[Row]:
    export_model(model, folder, "onnx")
    networks = {name: load_network(path, "cpu") for name, path in (("ONNX", folder), ("contiguous", model), ("channels_last", model))}
    for name, enabled in (("contiguous", False), ("channels_last", True)):
        networks[name]._model.use_channels_last(enabled)  # type: ignore[attr-defined]
    rows = []
    for threads in (1, CORES):
        with cores(threads), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            actions = {name: partial(_in_threads, pool, network, threads) for name, network in networks.items()}
            times = {name: alternate(actions["ONNX"], actions[name], pairs=pairs, warm_up=2) for name in ("contiguous", "channels_last")}
        faster = min(times, key=lambda name: median(times[name][1]))
        slower = next(name for name in times if name != faster)
        rows.append(
            Row(
                f"ONNX on the CPU, {threads} thread{'s' * (threads > 1)}",
                f"the faster of PyTorch's layouts: {faster}",
                ">= 0.9",
                speed_up(*times[faster]),
                f"{significant(median(times[faster][1]) / median(times[slower][1]))} of the time of {slower}; a window a call",
            )
        )
    return rows


def _in_threads(pool: ThreadPoolExecutor, network: Callable[..., Any], threads: int) -> None:
    """Some batches in each thread, as the stream does it."""
    batches = [_windows(BATCH_WINDOWS)] * (5 * threads)
    list(pool.map(lambda batch: network(*batch), batches))


def rows(pairs: int = 6) -> list[Row]:
    """All rows. Raises NoFootageError."""
    with tempfile.TemporaryDirectory() as name, nullcontext(Path(name)) as folder:
        video, model = folder / "rally.mp4", save_network(folder / "model")
        write_h264(video, islice(_tennis_frames(), FRAMES))
        return video_rows(video, model, folder / "predictions", pairs) + onnx_rows(model, folder / "onnx", 2 * pairs)


if __name__ == "__main__":
    for row in rows():
        print(row)

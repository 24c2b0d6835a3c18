import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from small_models import INPUT_WH, small_model
from torch import Tensor

from tracknet.data.background import FRAMES_USED
from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip, ClipIndex
from tracknet.errors import UserError
from tracknet.evaluation.run import detect_split
from tracknet.inference import stream
from tracknet.inference.network import Network
from tracknet.inference.source import TimedFrame
from tracknet.inference.stream import BLOCK_FRAMES, FrameDetection, detect_stream, first_needed, resume_point
from tracknet.inference.video import open_source
from tracknet.models import TrackNetConfig

BATCH = 4
WIDTH, HEIGHT = INPUT_WH


class ModelNetwork:
    """A small real network."""

    def __init__(self, frames: int, background: bool) -> None:
        self.model = small_model("unet", frames, background).train(False)
        self.config: TrackNetConfig = self.model.config

    @torch.no_grad()
    def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(frames, background, dropout_keys)
        return logits


class NumberNetwork:
    """Reads each frame's number from its first pixel, shows it as the place of the peak, and keeps what went in."""

    def __init__(self, frames: int, background: bool) -> None:
        self.config = TrackNetConfig(frames=frames, background=background, input_size=(64, 64), heatmap_size=(64, 64))
        self.seen: list[int] = []
        self.backgrounds: list[int] = []
        self.batches: list[int] = []

    def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
        number = frames[:, :, 0, 0, 0].long() + 64 * frames[:, :, 1, 0, 0].long()
        is_frame = frames[:, :, 2, 0, 0] > 0  # what only fills up the batch is black
        self.seen += number[is_frame].tolist()
        self.batches.append(len(frames))
        if background is not None:
            self.backgrounds += background[:, 2, -1, -1].tolist()
        logits = torch.full((*frames.shape[:2], 64, 64), -9.0)
        return logits.view(*frames.shape[:2], -1).scatter(2, number[..., None], 0.0).view(*frames.shape[:2], 64, 64)


def numbered(count: int, first: int = 0) -> Iterator[TimedFrame]:
    """Frames of 64x64 that say their number in red and green."""
    for number in range(first, count):
        picture = np.full((64, 64, 3), 255, np.uint8)
        picture[0, 0, :2] = number % 64, number // 64
        yield TimedFrame(number, number / 25, picture, (64, 64))


def number_shown(found: FrameDetection) -> int:
    return round(found.x) + 64 * round(found.y)


def rally(count: int) -> list[NDArray[np.uint8]]:
    """Noise that changes from frame to frame."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(count)]


def timed(pictures: list[NDArray[np.uint8]], first: int = 0) -> Iterator[TimedFrame]:
    for number, picture in enumerate(pictures):
        if number >= first:
            yield TimedFrame(number, number / 25, picture, (2 * WIDTH, 3 * HEIGHT))


def evaluated(folder: Path, network: ModelNetwork, length: int, cache: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What an evaluation finds in the first pictures of a folder: (n, 2) positions and (n,) scores."""
    names = tuple(sorted(path.name for path in folder.iterdir())[:length])
    clip = Clip("game", f"clip{length}", folder, names, (WIDTH, HEIGHT), 0, length)
    index = ClipIndex((clip,), np.zeros((length, 2), np.float32), np.zeros(length, np.int8))
    store = FrameStore(cache, INPUT_WH)
    store.prepare(clip)
    found = detect_split(network, index, store, batch_size=BATCH)
    assert found.row.tolist() == list(range(length))
    return found.xy_px, found.score


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, picture in enumerate(rally(count)):
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("stream") / "all", BLOCK_FRAMES)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("frames", "lengths"), [(1, [1, 2, 3, 9]), (3, [*range(1, 8), 12, 13, 299, 300]), (7, [*range(1, 16), 300])])
def test_a_clip_gives_exactly_what_its_evaluation_gives(
    pictures: Path, tmp_path: Path, frames: int, background: bool, lengths: list[int]
) -> None:
    network = ModelNetwork(frames, background)
    for length in lengths:
        folder = tmp_path / f"first{length}"
        folder.mkdir()
        for path in sorted(pictures.iterdir())[:length]:
            (folder / path.name).symlink_to(path)
        xy_px, score = evaluated(folder, network, length, tmp_path / "cache")
        found = list(detect_stream(open_source(folder).frames(INPUT_WH), network, BATCH))
        assert [detection.number for detection in found] == list(range(length))
        np.testing.assert_array_equal([[detection.x, detection.y] for detection in found], xy_px)
        np.testing.assert_array_equal([detection.score for detection in found], score)


@given(
    count=st.integers(0, 100),
    frames=st.integers(1, 9),
    batch=st.integers(1, 5),
    background=st.booleans(),
    block=st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_each_frame_goes_in_once_and_is_answered_in_order(count: int, frames: int, batch: int, background: bool, block: int) -> None:
    network = NumberNetwork(frames, background)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK_FRAMES", block)
        found = list(detect_stream(numbered(count), network, batch))
    assert [detection.number for detection in found] == list(range(count))
    assert [number_shown(detection) for detection in found] == list(range(count))
    again = {number: times - 1 for number, times in Counter(network.seen).items() if times > 1}
    assert sorted(set(network.seen)) == list(range(count))
    assert sum(again.values()) < frames  # the last window alone is moved back, or repeats the last frame of a short clip
    assert all(number >= count - frames for number in again)
    assert set(network.batches) <= {batch}
    assert len(network.batches) == sum(math.ceil(windows / batch) for windows in _windows_of_blocks(count, frames, background, block))


def _windows_of_blocks(count: int, frames: int, background: bool, block: int) -> list[int]:
    """How many windows stand in each block; without background all are one block."""
    windows = math.ceil(count / frames)
    whole = max(block, frames) // frames if background else windows
    return [min(whole, windows - first) for first in range(0, windows, whole)] if windows else []


@given(count=st.integers(1, 60), frames=st.integers(1, 5), batch=st.integers(1, 4), background=st.booleans(), answered=st.integers(0, 60))
@example(count=37, frames=3, batch=1, background=True, answered=36)  # the footage ends before the last block is whole
@settings(max_examples=20, deadline=None)
def test_from_a_resume_point_the_answers_are_those_of_a_run_from_the_start(
    count: int, frames: int, batch: int, background: bool, answered: int
) -> None:
    network, clip = _small_network(frames, background), rally(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK_FRAMES", 11)
        whole = list(detect_stream(timed(clip), network, batch))
        start = resume_point(min(answered, count), network, batch)
        rest = list(detect_stream(timed(clip, first_needed(start, network)), network, batch, start))
    assert start <= answered
    assert rest == whole[start:]


_NETWORKS: dict[tuple[int, bool], ModelNetwork] = {}


def _small_network(frames: int, background: bool) -> ModelNetwork:
    return _NETWORKS.setdefault((frames, background), ModelNetwork(frames, background))


def test_a_resume_point_lies_a_block_back_at_most() -> None:
    for frames in (1, 3, 5, 7, 8):
        for batch in (1, 4, 8, 13, 1000):
            network: Network = NumberNetwork(frames, True)
            points = {resume_point(answered, network, batch) for answered in range(0, 20000, 10)}
            assert max(np.diff(sorted(points))) <= BLOCK_FRAMES


@pytest.mark.parametrize(("tail", "expected"), [(0, [10]), (1, [10]), (20, [10]), (200, [200]), (299, [200])])
def test_the_background_of_a_tail_is_that_of_the_last_frames(tail: int, expected: list[int]) -> None:
    network = NumberNetwork(3, True)

    def frames() -> Iterator[TimedFrame]:
        for frame in numbered(600 + tail):
            frame.picture[1:] = 10 if frame.number < 600 else 200
            yield frame

    assert len(list(detect_stream(frames(), network, 1))) == 600 + tail
    assert set(network.backgrounds[:200]) == {10}
    assert sorted(set(network.backgrounds[200:])) == (expected if tail else [])


def test_every_frame_has_its_position_in_px_of_its_own_picture() -> None:
    sizes = [(64, 64), (128, 128), (640, 320)]
    frames = [TimedFrame(frame.number, frame.time_s, frame.picture, sizes[frame.number // 30]) for frame in numbered(90)]
    for found in detect_stream(frames, NumberNetwork(3, True), BATCH):
        scale = found.original_wh[0] / 64, found.original_wh[1] / 64
        x, y = (found.number % 64 + 0.5) * scale[0] - 0.5, (found.number // 64 + 0.5) * scale[1] - 0.5
        assert (found.x, found.y) == pytest.approx((x, y), abs=0.51 * max(scale))
        assert found.original_wh == sizes[found.number // 30]


@pytest.mark.parametrize(("background", "most"), [(True, BLOCK_FRAMES + 3 * FRAMES_USED + 3 * BATCH * 3), (False, 6 * BATCH * 3)])
def test_no_more_frames_are_held_than_a_block_or_without_background_some_batches(background: bool, most: int) -> None:
    network = NumberNetwork(3, background)
    frame_bytes = next(numbered(1)).picture.nbytes
    tracemalloc.start()
    try:
        for _ in detect_stream(numbered(1500), network, BATCH):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1.2 * most * frame_bytes


def test_a_batch_that_memory_does_not_hold_is_named() -> None:
    with pytest.raises(UserError, match="out of memory with 1000000000 windows at once; lower --batch-size"):
        list(detect_stream(numbered(5), NumberNetwork(3, True), 10**9))


def test_a_network_gone_astray_is_named() -> None:
    class Astray(NumberNetwork):
        def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
            return super().__call__(frames, background) * float("nan")

    with pytest.raises(UserError, match="not finite"):
        list(detect_stream(numbered(5), Astray(3, False), BATCH))

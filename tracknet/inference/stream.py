"""A network over footage of any length: each frame goes in once, and memory stays as it is."""

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracknet.data.background import FRAMES_USED, frames_used, median_picture
from tracknet.data.batch import as_stored, empty_pictures
from tracknet.errors import UserError
from tracknet.geometry import resize_points
from tracknet.heatmap import decode_peaks
from tracknet.inference.ahead import ReadAhead
from tracknet.inference.network import Network, device_of
from tracknet.inference.source import TimedFrame
from tracknet.inference.track import DECIMALS
from tracknet.out_of_memory import is_out_of_memory

BATCHES_AT_ONCE = 16  # on a CPU; more would hold more frames than a block
BLOCK_FRAMES = 300  # share one background; 10 to 12 s of video, in which a camera pans little, and 130 MB at 512x288


@dataclass(frozen=True)
class FrameDetection:
    """The highest peak of one frame, whether or not it is a ball.

    Attributes:
        number: of the frame, from 0.
        time_s: as in `TimedFrame`.
        x: px of the frame's own original picture, to 3 decimals; its first pixel's centre is 0.
        y: as x.
        score: the peak's probability, 0 to 1, to 6 decimals.
        original_wh: width and height of that picture.
    """

    number: int
    time_s: float
    x: float
    y: float
    score: float
    original_wh: tuple[int, int]


@dataclass(frozen=True)
class _Window:
    """T frames that go in together; those from `answers_from` on are answered."""

    frames: list[TimedFrame]
    background: NDArray[np.uint8] | None
    answers_from: int

    @property
    def first_answered(self) -> int:
        """Number of the first frame that is answered."""
        return self.frames[self.answers_from].number


def detect_stream(frames: Iterable[TimedFrame], network: Network, batch_windows: int, answer_from: int = 0) -> Iterator[FrameDetection]:
    """Finds the peak of every frame, in order, holding `BLOCK_FRAMES` frames and those of the batches at work, twice.

    The frames are read on a thread of their own, while others are at work and while whoever takes the answers writes them: as soon as
    one is answered, another is read.

    Windows of T frames stand end to end, and the last one of the footage is moved back to end with it, as in an evaluation; footage
    shorter than T repeats its last frame. The background is the median picture of 25 frames spread over the block of `BLOCK_FRAMES`
    frames, so that footage of up to that length gives exactly what an evaluation of it gives; where it is longer, an evaluation takes one
    median of the whole clip, and the two differ a little. Behind the last whole block the median is that of the footage's last frames.

    On a CPU each batch is the work of one thread, as in an evaluation: sums that several threads share come out in another last bit.

    Args:
        frames: from number 0 on without gaps; with `answer_from`, from `first_needed` on.
        network: what to run.
        batch_windows: windows that go in together.
        answer_from: number of the first frame to answer, a `resume_point`; the answers from there on are those of a run from the start.

    Raises:
        UserError: the network's output is not finite; memory runs out.
    """
    length = network.config.frames
    on_cpu, threads = device_of(network) == "cpu", torch.get_num_threads()
    workers = min(threads, BATCHES_AT_ONCE) if on_cpu else 1
    at_work = (workers + 1) * batch_windows * length
    most = _block_frames(length, network.config.background) + 2 * at_work + 2 * length  # what makes up a block can always be read
    copies = (replace(frame, picture=_own_copy(frame.picture)) for frame in frames)
    running: deque[Future[list[FrameDetection]]] = deque()
    try:
        with (
            ReadAhead(copies, most) as ahead,
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1 if on_cpu else threads,)) as pool,
        ):
            windows = _answered(_windows(ahead, length, network.config.background), answer_from, ahead.done)
            for batch in _batches(windows, _unit_frames(network, batch_windows), batch_windows):
                running.append(pool.submit(_answers, batch, network, batch_windows))
                del batch  # its frames go as soon as it is done
                if len(running) > workers:  # so that none of them waits for the next batch
                    yield from _finished(running.popleft(), ahead.done)
            while running:
                yield from _finished(running.popleft(), ahead.done)
    finally:
        torch.set_num_threads(threads)  # what the pool sets holds for threads that are yet to come too


def _answered(windows: Iterable[_Window], answer_from: int, done: Callable[[int], None]) -> Iterator[_Window]:
    """The windows that are to be answered; the frames of the others are done."""
    for window in windows:
        if window.first_answered >= answer_from:
            yield window
        else:
            done(len(window.frames) - window.answers_from)


def _finished(work: "Future[list[FrameDetection]]", done: Callable[[int], None]) -> list[FrameDetection]:
    """What a batch has found."""
    found = work.result()
    done(len(found))
    return found


def resume_point(frames_answered: int, network: Network, batch_windows: int) -> int:
    """The last frame number, up to `frames_answered`, at which a block begins; without background a batch."""
    unit = _unit_frames(network, batch_windows)
    return frames_answered // unit * unit


def first_needed(answer_from: int, network: Network) -> int:
    """Number of the first frame that `detect_stream` must be given to go on from a `resume_point`: two blocks before it.

    One for the background behind the last whole block; and that block may be the one before the last, for where T does not divide
    `BLOCK_FRAMES`, a block looks a few frames farther than it answers.
    """
    return max(0, answer_from - 2 * _block_windows(network) * network.config.frames)


def _unit_frames(network: Network, batch_windows: int) -> int:
    """Frames from one resume point to the next; none of their batches holds others."""
    return (_block_windows(network) if network.config.background else batch_windows) * network.config.frames


def _block_windows(network: Network) -> int:
    """Windows of a block that is not the last."""
    return _block_frames(network.config.frames, network.config.background) // network.config.frames


def _block_frames(window_frames: int, with_background: bool) -> int:
    """Frames that are held until their windows are made."""
    return max(BLOCK_FRAMES, window_frames) if with_background else window_frames


def _batches(windows: Iterable[_Window], unit_frames: int, batch_windows: int) -> Iterator[list[_Window]]:
    """The windows, so many at once; no batch holds windows of two units, so that a run that goes on at one makes the same batches."""
    for _, unit in groupby(windows, key=lambda window: window.first_answered // unit_frames):
        while batch := list(islice(unit, batch_windows)):
            yield batch


def _windows(frames: Iterable[TimedFrame], length: int, with_background: bool) -> Iterator[_Window]:
    """All windows in order. Frames that a whole block leaves over because T does not divide it begin the next block."""
    block_frames = _block_frames(length, with_background)
    held: list[TimedFrame] = []
    before: list[TimedFrame] = []  # the last ones that windows have answered, for the window that is moved back
    samples: list[NDArray[np.uint8]] = []  # that make the background
    unseen = 0  # how many of those held the background does not know
    for frame in frames:
        held.append(frame)
        unseen += 1
        if len(held) < block_frames:
            continue
        if with_background:
            samples, unseen = _spread(held), 0
        whole = len(held) - len(held) % length
        block, before, held = held[:whole], held[whole - length : whole], held[whole:]
        yield from _end_to_end(block, length, _median(samples))
    if not held:
        return
    if with_background and unseen:
        new = _spread(held) if not samples else _spread(held[-unseen:], math.ceil(FRAMES_USED * unseen / block_frames))
        samples = [*samples, *new][-FRAMES_USED:]
    background = _median(samples)
    whole = len(held) - len(held) % length
    yield from _end_to_end(held[:whole], length, background)
    if whole < len(held):
        last = [*before, *held][-length:]
        answers_from = len(last) - (len(held) - whole)
        yield _Window(last + [last[-1]] * (length - len(last)), background, answers_from)


def _own_copy(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy, for PyAV's pictures keep the whole decoded frame alive, and whoever gives arrays may use one buffer again and again.

    In pages of its own, which go back to the system with it: on the heap the many pictures that come and go leave holes, and a process
    that works for hours grows.
    """
    own = np.frombuffer(mmap.mmap(-1, picture.nbytes), np.uint8).reshape(picture.shape)
    np.copyto(own, picture)
    return own


def _end_to_end(frames: list[TimedFrame], length: int, background: NDArray[np.uint8] | None) -> Iterator[_Window]:
    """Windows of all these frames, which leave the list one after the other."""
    while frames:
        window = _Window(frames[:length], background, answers_from=0)
        del frames[:length]
        yield window


def _spread(frames: list[TimedFrame], count: int | None = None) -> list[NDArray[np.uint8]]:
    """The pictures of some frames spread over these; without a count as many as a background takes."""
    chosen = frames_used(len(frames)) if count is None else np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return [frames[position].picture for position in chosen]


def _median(samples: list[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    return median_picture(np.stack(samples)) if samples else None


def _answers(windows: list[_Window], network: Network, batch_windows: int) -> list[FrameDetection]:
    """Runs one batch and reads the peaks of the frames that its windows answer."""
    try:
        batch = _batch(windows, batch_windows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory with {batch_windows} windows at once; lower --batch-size (BallTracker: batch_windows)") from None
    logits = network(*batch)[: len(windows)]
    height, width = windows[0].frames[0].picture.shape[:2]
    xy_heatmap, score = decode_peaks(logits)
    if not torch.isfinite(score).all():
        raise UserError("the network's output is not finite; take another checkpoint of its run")
    xy_input = resize_points(xy_heatmap.double(), (logits.shape[-1], logits.shape[-2]), (width, height)).numpy()
    found: list[FrameDetection] = []
    for number, window in enumerate(windows):
        answered = range(window.answers_from, len(window.frames))
        for position in answered:
            frame = window.frames[position]
            if found and frame.number <= found[-1].number:
                continue  # a copy of the last frame, where the footage is shorter than a window
            found.append(_detection(frame, xy_input[number, position], float(score[number, position]), (width, height)))
    return found


def _batch(windows: list[_Window], batch_windows: int) -> tuple[Tensor, Tensor | None]:
    """The windows as tensors, filled up with zeros: for one shape, one computation and the same bits."""
    height, width = windows[0].frames[0].picture.shape[:2]
    frames = empty_pictures(batch_windows, len(windows[0].frames), size_wh=(width, height))
    background = None if windows[0].background is None else empty_pictures(batch_windows, size_wh=(width, height))
    for number, window in enumerate(windows):
        for position, frame in enumerate(window.frames):
            as_stored(frames)[number, position].numpy()[:] = frame.picture
        if background is not None and window.background is not None:
            as_stored(background)[number].numpy()[:] = window.background
    for pictures in (frames, background):
        if pictures is not None:
            pictures[len(windows) :] = 0
    return frames, background


def _detection(frame: TimedFrame, xy_input: NDArray[np.float64], score: float, input_wh: tuple[int, int]) -> FrameDetection:
    x, y = resize_points(xy_input, input_wh, frame.original_wh)
    return FrameDetection(
        number=frame.number,
        time_s=float(np.round(frame.time_s, DECIMALS["time_s"])),
        x=float(np.round(x, DECIMALS["x"])),
        y=float(np.round(y, DECIMALS["y"])),
        score=float(np.round(score, DECIMALS["score"])),
        original_wh=frame.original_wh,
    )

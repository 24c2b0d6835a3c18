"""Windows of T frames with their labels."""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from tracknet.data.augment import TrainingTransform, draw_augmentation
from tracknet.data.batch import Batch, Block, as_stored
from tracknet.data.frames import FrameStore
from tracknet.data.index import NO_LABEL, Clip, ClipIndex
from tracknet.geometry import inside, resize_points
from tracknet.schema.data import SequenceConfig


def _own_memory(byte_count: int) -> torch.Tensor:
    return torch.empty(byte_count, dtype=torch.uint8)


class WindowDataset:
    """Windows of T neighbouring frames, each inside one clip.

    For training (a `TrainingTransform` is given) windows start at 0, stride, 2 * stride, ... as long as T frames follow; they count none.
    For evaluation they stand end to end, the last one moved back into the clip, and each frame is counted in one window. A clip shorter
    than T repeats its last frame; the copies are neither labelled nor counted. A window's key is (epoch, window): it is a function of
    (seed, epoch, window) alone, so worker processes hold no state.

    Args:
        index: clips and labels.
        store: holds the frames of all those clips, prepared.
        sequence: T and stride; not enabled, T and stride are 1.
        background: whether windows carry the clip's median picture.
        seed: of the augmentation.
        training: what to draw; None for evaluation.
    """

    def __init__(
        self,
        index: ClipIndex,
        store: FrameStore,
        sequence: SequenceConfig,
        *,
        background: bool,
        seed: int,
        training: TrainingTransform | None,
    ) -> None:
        self.index = index
        self.store = store
        self.window_frames = sequence.window_frames
        self.background = background
        self.seed = seed
        self.training = training
        stride = sequence.stride if sequence.enabled else 1
        self._first_row = np.array([clip.first_row for clip in index.clips], np.int64)
        self._length = np.array([clip.length for clip in index.clips], np.int64)
        self._clip_of_window, self._start, self._counted_from = _windows(
            self._length, self.window_frames, None if training is None else stride
        )
        self._xy_input = np.zeros((len(index), 2), np.float32)
        self._is_inside = np.zeros(len(index), np.bool_)
        for (size_wh, input_wh), clips in groupby(index.clips, lambda clip: (clip.size_wh, store.size_wh(clip))):  # often all in one
            first, *others = clips
            last = others[-1] if others else first
            rows = slice(first.first_row, last.first_row + last.length)
            self._xy_input[rows] = resize_points(index.xy_px[rows], size_wh, input_wh)
            self._is_inside[rows] = inside(self._xy_input[rows], input_wh)

    def __len__(self) -> int:
        return len(self._start)

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the frames that it gives."""
        if self.training is not None and self.training.crop_wh is not None:
            return self.training.crop_wh
        return self.store.size_wh(self.index.clips[0])

    def describe(self, window: int) -> str:
        """Names a window for a message: `game1/Clip2 frames 10-12`."""
        clip, first = self.index.clips[self._clip_of_window[window]], int(self._start[window])
        return f"{clip.id} frames {first}-{first + self.window_frames - 1}"

    def block(self, keys: Sequence[tuple[int, int]], allocate: Callable[[int], torch.Tensor] = _own_memory) -> Block:
        """The windows of some keys (epoch, window) in one piece of memory; of no keys, a batch of no windows whose shapes are right.

        Args:
            keys: of the windows, in order.
            allocate: gives uint8 memory of so many bytes.

        Raises:
            DataError: the cache has lost a clip and it cannot be decoded again.
        """
        block = Block(len(keys), self.window_frames, self.size_wh, self.background)
        block = block.within(allocate(block.byte_count))
        batch, windows = block.batch(), [window for _, window in keys]
        self._fill_labels(batch, np.array(windows, np.int64))
        if self.training is None or self.training.changes_nothing:
            self._copy(batch, windows)
        else:
            self._augment(batch, keys, self.training)
        return block

    def batch(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """As `block`, in memory of this process."""
        return self.block(keys).batch()

    def _fill_labels(self, batch: Batch, windows: NDArray[np.int64]) -> None:
        """All but the pictures, as it is without augmentation."""
        clips = self._clip_of_window[windows]
        positions = self._start[windows, None] + np.arange(self.window_frames)
        is_real = positions < self._length[clips, None]
        frame_row = self._first_row[clips, None] + np.minimum(positions, self._length[clips, None] - 1)
        visibility = self.index.visibility[frame_row]
        visible = (visibility >= 1) & self._is_inside[frame_row]
        batch.xy_input.numpy()[:] = self._xy_input[frame_row] * visible[..., None]
        batch.visible.numpy()[:] = visible
        batch.labeled.numpy()[:] = is_real & (visibility != NO_LABEL)
        batch.sample_index.numpy()[:] = windows
        batch.frame_row.numpy()[:] = frame_row
        batch.counted.numpy()[:] = is_real & (positions >= self._counted_from[windows, None])

    def _copy(self, batch: Batch, windows: Sequence[int]) -> None:
        """The pictures as they are stored, each window in one piece."""
        frames, background = _arrays(batch)
        for number, window in enumerate(windows):
            frames[number] = self._stored(window)
            if background is not None:
                background[number] = self.store.background(self._clip(window))

    def _augment(self, batch: Batch, keys: Sequence[tuple[int, int]], training: TrainingTransform) -> None:
        """Each window under one draw, the same for its frames, its positions and its background; its labels are there already."""
        frames, background = _arrays(batch)
        xy_input, visible = batch.xy_input.numpy(), batch.visible.numpy()
        others = [batch.labeled.numpy(), batch.frame_row.numpy(), batch.counted.numpy()]
        for number, (epoch, window) in enumerate(keys):
            clip = self._clip(window)
            rng = np.random.default_rng([self.seed, epoch, window])
            drawn = draw_augmentation(rng, training, self.store.size_wh(clip), xy_input[number], visible[number])
            step = -1 if drawn.reverse else 1
            pictures, places = list(self._stored(window)[::step]), list(frames[number])
            if background is not None:
                pictures.append(self.store.background(clip))
                places.append(background[number])
            drawn.change(pictures, places)
            moved = drawn.affine(xy_input[number])
            is_seen = visible[number] & inside(moved, drawn.size_wh)
            xy_input[number], visible[number] = (moved * is_seen[:, None])[::step], is_seen[::step]
            for rows in others:
                rows[number] = rows[number, ::step].copy()

    def _clip(self, window: int) -> Clip:
        return self.index.clips[int(self._clip_of_window[window])]

    def _stored(self, window: int) -> NDArray[np.uint8]:
        """The frames of a window, (T, H, W, 3); part of a memory map where the clip has so many."""
        clip, first = self._clip(window), int(self._start[window])
        count = min(self.window_frames, clip.length)
        stored = self.store.window(clip, first, count)
        return stored if count == self.window_frames else np.concatenate([stored, stored[-1:].repeat(self.window_frames - count, axis=0)])


def _arrays(batch: Batch) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """The memory of the pictures: frames (B, T, H, W, 3), backgrounds (B, H, W, 3)."""
    return as_stored(batch.frames).numpy(), None if batch.background is None else as_stored(batch.background).numpy()


def _windows(lengths: NDArray[np.int64], frames: int, stride: int | None) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Of each window: the number of its clip, its first frame and the first frame that it counts.

    Args:
        lengths: of the clips.
        frames: T.
        stride: from window to window; None is for evaluation.
    """
    last = np.maximum(lengths - frames, 0)
    counts = -(-lengths // frames) if stride is None else last // stride + 1
    clips = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    number_in_clip = np.arange(len(clips)) - np.repeat(np.cumsum(counts) - counts, counts)
    if stride is not None:
        return clips, number_in_clip * stride, lengths[clips]  # training counts none
    counted_from = number_in_clip * frames
    return clips, np.minimum(counted_from, last[clips]), counted_from

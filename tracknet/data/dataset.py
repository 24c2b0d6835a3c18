"""Windows of T frames with their labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tracknet.data.augment import TrainingTransform, apply_gain, draw_augmentation, warp
from tracknet.data.batch import Batch
from tracknet.data.frames import FrameStore
from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.geometry import inside, resize_points
from tracknet.schema.data import SequenceConfig


@dataclass(frozen=True)
class Sample:
    """One window, before it joins a `Batch`, whose fields these are."""

    frames: NDArray[np.uint8]  # (T, H, W, 3)
    background: NDArray[np.uint8] | None  # (H, W, 3)
    xy_input: NDArray[np.float32]  # (T, 2)
    visible: NDArray[np.bool_]  # (T,)
    labeled: NDArray[np.bool_]  # (T,)
    sample_index: int
    frame_row: NDArray[np.int64]  # (T,)
    counted: NDArray[np.bool_]  # (T,)


class WindowDataset(Dataset[Sample]):
    """Windows of T neighbouring frames, each inside one clip.

    For training (a `TrainingTransform` is given) windows start at 0, stride, 2 * stride, ... as long as T frames follow; they count none.
    For evaluation they stand end to end, the last one moved back into the clip, and each frame is counted in one window. A clip shorter
    than T repeats its last frame; the copies are neither labelled nor counted. An item's key is (epoch, window): an item is a function of
    (seed, epoch, window) alone, so worker processes hold no state.

    Args:
        index: clips and labels.
        store: holds the frames of all those clips, prepared.
        sequence: T and stride; not enabled, T and stride are 1.
        background: whether samples carry the clip's median picture.
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
        self._clip_of_window, self._start, self._counted_from = _windows(index, self.window_frames, None if training is None else stride)
        input_points = [resize_points(index.xy_px[index.rows(clip)], clip.size_wh, store.size_wh(clip)) for clip in index.clips]
        self._xy_input = np.concatenate([np.zeros((0, 2)), *input_points]).astype(np.float32)

    def __len__(self) -> int:
        return len(self._start)

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the frames that it gives."""
        if self.training is not None and self.training.crop_wh is not None:
            return self.training.crop_wh
        return self.store.size_wh(self.index.clips[0])

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The window `key[1]` as it is in epoch `key[0]`. Raises DataError where the cache has lost the clip."""
        epoch, window = key
        clip = self.index.clips[self._clip_of_window[window]]
        positions = self._start[window] + np.arange(self.window_frames)
        real = positions < clip.length
        positions = np.minimum(positions, clip.length - 1)
        rows = clip.first_row + positions
        visible = (self.index.visibility[rows] >= 1) & inside(self._xy_input[rows], self.store.size_wh(clip))
        stored = self.store.frames(clip)
        sample = Sample(
            frames=stored[positions[0] : positions[0] + self.window_frames]
            if real.all()
            else stored[positions],  # the first copies nothing
            background=self.store.background(clip) if self.background else None,
            xy_input=self._xy_input[rows] * visible[:, None],
            visible=visible,
            labeled=real & (self.index.visibility[rows] != NO_LABEL),
            sample_index=window,
            frame_row=rows.astype(np.int64),
            counted=real & (positions >= self._counted_from[window]),
        )
        if self.training is None:
            return sample
        return _augmented(sample, self.training, np.random.default_rng([self.seed, epoch, window]))

    def describe(self, window: int) -> str:
        """Names a window for a message: `game1/Clip2 frames 10-12`."""
        clip, first = self.index.clips[self._clip_of_window[window]], int(self._start[window])
        return f"{clip.id} frames {first}-{first + self.window_frames - 1}"

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Joins windows; of none it makes a batch of no windows whose shapes are otherwise right."""
        (width, height), count = self.size_wh, len(samples)
        frames = torch.empty((count, self.window_frames, 3, height, width), dtype=torch.uint8)
        background = torch.empty((count, 3, height, width), dtype=torch.uint8) if self.background else None
        for number, sample in enumerate(samples):
            np.copyto(frames[number].numpy(), sample.frames.transpose(0, 3, 1, 2))
            if background is not None and sample.background is not None:
                np.copyto(background[number].numpy(), sample.background.transpose(2, 0, 1))

        def joined(rows: list[NDArray[np.generic]], dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.as_tensor(np.array(rows), dtype=dtype).reshape(count, *shape)

        return Batch(
            frames=frames,
            background=background,
            xy_input=joined([sample.xy_input for sample in samples], torch.float32, self.window_frames, 2),
            visible=joined([sample.visible for sample in samples], torch.bool, self.window_frames),
            labeled=joined([sample.labeled for sample in samples], torch.bool, self.window_frames),
            sample_index=torch.tensor([sample.sample_index for sample in samples], dtype=torch.int64),
            frame_row=joined([sample.frame_row for sample in samples], torch.int64, self.window_frames),
            counted=joined([sample.counted for sample in samples], torch.bool, self.window_frames),
        )


def _augmented(sample: Sample, training: TrainingTransform, rng: np.random.Generator) -> Sample:
    """The window under one draw, the same for its frames, its positions and its background."""
    height, width = sample.frames.shape[1:3]
    drawn = draw_augmentation(rng, training, (width, height), sample.xy_input, sample.visible)
    order = slice(None, None, -1 if drawn.reverse else 1)

    def change(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return apply_gain(warp(picture, drawn.affine, drawn.size_wh), drawn.gain)

    xy_input = drawn.affine(sample.xy_input)
    visible = sample.visible & inside(xy_input, drawn.size_wh)
    return Sample(
        frames=np.stack([change(frame) for frame in sample.frames[order]]),
        background=None if sample.background is None else change(sample.background),
        xy_input=(xy_input * visible[:, None]).astype(np.float32)[order],
        visible=visible[order],
        labeled=sample.labeled[order],
        sample_index=sample.sample_index,
        frame_row=sample.frame_row[order],
        counted=sample.counted[order],
    )


def _windows(index: ClipIndex, length: int, stride: int | None) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Of each window: the number of its clip, its first frame and the first frame that it counts. `stride` None is for evaluation."""
    clips: list[int] = []
    starts: list[int] = []
    counted_from: list[int] = []
    for number, clip in enumerate(index.clips):
        last = max(clip.length - length, 0)
        if stride is None:
            first_counted = list(range(0, clip.length, length))
            first = [min(position, last) for position in first_counted]
        else:
            first = list(range(0, last + 1, stride))
            first_counted = [clip.length] * len(first)  # training counts none
        clips += [number] * len(first)
        starts += first
        counted_from += first_counted
    return np.array(clips, np.int32), np.array(starts, np.int64), np.array(counted_from, np.int64)

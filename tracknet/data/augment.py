"""Training augmentation: one draw per window, the same for all its frames, its points and its background.

Pure functions; the only randomness is the generator that is handed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tracknet.geometry import Affine, horizontal_flip, scaling, translation
from tracknet.schema.data import DataConfig

COLOUR_SHARE = 0.25  # a colour channel's own gain is drawn from 1 - 0.25 b to 1 + 0.25 b, where b is `data.augment.brightness`
MARGIN = 2  # px around the source of a crop, so that interpolation finds its neighbours


@dataclass(frozen=True)
class TrainingTransform:
    """From what the draws are made; the keys of `data.augment` and `data.preprocess.flip_prob`."""

    flip_prob: float
    scale: tuple[float, float]  # smallest, largest
    brightness: float
    reverse_prob: float
    crop_wh: tuple[int, int] | None  # input px
    crop_ball_prob: float

    @property
    def changes_nothing(self) -> bool:
        """Whether every draw leaves the window as it is stored."""
        return not (self.flip_prob or self.brightness or self.reverse_prob) and self.scale == (1.0, 1.0) and self.crop_wh is None


@dataclass(frozen=True)
class Augmentation:
    """One draw."""

    affine: Affine  # xy_input of the stored frame -> xy_input of what the network sees
    size_wh: tuple[int, int]  # of what the network sees
    gain: NDArray[np.float64]  # (3,), per colour
    reverse: bool  # play the window backwards

    def change(self, pictures: Sequence[NDArray[np.uint8]], into: Sequence[NDArray[np.uint8]]) -> None:
        """Pictures of the window, each (H, W, 3) uint8, into as many places for the changed ones, each contiguous (h, w, 3) uint8."""
        warp(pictures, self.affine, into)
        apply_gain(into, self.gain)


def training_transform(config: DataConfig) -> TrainingTransform:
    """The transform that the configuration asks for."""
    augment = config.augment
    return TrainingTransform(
        flip_prob=config.preprocess.flip_prob,
        scale=(augment.scale[0], augment.scale[1]),
        brightness=augment.brightness,
        reverse_prob=augment.reverse_prob,
        crop_wh=None if augment.crop is None else (augment.crop[0], augment.crop[1]),
        crop_ball_prob=augment.crop_ball_prob,
    )


def draw_augmentation(
    rng: np.random.Generator,
    transform: TrainingTransform,
    input_wh: tuple[int, int],
    xy_input: NDArray[np.floating],
    visible: NDArray[np.bool_],
) -> Augmentation:
    """Draws for one window.

    Flip first, then scale, then the crop, which is as large whatever the scale. Without a crop the scaled picture is cut or widened about
    its centre to the size that it had.

    Args:
        rng: the window's own generator.
        transform: what may be drawn.
        input_wh: size of the stored frames.
        xy_input: (T, 2) positions of the ball in them.
        visible: (T,) bool.
    """
    affine = horizontal_flip(input_wh[0]) if rng.random() < transform.flip_prob else translation(0.0, 0.0)
    scale = rng.uniform(*transform.scale)
    gain = rng.uniform(1 - transform.brightness, 1 + transform.brightness) * np.ones(3)
    gain *= rng.uniform(1 - COLOUR_SHARE * transform.brightness, 1 + COLOUR_SHARE * transform.brightness, size=3)
    reverse = bool(rng.random() < transform.reverse_prob)
    affine = affine.then(scaling(scale))
    scaled_wh = (scale * input_wh[0], scale * input_wh[1])
    if transform.crop_wh is None:
        centred = translation((input_wh[0] - scaled_wh[0]) / 2, (input_wh[1] - scaled_wh[1]) / 2)
        return Augmentation(affine.then(centred), input_wh, gain, reverse)
    ball = None
    if rng.random() < transform.crop_ball_prob and visible.any():
        ball = affine(xy_input[rng.choice(np.flatnonzero(visible))])
    left, top = (_crop_start(rng, scaled_wh[axis], transform.crop_wh[axis], None if ball is None else float(ball[axis])) for axis in (0, 1))
    return Augmentation(affine.then(translation(-left, -top)), transform.crop_wh, gain, reverse)


def _crop_start(rng: np.random.Generator, scaled: float, crop: int, ball: float | None) -> int:
    """The crop's first pixel on one axis: uniform over the places inside the picture, and over those that hold the ball if there is one.

    Whole numbers, so that a crop without scaling copies pixels. Where the picture is smaller than the crop, it lies anywhere inside it.
    """
    low, high = min(0, int(np.floor(scaled - crop))), max(0, int(np.ceil(scaled - crop)))
    if ball is not None:
        low = max(low, int(np.floor(ball - crop + 0.5)) + 1)
        high = min(high, int(np.floor(ball + 0.5)))
    return int(rng.integers(min(low, high), high + 1))


def warp(pictures: Sequence[NDArray[np.uint8]], affine: Affine, into: Sequence[NDArray[np.uint8]]) -> None:
    """Pictures of one size under one affine map, interpolated linearly; beyond their border, the border goes on.

    Only the part that the result needs is read. The result is the same as if the whole picture had been warped.

    Args:
        pictures: each (H, W, 3) uint8; may be memory maps.
        affine: px of a picture -> px of its result; axes stay axes (no rotation).
        into: places for the results, each contiguous (h, w, 3) uint8.
    """
    (height, width), size_wh = pictures[0].shape[:2], (into[0].shape[1], into[0].shape[0])
    corners = affine.inverse()(np.array([[0.0, 0.0], [size_wh[0] - 1.0, size_wh[1] - 1.0]]))
    low, high = corners.min(axis=0), corners.max(axis=0)
    if _copies_pixels(affine) and low.min() >= 0 and high[0] < width and high[1] < height:
        (left, top), (right, bottom) = low.astype(int), high.astype(int)
        for picture, place in zip(pictures, into, strict=True):
            part = picture[top : bottom + 1, left : right + 1]
            if affine.matrix[0, 0] > 0:
                place[:] = part
            else:
                cv2.flip(part, 1, dst=place)
        return
    sides = np.array([width, height])
    first = np.clip(np.floor(low) - MARGIN, 0, sides - 1).astype(int)
    last = np.clip(np.ceil(high) + MARGIN, 0, sides - 1).astype(int)
    matrix = translation(float(first[0]), float(first[1])).then(affine).matrix
    for picture, place in zip(pictures, into, strict=True):
        source = np.asarray(picture[first[1] : last[1] + 1, first[0] : last[0] + 1])
        cv2.warpAffine(source, matrix, size_wh, dst=place, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _copies_pixels(affine: Affine) -> bool:
    """Whether it is a crop of whole pixels, perhaps mirrored left to right: there is nothing to interpolate."""
    (scale_x, _, left), (_, scale_y, top) = affine.matrix.tolist()
    return bool(abs(scale_x) == 1.0 and scale_y == 1.0 and left.is_integer() and top.is_integer())


def apply_gain(pictures: Sequence[NDArray[np.uint8]], gain: NDArray[np.float64]) -> None:
    """Multiplies each colour of pictures, each contiguous (H, W, 3) uint8, by its gain in place, cut off at 255."""
    if np.all(gain == 1.0):
        return
    table = np.clip(np.rint(np.arange(256)[:, None] * gain), 0, 255).astype(np.uint8)[None]
    for picture in pictures:
        cv2.LUT(picture, table, dst=picture)

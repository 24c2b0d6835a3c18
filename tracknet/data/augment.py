"""Training augmentation: one draw per window, the same for all its frames, its points and its background.

Pure functions; the only randomness is the generator that is handed in.
"""

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


@dataclass(frozen=True)
class Augmentation:
    """One draw."""

    affine: Affine  # xy_input of the stored frame -> xy_input of what the network sees
    size_wh: tuple[int, int]  # of what the network sees
    gain: NDArray[np.float64]  # (3,), per colour
    reverse: bool  # play the window backwards


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


def warp(picture: NDArray[np.uint8], affine: Affine, size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture under an affine map, interpolated linearly; beyond its border, the border goes on.

    Only the part that the result needs is read. The result is the same as if the whole picture had been warped.

    Args:
        picture: (H, W, 3) uint8; may be a memory map.
        affine: px of `picture` -> px of the result; axes stay axes (no rotation).
        size_wh: of the result.

    Returns:
        (h, w, 3) uint8, in memory of its own.
    """
    corners = affine.inverse()(np.array([[0.0, 0.0], [size_wh[0] - 1.0, size_wh[1] - 1.0]]))
    sides = np.array([picture.shape[1], picture.shape[0]])
    first = np.clip(np.floor(corners.min(axis=0)) - MARGIN, 0, sides - 1).astype(int)
    last = np.clip(np.ceil(corners.max(axis=0)) + MARGIN, 0, sides - 1).astype(int)
    source = np.asarray(picture[first[1] : last[1] + 1, first[0] : last[0] + 1])
    matrix = translation(float(first[0]), float(first[1])).then(affine).matrix
    warped = cv2.warpAffine(source, matrix, size_wh, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped, dtype=np.uint8)


def apply_gain(picture: NDArray[np.uint8], gain: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Multiplies each colour of (..., 3) uint8 by its gain, cut off at 255."""
    if np.all(gain == 1.0):
        return picture
    table = np.clip(np.rint(np.arange(256)[:, None] * gain), 0, 255).astype(np.uint8)
    return np.stack([table[picture[..., channel], channel] for channel in range(3)], axis=-1)

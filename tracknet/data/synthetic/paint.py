"""Drawing on a canvas of four channels: RGB and the share of each pixel that shows the ball.

Whatever is drawn over the ball wipes the fourth channel, so that what is left of it says how much of the ball can be seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = NDArray[np.float64]  # (3,) RGB, 0 to 255
Canvas = NDArray[np.uint8]  # (H, W, 4)

_SHIFT = 4  # OpenCV takes coordinates in 1 / 2**_SHIFT px
_EDGE = 0.7  # px over which the edge of a blob fades, on either side


def blob(canvas: Canvas, centres: NDArray[np.float64], radius: float, colour: Colour, opacity: float = 1.0, ball: bool = False) -> float:
    """Draws a disc; a streak if it has several centres, each of which gets an equal share of the exposure.

    Args:
        canvas: drawn into.
        centres: (K, 2) px.
        radius: px.
        colour: (3,) RGB.
        opacity: 0 to 1, of the middle of a disc that stands still.
        ball: enters the blob into the ball's channel.

    Returns:
        The sum of the blob's coverage over its pixels, those outside of the picture included.
    """
    reach = radius + _EDGE
    left, top = np.floor(centres.min(axis=0) - reach).astype(int)
    right, bottom = np.ceil(centres.max(axis=0) + reach).astype(int) + 1
    x, y = np.arange(left, right), np.arange(top, bottom)
    distance = np.sqrt((x - centres[:, 0, None])[:, None, :] ** 2 + (y - centres[:, 1, None])[:, :, None] ** 2)
    coverage = opacity * np.clip((reach - distance) / (2 * _EDGE), 0.0, 1.0).mean(axis=0)
    height, width = canvas.shape[:2]
    rows, columns = slice(max(top, 0), max(min(bottom, height), 0)), slice(max(left, 0), max(min(right, width), 0))
    inside = coverage[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if rows.start < rows.stop and columns.start < columns.stop:
        _blend(canvas[rows, columns], inside, np.append(colour, 255.0 if ball else 0.0))
    return float(coverage.sum())


def _blend(under: NDArray[np.uint8], share: NDArray[np.float64], value: NDArray[np.float64]) -> None:
    under[:] = np.rint(under + share[..., None] * (value - under)).astype(np.uint8)


def line(canvas: NDArray[np.uint8], points: NDArray[np.float64], thickness: float, colour: Colour) -> None:
    """Draws a chain of (N, 2) points, `thickness` px wide."""
    cv2.polylines(canvas, [_fixed(points)], False, _value(canvas, colour), max(1, round(thickness)), cv2.LINE_AA, _SHIFT)


def polygon(canvas: NDArray[np.uint8], corners: NDArray[np.float64], colour: Colour) -> None:
    """Fills the area inside (N, 2) corners."""
    cv2.fillPoly(canvas, [_fixed(corners)], _value(canvas, colour), cv2.LINE_AA, _SHIFT)


def shade(canvas: NDArray[np.uint8], corners: NDArray[np.float64], factor: float) -> None:
    """Multiplies the light inside (N, 2) corners, for shadows."""
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, None)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 2, 0, canvas.shape[1::-1])
    if (low >= high).any():
        return
    mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    cv2.fillPoly(mask, [_fixed(corners - low)], (255.0,), cv2.LINE_AA, _SHIFT)
    part = canvas[low[1] : high[1], low[0] : high[0], :3]
    part[:] = np.rint(part * (1 - mask[..., None] / 255.0 * (1 - factor))).astype(np.uint8)


def _fixed(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


def _value(canvas: NDArray[np.uint8], colour: Colour) -> Sequence[float]:
    """The colour as OpenCV wants it: as many numbers as the canvas has channels, the ball's own being 0."""
    return [*map(float, colour), 0.0][: canvas.shape[2]]


@dataclass(frozen=True)
class Layer:
    """A picture with transparency that is drawn between other things, such as the net."""

    rows: slice
    columns: slice
    colour: NDArray[np.float32]  # (h, w, 4); the last channel is 0: the layer is not the ball
    opacity: NDArray[np.float32]  # (h, w, 1), 0 to 1

    @classmethod
    def cut(cls, colour: NDArray[np.uint8], opacity: NDArray[np.uint8]) -> "Layer":
        """Keeps only the part of an (H, W, 3) picture where the (H, W) opacity is above 0."""
        used = opacity > 0
        y, x = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
        rows, columns = (slice(int(i[0]), int(i[-1]) + 1) if len(i) else slice(0, 0) for i in (y, x))
        with_ball = np.dstack([colour[rows, columns], np.zeros_like(opacity[rows, columns])])
        return cls(rows, columns, with_ball.astype(np.float32), (opacity[rows, columns, None] / np.float32(255)).astype(np.float32))

    def draw(self, canvas: Canvas) -> None:
        """Draws the layer over what is there."""
        part = canvas[self.rows, self.columns]
        part[:] = np.rint(part + self.opacity * (self.colour - part)).astype(np.uint8)

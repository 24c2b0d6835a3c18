"""Coordinates: original px <-> input px <-> heatmap cell. The only file that knows the half-pixel rule.

A picture's coordinate (0, 0) is the centre of its first pixel, so a picture of width w spans -0.5 to w - 0.5, and resizing by s maps
x to (x + 0.5) * s - 0.5. This is the convention of OpenCV's `resize` and `warpAffine` and of torch's `interpolate(align_corners=False)`.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Points = TypeVar("Points", NDArray[np.floating], torch.Tensor)


def resize_points(xy: Points, from_wh: tuple[int, int], to_wh: tuple[int, int]) -> Points:
    """Where points of a picture lie after it is resized.

    Args:
        xy: (..., 2) array or tensor, x before y, in the frame of the picture before.
        from_wh: width and height before.
        to_wh: width and height after.

    Returns:
        (..., 2) points in the frame of the picture after; of the same type and dtype.
    """
    scale_x, scale_y = to_wh[0] / from_wh[0], to_wh[1] / from_wh[1]
    x = (xy[..., 0] + 0.5) * scale_x - 0.5
    y = (xy[..., 1] + 0.5) * scale_y - 0.5
    if isinstance(xy, torch.Tensor):
        return torch.stack([x, y], dim=-1)
    return np.stack([x, y], axis=-1)


def inside(xy: NDArray[np.floating], size_wh: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether (..., 2) points lie on a picture of this size: from the outer edge of its first pixel to that of its last."""
    return np.asarray(np.all((xy >= -0.5) & (xy < np.array(size_wh) - 0.5), axis=-1))


@dataclass(frozen=True)
class Affine:
    """A map of the plane: `xy_after = matrix[:, :2] @ xy_before + matrix[:, 2]`; matrix is (2, 3) float64."""

    matrix: NDArray[np.float64]

    def __call__(self, xy: NDArray[np.floating]) -> NDArray[np.float64]:
        """Maps (..., 2) points."""
        return xy @ self.matrix[:, :2].T + self.matrix[:, 2]

    def then(self, other: "Affine") -> "Affine":
        """This map, followed by the other."""
        linear = other.matrix[:, :2] @ self.matrix[:, :2]
        offset = other.matrix[:, :2] @ self.matrix[:, 2] + other.matrix[:, 2]
        return Affine(np.column_stack([linear, offset]))

    def inverse(self) -> "Affine":
        """The map back."""
        linear = np.linalg.inv(self.matrix[:, :2])
        return Affine(np.column_stack([linear, -linear @ self.matrix[:, 2]]))


def translation(dx: float, dy: float) -> Affine:
    """Moves points by (dx, dy) px; a crop whose first pixel is (left, top) is `translation(-left, -top)`."""
    return Affine(np.array([[1.0, 0.0, dx], [0.0, 1.0, dy]]))


def scaling(factor: float) -> Affine:
    """Resizes by `factor` on both axes, half-pixel rule included."""
    offset = 0.5 * factor - 0.5
    return Affine(np.array([[factor, 0.0, offset], [0.0, factor, offset]]))


def horizontal_flip(width: int) -> Affine:
    """Mirrors a picture of `width` px left to right."""
    return Affine(np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0]]))

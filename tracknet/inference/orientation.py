"""Turns frames as the camera held them; phones store the picture unturned and say how it stands."""

import struct
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from tracknet.data.decode import Frame

MATRIX = "=9i"  # in the byte order of the machine


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes the displayed one: first exchange of rows and columns, then mirrors.

    Attributes:
        transpose: columns become rows.
        mirror_x: left and right change places.
        mirror_y: top and bottom change places.
        exact: whether the file asks for nothing else; else it asks for an angle that is no multiple of 90 degrees, and this is the nearest.
    """

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False
    exact: bool = True

    def upright(self, picture: Frame) -> Frame:
        """The displayed picture, (H, W, 3)."""
        if self == UPRIGHT:
            return picture
        turned = picture.swapaxes(0, 1) if self.transpose else picture
        return np.ascontiguousarray(turned[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1])

    def upright_wh(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """The displayed size of a stored one, and the other way round."""
        return (size_wh[1], size_wh[0]) if self.transpose else size_wh


UPRIGHT = Orientation()


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """What the frame's display matrix asks for.

    The matrix (a b u; c d v; x y w), fixed point, takes the stored (p, q) to (a p + c q, b p + d q); see libavutil/display.h.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = struct.unpack(MATRIX, bytes(matrix))
    transpose = abs(b) + abs(c) > abs(a) + abs(d)
    along_x, along_y, rest = (c, b, abs(a) + abs(d)) if transpose else (a, d, abs(b) + abs(c))
    return Orientation(transpose, along_x < 0, along_y < 0, exact=100 * rest <= abs(along_x) + abs(along_y))

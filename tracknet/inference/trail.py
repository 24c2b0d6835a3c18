"""Draws the ball and where it just came from."""

from collections import deque
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tracknet.data.decode import Frame
from tracknet.inference.track import INTERPOLATED, BallTrack

TRAIL_S = 0.5
LONGEST_STEP = 0.25  # of the picture's width from one frame to the next; a longer one is a cut of the camera, no flight
DETECTED_RGB = (255, 214, 0)
INTERPOLATED_RGB = (0, 229, 255)
EDGE_RGB = (20, 20, 20)
SUBPIXEL_BITS = 4  # OpenCV takes positions in sixteenths of a px
DASH_DEGREES, GAP_DEGREES = 30, 30
TRAIL_OPACITY = 0.8


class _Point(NamedTuple):
    """A place of the ball in px of the drawn picture."""

    time_s: float
    xy: tuple[float, float]
    interpolated: bool
    joined: bool  # whether the ball came here from the point before


class BallPainter:
    """Marks the ball in the pictures of a video, one after the other.

    A detected ball is a filled ring; an interpolated one a dashed ring of another colour. Behind it fades a trail of the last half second,
    which is broken where the ball was not seen and where the camera cuts.

    Args:
        track: rows in rising order of `frame`.
        size_wh: of the pictures to draw on, px.
    """

    def __init__(self, track: BallTrack, size_wh: tuple[int, int]) -> None:
        self._track, self._size_wh = track, size_wh
        self._unit = max(size_wh[1] / 720, 0.5)  # the marks are sized for 720 lines
        self._points: deque[_Point] = deque()
        self._last_number = -2
        self._last_original_wh = (0, 0)

    def draw(self, picture: Frame, number: int, time_s: float, original_wh: tuple[int, int]) -> None:
        """Draws into the picture.

        Args:
            picture: (H, W, 3) uint8 RGB, changed in place.
            number: of the frame, higher than at the call before.
            time_s: of the frame.
            original_wh: size to which the track's positions refer, px.
        """
        while self._points and self._points[0].time_s < time_s - TRAIL_S:
            self._points.popleft()
        row = self._row(number)
        if row is not None:
            self._add(row, number, time_s, original_wh)
        self._draw_trail(picture, time_s)
        if row is not None:
            self._draw_ball(picture, self._points[-1])

    def _row(self, number: int) -> int | None:
        """The row of the track where the frame shows a ball."""
        row = int(np.searchsorted(self._track.frame, number))
        found = row < len(self._track) and self._track.frame[row] == number and self._track.visible[row]
        return row if found else None

    def _add(self, row: int, number: int, time_s: float, original_wh: tuple[int, int]) -> None:
        scale = [new / old for new, old in zip(self._size_wh, original_wh, strict=True)]
        xy = [(position + 0.5) * s - 0.5 for position, s in zip((self._track.x[row], self._track.y[row]), scale, strict=True)]
        joined = number == self._last_number + 1 and original_wh == self._last_original_wh and bool(self._points)
        if joined:
            joined = bool(np.hypot(xy[0] - self._points[-1].xy[0], xy[1] - self._points[-1].xy[1]) <= LONGEST_STEP * self._size_wh[0])
        self._points.append(_Point(time_s, (xy[0], xy[1]), bool(self._track.source[row] == INTERPOLATED), joined))
        self._last_number, self._last_original_wh = number, original_wh

    def _draw_trail(self, picture: Frame, time_s: float) -> None:
        """Older pieces first, each with its own opacity, blended all at once so that their joints do not show."""
        if len(self._points) < 2:
            return
        thickness = max(round(3 * self._unit), 1)
        corner, area = self._area(picture, thickness)
        if area.size == 0:
            return
        opacity: NDArray[np.uint8] = np.zeros(area.shape[:2], np.uint8)
        colour = np.empty_like(area)
        colour[:] = DETECTED_RGB
        points = list(self._points)
        for start, end in pairwise(points):
            if not end.joined:
                continue
            begin, finish = (_fixed((x - corner[0], y - corner[1])) for x, y in (start.xy, end.xy))
            if end.interpolated or start.interpolated:
                cv2.line(colour, begin, finish, INTERPOLATED_RGB, thickness + 3, cv2.LINE_8, SUBPIXEL_BITS)
            strength = TRAIL_OPACITY * (1 - (time_s - end.time_s) / TRAIL_S)
            cv2.line(opacity, begin, finish, round(255 * strength), thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        share = opacity[..., None].astype(np.float32) / 255
        area[:] = np.rint(area * (1 - share) + colour * share)

    def _area(self, picture: Frame, margin: int) -> tuple[tuple[int, int], Frame]:
        """The part of the picture that holds the trail, and its upper left corner."""
        xy = np.array([point.xy for point in self._points])
        left, top = np.maximum(np.floor(xy.min(axis=0)).astype(int) - margin - 2, 0).tolist()
        right, bottom = np.maximum(np.ceil(xy.max(axis=0)).astype(int) + margin + 3, 0).tolist()
        return (left, top), picture[top:bottom, left:right]

    def _draw_ball(self, picture: Frame, point: _Point) -> None:
        radius, thickness = 9 * self._unit, max(round(2 * self._unit), 1)
        centre, size = _fixed(point.xy), _fixed((radius, radius))
        if point.interpolated:
            for start in range(0, 360, DASH_DEGREES + GAP_DEGREES):
                for colour, width in ((EDGE_RGB, thickness + 2), (INTERPOLATED_RGB, thickness)):
                    cv2.ellipse(picture, centre, size, 0, start, start + DASH_DEGREES, colour, width, cv2.LINE_AA, SUBPIXEL_BITS)
            return
        cv2.circle(picture, centre, size[0], EDGE_RGB, thickness + 2, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.circle(picture, centre, size[0], DETECTED_RGB, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.circle(picture, centre, size[0] // 3, DETECTED_RGB, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)


def _fixed(xy: tuple[float, float]) -> tuple[int, int]:
    """As OpenCV takes positions between pixels."""
    return round(xy[0] * 2**SUBPIXEL_BITS), round(xy[1] * 2**SUBPIXEL_BITS)

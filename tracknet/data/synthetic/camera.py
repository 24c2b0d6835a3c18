"""A pinhole camera behind the near baseline, as on television.

World: metres; the origin is on the ground below the middle of the net, x to the right as the camera sees it, y away from the camera, z up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REFERENCE_WH = (512, 288)  # sizes in pixels of this package are meant at this picture size


@dataclass(frozen=True)
class Camera:
    """Where the camera stands, how it is turned and how long its lens is."""

    position: NDArray[np.float64]  # (3,) m
    rotation: NDArray[np.float64]  # (3, 3), world to camera axes (right, down, forward)
    focal_px: float
    size_wh: tuple[int, int]

    def depth(self, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distance along the optical axis of (..., 3) points, in m."""
        depth: NDArray[np.float64] = (xyz - self.position) @ self.rotation[2]
        return depth

    def project(self, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
        """Original px of (..., 3) points in front of the camera; (0, 0) is the centre of the first pixel. Returns (..., 2)."""
        right_down_forward = (xyz - self.position) @ self.rotation.T
        centre = (np.array(self.size_wh) - 1) / 2
        return right_down_forward[..., :2] / right_down_forward[..., 2:] * self.focal_px + centre

    def metres_to_px(self, xyz: NDArray[np.float64]) -> float:
        """How many px a metre across the line of sight takes at the point (3,)."""
        return self.focal_px / float(self.depth(xyz))


def make_camera(rng: np.random.Generator, size_wh: tuple[int, int]) -> Camera:
    """A camera that sees both players: its own height, distance, side offset, tilt, roll and focal length."""
    width, height = size_wh
    distance, side = rng.uniform(34.0, 46.0), rng.uniform(-4.0, 4.0)
    position = np.array([side, -distance, distance * rng.uniform(0.25, 0.38)])
    nearest_y, framed_width = rng.uniform(-16.5, -15.5), rng.uniform(14.5, 17.0)
    reference_scale = min(width / REFERENCE_WH[0], height / REFERENCE_WH[1])
    near_range = np.hypot(distance + nearest_y, position[2])
    # The ground at `nearest_y` lies just above the lower edge of the picture, the far player's raised racket below the upper one.
    near_angle = np.arctan2(position[2], distance + nearest_y)
    far_angle = np.arctan2(position[2] - 3.0, distance + rng.uniform(14.0, 17.0))
    share = 0.46
    longest = share * height / np.tan((near_angle - far_angle) / 2)
    focal = min(REFERENCE_WH[0] * reference_scale * near_range / framed_width, longest)
    pitch = near_angle - np.arctan(share * height / focal)
    yaw, roll = np.arctan2(-side, distance), np.deg2rad(rng.uniform(-1.2, 1.2))
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), -np.sin(pitch)])
    level_right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
    level_down = np.cross(forward, level_right)
    right = np.cos(roll) * level_right + np.sin(roll) * level_down
    down = np.cos(roll) * level_down - np.sin(roll) * level_right
    return Camera(position, np.stack([right, down, forward]), float(focal), size_wh)

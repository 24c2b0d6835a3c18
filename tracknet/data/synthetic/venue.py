"""What a game keeps through all of its clips: camera, court, stands, light and the look of the ball."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.synthetic.camera import Camera, make_camera
from tracknet.data.synthetic.paint import Colour

# court, surround (RGB), strength of the grain, mowing stripes
_SURFACES: tuple[tuple[str, tuple[int, int, int], tuple[int, int, int], float, bool], ...] = (
    ("clay", (186, 104, 66), (176, 98, 64), 7.0, False),
    ("grass", (104, 142, 66), (84, 120, 58), 6.0, True),
    ("hard blue", (58, 98, 164), (72, 132, 104), 2.5, False),
    ("hard green", (72, 132, 92), (150, 92, 74), 2.5, False),
    ("hard purple", (92, 78, 140), (60, 120, 100), 2.5, False),
    ("hard grey", (104, 124, 138), (62, 84, 120), 3.5, False),
)


@dataclass(frozen=True)
class Spectators:
    """Heads and shirts in the stands, those farthest from the camera first."""

    position: NDArray[np.float64]  # (M, 3), middle of the head in m
    head: NDArray[np.float64]  # (M, 3), RGB
    shirt: NDArray[np.float64]  # (M, 3), RGB


@dataclass(frozen=True)
class Venue:
    """The court and everything around it that does not move."""

    camera: Camera
    fps: float
    exposure: float  # share of the time between two frames that the shutter is open
    surface: str
    court: Colour
    surround: Colour
    wall: Colour
    board: Colour
    grain: float  # grey levels
    stripes: bool
    line_width: float  # m
    side_wall: float  # m from the middle
    spectators: Spectators
    ball: Colour
    shadow: NDArray[np.float64] | None  # (4, 2) corners on the ground in m, of the shadow of a roof
    shadow_light: float  # share of the light that is left in it
    light_slope: NDArray[np.float64]  # (2,) how much brighter the right and the lower edge are than the middle, as a share
    noise: float  # grey levels, of the sensor
    flicker: float  # share by which the whole picture's brightness wavers


def make_venue(rng: np.random.Generator, size_wh: tuple[int, int]) -> Venue:
    """Draws a venue by lot."""
    camera = make_camera(rng, size_wh)
    name, court, surround, grain, stripes = _SURFACES[rng.integers(len(_SURFACES))]
    side_wall = rng.uniform(8.8, 10.5)
    return Venue(
        camera=camera,
        fps=float(rng.choice([25.0, 30.0])),
        exposure=rng.uniform(0.35, 0.6),
        surface=name,
        court=_near(rng, court),
        surround=_near(rng, surround),
        wall=rng.uniform(20, 90, 3),
        board=rng.uniform(140, 255, 3),
        grain=grain,
        stripes=stripes,
        line_width=rng.uniform(0.09, 0.14),
        side_wall=side_wall,
        spectators=_make_spectators(rng, side_wall),
        ball=np.array([rng.uniform(205, 240), rng.uniform(225, 248), rng.uniform(95, 170)]),
        shadow=_make_shadow(rng) if rng.random() < 0.5 else None,
        shadow_light=rng.uniform(0.55, 0.75),
        light_slope=rng.uniform(-0.12, 0.12, 2),
        noise=rng.uniform(2.0, 4.5),
        flicker=rng.uniform(0.004, 0.015),
    )


def _near(rng: np.random.Generator, colour: tuple[int, int, int]) -> Colour:
    return np.clip(np.array(colour) * rng.uniform(0.85, 1.15) + rng.uniform(-14, 14, 3), 15, 225)


def _make_shadow(rng: np.random.Generator) -> NDArray[np.float64]:
    edge, slant = rng.uniform(-6.0, 6.0), rng.uniform(-4.0, 4.0)
    beyond = 25.0 * rng.choice([-1, 1])
    return np.array([[edge - slant, -22.0], [edge + slant, 18.0], [beyond, 18.0], [beyond, -22.0]])


def _make_spectators(rng: np.random.Generator, side_wall: float) -> Spectators:
    """Rows of seats behind the far wall and behind both side walls; some seats stay empty."""
    seats: list[NDArray[np.float64]] = []
    for row in range(14):
        back, rise = 18.3 + 0.8 * row, 1.7 + 0.45 * row
        across = np.arange(-side_wall - 9, side_wall + 9, 0.62)
        seats.append(np.column_stack([across, np.full_like(across, back), np.full_like(across, rise)]))
    for row in range(8):
        out, rise = side_wall + 0.8 + 0.8 * row, 1.7 + 0.45 * row
        along = np.arange(-20.0, 18.0, 0.62)
        seats.extend(np.column_stack([np.full_like(along, sign * out), along, np.full_like(along, rise)]) for sign in (-1, 1))
    position = np.concatenate(seats)
    position = position[rng.random(len(position)) < rng.uniform(0.55, 0.9)]
    position = position + rng.uniform(-0.12, 0.12, position.shape)
    position = position[np.argsort(-position[:, 1], kind="stable")]
    count = len(position)
    skin = np.array([224.0, 172.0, 135.0]) * rng.uniform(0.35, 0.9, (count, 1))
    hair = rng.uniform(15, 110, (count, 1)) * np.array([1.0, 0.85, 0.7])
    shirt = np.where(rng.random((count, 1)) < 0.3, rng.uniform(170, 235, (count, 1)), rng.uniform(10, 190, (count, 3)))
    return Spectators(position, np.where(rng.random((count, 1)) < 0.6, skin, hair), shirt)

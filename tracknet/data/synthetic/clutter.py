"""Everything that could be taken for the ball: what looks like it but stays or creeps, and what moves but looks otherwise.

In a single picture the lookalikes cannot be told from the ball: they have its size, colour and streak, and lie where balls fly, because
they are taken from a rally that is never played. Only over several frames does the ball in play stand out, as the one that is quick.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.synthetic.camera import REFERENCE_WH
from tracknet.data.synthetic.paint import Canvas, Colour, blob, line
from tracknet.data.synthetic.rally import make_rally
from tracknet.data.synthetic.venue import Venue

DRAWN_BALL_RADIUS = 0.125  # m; larger than life, so that the ball is 1.5 to 4 px at 512x288, as blurred broadcast balls are
SHUTTER = np.linspace(-0.5, 0.5, 6)  # moments of the exposure at which a moving ball is drawn
_STILL, _CREEPING, _FLYING, _CHEERING = 9, 2, 1, 22
_FLASH_PROB = 0.1  # that a frame has one


@dataclass(frozen=True)
class Speck:
    """A ball-like disc or streak that stays, or drifts straight on."""

    streak: NDArray[np.float64]  # (K, 2) px, at the first frame
    drift: NDArray[np.float64]  # (2,) px a frame
    radius: float  # px
    colour: Colour


@dataclass(frozen=True)
class Bird:
    """A dark or pale thing that flies across, beating its wings."""

    start: NDArray[np.float64]  # (2,) px
    drift: NDArray[np.float64]  # (2,) px a frame
    sway: float  # px
    beat: float  # radians a frame
    radius: float  # px
    colour: Colour


@dataclass(frozen=True)
class Clutter:
    """All of a clip's distractions; `cheering` are those in the stands who move."""

    still: list[Speck]
    creeping: list[Speck]
    birds: list[Bird]
    cheering: NDArray[np.int64]  # (C,), which spectators
    beat: NDArray[np.float64]  # (C,), radians a frame
    waved: NDArray[np.float64]  # (C, 3), colour of what they wave
    flashes: list[tuple[int, int]]  # (frame, spectator): a camera's flash


def make_clutter(rng: np.random.Generator, venue: Venue, frames: int) -> Clutter:
    """Draws a clip's distractions by lot."""
    scale = min(venue.camera.size_wh[0] / REFERENCE_WH[0], venue.camera.size_wh[1] / REFERENCE_WH[1])
    seats = len(venue.spectators.position)
    places = venue.camera.project(venue.spectators.position)
    seen = np.flatnonzero(((places >= 0) & (places < np.array(venue.camera.size_wh))).all(axis=1))
    cheering = rng.choice(seen if len(seen) else np.arange(seats), _CHEERING)
    return Clutter(
        still=[_lookalike(rng, venue, 0.0) for _ in range(_STILL)],
        creeping=[_lookalike(rng, venue, rng.uniform(0.25, 0.8) * scale) for _ in range(_CREEPING)],
        birds=[_bird(rng, venue, frames, scale) for _ in range(_FLYING)],
        cheering=cheering,
        beat=rng.uniform(0.15, 0.6, len(cheering)),
        waved=rng.uniform([60, 40, 170], [255, 170, 255], (len(cheering), 3)),  # never the ball's yellow
        flashes=[(int(frame), int(rng.choice(cheering))) for frame in np.flatnonzero(rng.random(frames) < _FLASH_PROB)],
    )


def _lookalike(rng: np.random.Generator, venue: Venue, speed: float) -> Speck:
    """A ball of another rally, frozen at one moment with the streak that it would have had."""
    camera, (width, height) = venue.camera, venue.camera.size_wh
    while True:
        flights = make_rally(rng, 4.0).flights
        flight = flights[rng.integers(len(flights))]
        time = rng.uniform(flight.start, flight.end)
        streak = camera.project(np.stack([flight.at(time + moment * venue.exposure / venue.fps) for moment in SHUTTER]))
        x, y = streak.mean(axis=0)
        if 0 <= x < width and 0 <= y < height:
            break
    direction = rng.uniform(0, 2 * np.pi)
    drift = speed * np.array([np.cos(direction), np.sin(direction)])
    return Speck(streak, drift, DRAWN_BALL_RADIUS * camera.metres_to_px(flight.at(time)), venue.ball + rng.uniform(-10, 10))


def _bird(rng: np.random.Generator, venue: Venue, frames: int, scale: float) -> Bird:
    size = np.array(venue.camera.size_wh)
    middle = rng.uniform(0.15, 0.85, 2) * size
    direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(1.2, 3.5) * scale
    drift = speed * np.array([np.cos(direction), 0.6 * np.sin(direction)])
    grey = rng.uniform(10, 60) if rng.random() < 0.7 else rng.uniform(180, 230)
    return Bird(
        start=middle - drift * rng.uniform(0.2, 0.8) * frames,
        drift=drift,
        sway=rng.uniform(0.5, 3.0) * scale,
        beat=rng.uniform(0.4, 1.2),
        radius=rng.uniform(1.6, 2.6) * scale,
        colour=grey + np.array([0.0, -6.0, 8.0]),
    )


def draw_still(canvas: Canvas, clutter: Clutter) -> None:
    """Those that can be painted on the backdrop once and for all."""
    for speck in clutter.still:
        blob(canvas, speck.streak, speck.radius, speck.colour)


def draw_stirring(canvas: Canvas, venue: Venue, clutter: Clutter, frame: int) -> None:
    """The stands and the creeping lookalikes: behind the players."""
    camera, people = venue.camera, venue.spectators
    for index, beat, waved in zip(clutter.cheering, clutter.beat, clutter.waved, strict=True):
        scale = camera.metres_to_px(people.position[index])
        head = camera.project(people.position[index])
        lift = np.array([0.2 * np.cos(0.7 * beat * frame), 0.3 * np.sin(beat * frame)]) * scale
        blob(canvas, (head + lift)[None], 0.15 * scale, people.head[index])
        blob(canvas, (head + [0.3 * scale, -0.1 * scale] + 1.6 * lift)[None], 0.13 * scale, waved)
    for moment, index in clutter.flashes:
        if moment == frame:
            place = people.position[index]
            blob(canvas, camera.project(place)[None], 0.12 * camera.metres_to_px(place), np.full(3, 255.0))
    for speck in clutter.creeping:
        blob(canvas, speck.streak + frame * speck.drift, speck.radius, speck.colour)


def draw_birds(canvas: Canvas, clutter: Clutter, frame: int) -> None:
    """In front of everything."""
    for bird in clutter.birds:
        middle = bird.start + frame * bird.drift + [0.0, bird.sway * np.sin(0.5 * bird.beat * frame)]
        wing = bird.radius * np.array([1.7, -1.2 * np.sin(bird.beat * frame)])
        line(canvas, np.stack([middle + wing * [-1, 1], middle, middle + wing]), 0.7 * bird.radius, bird.colour)
        blob(canvas, middle[None], 0.8 * bird.radius, bird.colour)

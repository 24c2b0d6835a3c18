"""The two players: where they run, how they swing, and how they are drawn."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.synthetic.camera import Camera
from tracknet.data.synthetic.paint import Canvas, Colour, blob, line, shade
from tracknet.data.synthetic.rally import BASELINE, Rally

_REACH = 0.75  # m between a player's middle and the ball that he hits


@dataclass(frozen=True)
class Outfit:
    """Colours and build."""

    shirt: Colour
    trousers: Colour
    skin: Colour
    hair: Colour
    racket: Colour
    height: float  # m


@dataclass(frozen=True)
class Player:
    """One player through a clip: for each frame where he stands and what his racket does."""

    outfit: Outfit
    side: int  # -1 near, +1 far
    base: NDArray[np.float64]  # (N, 2), x and y in m
    stride: NDArray[np.float64]  # (N,), phase of the legs in radians
    racket: NDArray[np.float64]  # (N, 3), middle of the racket's head in m
    speed: NDArray[np.float64]  # (N,), m/s


def make_outfit(rng: np.random.Generator) -> Outfit:
    """Half of the players wear white, the others any colour."""
    white = np.full(3, 240.0)
    shirt = white if rng.random() < 0.5 else rng.uniform(20, 250, 3)
    trousers = white if rng.random() < 0.4 else rng.uniform(15, 200, 3)
    skin = np.array([224.0, 172.0, 135.0]) * rng.uniform(0.45, 1.05)
    return Outfit(shirt, trousers, np.clip(skin, 0, 250), rng.uniform(20, 140, 3), rng.uniform(120, 255, 3), rng.uniform(1.7, 1.95))


def make_player(rng: np.random.Generator, rally: Rally, side: int, times: NDArray[np.float64]) -> Player:
    """Runs to each of his contacts in time, back to the middle between them, and swings through the ball."""
    keys: list[tuple[float, float, float]] = []
    swings: list[tuple[float, NDArray[np.float64], int]] = []
    for contact in rally.contacts:
        if contact.side != side:
            keys.append((contact.time, rng.uniform(-1.5, 1.5), side * (BASELINE + rng.uniform(0.3, 1.3))))
            continue
        hand = int(rng.choice([-1, 1]))
        keys.append((contact.time, contact.position[0] - hand * _REACH, contact.position[1] + side * 0.35))
        swings.append((contact.time, contact.position, hand))
    key_times, x, y = (np.array(column) for column in zip(*keys, strict=True))
    base = np.column_stack([_ease(times, key_times, x), _ease(times, key_times, y)])
    velocity = np.gradient(base, times, axis=0) if len(times) > 1 else np.zeros_like(base)
    speed = np.hypot(velocity[:, 0], velocity[:, 1])
    stride = np.cumsum(speed) * float(np.mean(np.diff(times)) if len(times) > 1 else 0.0) * 3.0
    racket = np.stack([_racket(time, place, side, swings) for time, place in zip(times, base, strict=True)])
    return Player(make_outfit(rng), side, base, stride, racket, speed)


def _ease(times: NDArray[np.float64], key_times: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolates so that the player stands still at each key time (a cubic with flat ends)."""
    after = np.clip(np.searchsorted(key_times, times), 1, max(1, len(key_times) - 1))
    if len(key_times) == 1:
        return np.full(len(times), values[0])
    share = np.clip((times - key_times[after - 1]) / (key_times[after] - key_times[after - 1]), 0.0, 1.0)
    return values[after - 1] + share**2 * (3 - 2 * share) * (values[after] - values[after - 1])


def _racket(time: float, base: NDArray[np.float64], side: int, swings: list[tuple[float, NDArray[np.float64], int]]) -> NDArray[np.float64]:
    """The racket's head: at the ball when it is hit, on an arc around the body just before and after, else in front."""
    rest = np.array([base[0] + 0.25, base[1] - side * 0.45, 1.05])
    if not swings:
        return rest
    moment, ball, hand = min(swings, key=lambda swing: abs(swing[0] - time))
    angle = np.clip((time - moment) / 0.1, -1.6, 1.6) * hand * -side
    arm = ball[:2] - base
    turned = np.array([np.cos(angle) * arm[0] - np.sin(angle) * arm[1], np.sin(angle) * arm[0] + np.cos(angle) * arm[1]])
    length = np.hypot(*turned)
    turned *= min(1.0, 1.2 / max(length, 0.01))
    swung = np.array([*(base + turned), ball[2] + 0.25 * np.sin(abs(angle))])
    share = np.exp(-(((time - moment) / 0.28) ** 4))
    blended: NDArray[np.float64] = rest + share * (swung - rest)
    return blended


def draw_player(canvas: Canvas, camera: Camera, player: Player, frame: int) -> None:
    """Shadow, legs, body, head, arms and racket, from the ground up."""
    outfit, side = player.outfit, player.side
    x, y = player.base[frame]
    tall = outfit.height / 1.8
    scale = camera.metres_to_px(np.array([x, y, 1.0]))

    def at(across: float, forward: float, up: float) -> NDArray[np.float64]:
        return np.array([x + across, y - side * forward, up * tall])

    def limb(*joints: NDArray[np.float64], width: float, colour: Colour) -> None:
        line(canvas, camera.project(np.stack(joints)), width * scale, colour)

    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ellipse = np.column_stack([x + 0.25 + 0.55 * np.cos(turn), y + 0.3 * np.sin(turn), np.zeros(16)])
    shade(canvas, camera.project(ellipse), 0.65)
    swing = 0.32 * np.sin(player.stride[frame]) * min(1.0, player.speed[frame] / 2)
    for leg in (-1, 1):
        foot, knee, hip = at(leg * 0.2, leg * swing, 0.03), at(leg * 0.2, leg * swing * 0.5 + 0.12, 0.5), at(leg * 0.1, 0, 0.92)
        limb(foot, knee, hip, width=0.13, colour=outfit.skin)
        limb(at(leg * 0.2, leg * swing + 0.12, 0.04), foot, width=0.12, colour=np.full(3, 235.0))
        limb(knee + 0.3 * (hip - knee), hip, width=0.21, colour=outfit.trousers)
    limb(at(0, 0, 0.92), at(0, 0.08, 1.38), width=0.38, colour=outfit.shirt)
    head = camera.project(at(0, 0.1, 1.66))
    blob(canvas, head[None], 0.13 * scale, outfit.skin if side > 0 else outfit.hair)
    blob(canvas, head[None] - [0, 0.05 * scale], 0.11 * scale, outfit.hair)
    _draw_arms(canvas, camera, player, frame, at(0, 0.08, 1.42), scale)


def _draw_arms(canvas: Canvas, camera: Camera, player: Player, frame: int, chest: NDArray[np.float64], scale: float) -> None:
    racket, outfit = player.racket[frame], player.outfit
    across = 1.0 if racket[0] >= chest[0] else -1.0
    shoulder = chest + np.array([across * 0.2, 0, 0])
    hand = shoulder + 0.55 * (racket - shoulder)
    elbow = (shoulder + hand) / 2 - [0, 0, 0.12]
    line(canvas, camera.project(np.stack([shoulder, elbow, hand])), 0.1 * scale, outfit.skin)
    other = chest - [across * 0.2, 0, 0]
    free = other + np.array([-across * 0.3, -player.side * 0.25, -0.3 + 0.15 * np.sin(player.stride[frame])])
    line(canvas, camera.project(np.stack([other, free])), 0.1 * scale, outfit.skin)
    along = (racket - hand) / max(float(np.linalg.norm(racket - hand)), 0.01)
    sideways = np.cross(along, camera.rotation[2])
    turn = np.linspace(0, 2 * np.pi, 14)[:, None]
    rim = racket + 0.18 * np.cos(turn) * along + 0.13 * np.sin(turn) * sideways
    line(canvas, camera.project(np.stack([hand, racket - 0.18 * along])), 0.05 * scale, outfit.racket)
    line(canvas, camera.project(rim), 0.04 * scale, outfit.racket)

"""The still picture behind a clip: ground, lines, walls and stands; the net, which is drawn between the players; the light."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from tracknet.data.synthetic.paint import Layer, line, polygon
from tracknet.data.synthetic.rally import BACK_WALL, BASELINE, NET_HEIGHT
from tracknet.data.synthetic.venue import Venue

_FINE = 2  # drawn this many times larger and averaged, for smooth edges
_DOUBLES, _SINGLES, _SERVICE = 5.485, 4.115, 6.40  # m: half widths and service line of a tennis court (ITF)
_POST = 6.40  # m from the middle
_WHITE = np.array([236.0, 236.0, 232.0])


class _Sketch:
    """A fine picture on which ground and walls are drawn in metres."""

    def __init__(self, venue: Venue, channels: int = 3) -> None:
        width, height = venue.camera.size_wh
        self.camera = venue.camera
        self.picture = np.zeros((height * _FINE, width * _FINE, channels), np.uint8)

    def px(self, points: Sequence[Sequence[float]] | NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 2) places in the fine picture of points given as (x, y) on the ground or (x, y, z)."""
        xyz = np.array(points, dtype=np.float64)
        if xyz.shape[1] == 2:
            xyz = np.column_stack([xyz, np.zeros(len(xyz))])
        return (self.camera.project(xyz) + 0.5) * _FINE - 0.5

    def fill(self, points: Sequence[Sequence[float]], colour: NDArray[np.float64]) -> None:
        polygon(self.picture, self.px(points), colour)

    def rectangle(self, x: tuple[float, float], y: tuple[float, float], colour: NDArray[np.float64]) -> None:
        self.fill([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])], colour)

    def smaller(self) -> NDArray[np.uint8]:
        """The picture at its final size."""
        done: NDArray[np.uint8] = cv2.resize(self.picture, self.camera.size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8)
        return done


def _nearest(venue: Venue) -> float:
    """The y, in m, from which ground and walls are drawn: below the picture, yet before the camera."""
    return float(venue.camera.position[1]) + 6.0


def draw_backdrop(rng: np.random.Generator, venue: Venue) -> NDArray[np.uint8]:
    """(H, W, 3) RGB picture of the empty venue."""
    sketch = _Sketch(venue)
    sketch.picture[:] = np.rint(venue.wall * 0.5).astype(np.uint8)
    _draw_stands(sketch, venue)
    _draw_ground(rng, sketch, venue)
    _draw_walls(rng, sketch, venue)
    return sketch.smaller()


def _draw_stands(sketch: _Sketch, venue: Venue) -> None:
    people = venue.spectators
    scale = venue.camera.focal_px / venue.camera.depth(people.position) * _FINE
    heads = sketch.px(people.position)
    width, height = sketch.picture.shape[1::-1]
    seen = (heads > -20).all(axis=1) & (heads < [width + 20, height + 20]).all(axis=1)
    for (x, y), m, head, shirt in zip(heads[seen], scale[seen], people.head[seen], people.shirt[seen], strict=True):
        shoulders = np.array([x, y]) + m * np.array([[-0.22, 0.55], [-0.2, 0.2], [0.2, 0.2], [0.22, 0.55]])
        polygon(sketch.picture, shoulders, shirt * 0.8)
        cv2.circle(sketch.picture, (round(x), round(y)), max(1, round(0.14 * m)), tuple(map(float, head * 0.85)), -1, cv2.LINE_AA)


def _draw_ground(rng: np.random.Generator, sketch: _Sketch, venue: Venue) -> None:
    side = venue.side_wall
    near = _nearest(venue)
    inside = np.zeros(sketch.picture.shape[:2], np.uint8)
    paper = _Sketch(venue)
    paper.rectangle((-side, side), (near, BACK_WALL), venue.surround)
    paper.rectangle((-_DOUBLES, _DOUBLES), (-BASELINE, BASELINE), venue.court)
    if venue.stripes:
        for edge in np.arange(-BASELINE, BASELINE - 1.0, 3.4):
            paper.rectangle((-_DOUBLES, _DOUBLES), (edge, edge + 1.7), venue.court * 1.09)
    _draw_wear(rng, paper, venue)
    ground = _grainy(rng, paper.picture, venue.grain)
    corners = paper.px([(-side, near), (side, near), (side, BACK_WALL), (-side, BACK_WALL)])
    cv2.fillPoly(inside, [np.rint(corners).astype(np.int32)], (1.0,))
    sketch.picture[inside > 0] = ground[inside > 0]
    _draw_lines(sketch, venue.line_width)


def _draw_wear(rng: np.random.Generator, sketch: _Sketch, venue: Venue) -> None:
    """Trodden patches, most of them where the players stand."""
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    for _ in range(14):
        x, y = rng.uniform(-4.5, 4.5), rng.choice([-1, 1]) * (BASELINE + rng.uniform(-1.5, 1.2))
        wide, deep = rng.uniform(0.5, 2.2), rng.uniform(0.15, 0.6)
        patch = np.column_stack([x + wide * np.cos(turn), y + deep * np.sin(turn)])
        under = venue.court if abs(y) < BASELINE else venue.surround
        sketch.fill(patch.tolist(), np.clip(under * rng.uniform(0.93, 1.1), 0, 255))


def _grainy(rng: np.random.Generator, picture: NDArray[np.uint8], strength: float) -> NDArray[np.uint8]:
    """Adds coarse and fine unevenness, `strength` grey levels deep."""
    height, width = picture.shape[:2]
    fine = rng.standard_normal((height, width), dtype=np.float32)
    patches = rng.standard_normal((height // 24 + 2, width // 48 + 2), dtype=np.float32)
    coarse = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)
    uneven = strength * (fine + 0.8 * coarse)
    return np.clip(picture + uneven[..., None], 0, 255).astype(np.uint8)


def _draw_lines(sketch: _Sketch, wide: float) -> None:
    half = wide / 2
    for x, length in ((_DOUBLES, BASELINE), (_SINGLES, BASELINE), (0.0, _SERVICE)):
        for sign in (-1, 1):
            sketch.rectangle((sign * x - half, sign * x + half), (-length, length), _WHITE)
    for y, reach in ((BASELINE, _DOUBLES), (_SERVICE, _SINGLES)):
        for sign in (-1, 1):
            sketch.rectangle((-reach, reach), (sign * y - wide, sign * y + wide), _WHITE)
            if y == BASELINE:
                sketch.rectangle((-half, half), (sign * y - 0.25, sign * y + 0.25), _WHITE)


def _draw_walls(rng: np.random.Generator, sketch: _Sketch, venue: Venue) -> None:
    """A wall around the court with bright advertising, and line judges before it."""
    side, high = venue.side_wall, 1.25
    near = _nearest(venue)
    for x in (-side, side):
        sketch.fill([(x, near, 0), (x, BACK_WALL, 0), (x, BACK_WALL, high), (x, near, high)], venue.wall * 0.9)
    sketch.fill([(-side, BACK_WALL, 0), (side, BACK_WALL, 0), (side, BACK_WALL, high), (-side, BACK_WALL, high)], venue.wall)
    for x in np.arange(-side + 0.6, side - 2.0, rng.uniform(2.6, 3.6)):
        _draw_sign(rng, sketch, venue, np.array([x, BACK_WALL, 0.0]), np.array([1.0, 0.0, 0.0]))
    for y in np.arange(-12.0, BACK_WALL - 3.0, rng.uniform(3.5, 5.0)):
        for sign in (-1.0, 1.0):
            _draw_sign(rng, sketch, venue, np.array([sign * side, y, 0.0]), np.array([0.0, -sign, 0.0]))
    for x in rng.uniform(-side + 1, side - 1, 5):
        _draw_standing(sketch, x, BACK_WALL - 0.6, np.array([60.0, 70.0, 110.0]))


def _draw_sign(rng: np.random.Generator, sketch: _Sketch, venue: Venue, foot: NDArray[np.float64], along: NDArray[np.float64]) -> None:
    """Letters of an advertisement and a round logo on a wall, from the point `foot` of its lower edge on in the direction `along`."""

    def place(across: float, up: float) -> list[float]:
        return [*(foot + across * along)[:2], up]

    for letter in range(int(rng.integers(3, 7))):
        left, tall = 0.3 * letter, rng.uniform(0.25, 0.5)
        sketch.fill([place(left, 0.4), place(left + 0.2, 0.4), place(left + 0.2, 0.4 + tall), place(left, 0.4 + tall)], venue.board)
    logo = np.array(place(2.1, 0.62))
    (x, y), radius = sketch.px(logo[None])[0], 0.16 * sketch.camera.metres_to_px(logo) * _FINE
    cv2.circle(sketch.picture, (round(x), round(y)), max(1, round(radius)), tuple(map(float, venue.board)), -1, cv2.LINE_AA)


def _draw_standing(sketch: _Sketch, x: float, y: float, shirt: NDArray[np.float64]) -> None:
    scale = sketch.camera.metres_to_px(np.array([x, y, 1.0])) * _FINE
    line(sketch.picture, sketch.px([(x, y, 0), (x, y, 0.9)]), 0.28 * scale, np.array([40.0, 40.0, 46.0]))
    line(sketch.picture, sketch.px([(x, y, 0.9), (x, y, 1.4)]), 0.4 * scale, shirt)
    line(sketch.picture, sketch.px([(x, y, 1.62), (x, y, 1.68)]), 0.24 * scale, np.array([205.0, 160.0, 130.0]))


def draw_net(rng: np.random.Generator, venue: Venue) -> Layer:
    """The net with its posts, the umpire's chair at one end and a ball boy at the other."""
    colour, mask = _Sketch(venue), _Sketch(venue, channels=1)

    def area(points: list[tuple[float, float, float]], rgb: NDArray[np.float64], opacity: float) -> None:
        colour.fill(points, rgb)
        mask.fill(points, np.array([255.0 * opacity]))

    def bar(points: list[tuple[float, float, float]], metres: float, rgb: NDArray[np.float64], opacity: float = 1.0) -> None:
        scale = venue.camera.metres_to_px(np.array(points[0])) * _FINE
        line(colour.picture, colour.px(points), max(1.0, metres * scale), rgb)
        line(mask.picture, mask.px(points), max(1.0, metres * scale), np.array([255.0 * opacity]))

    end, top = NET_HEIGHT + 0.156, NET_HEIGHT  # the posts are 1.07 m high
    dark = np.array([28.0, 30.0, 34.0])
    area([(-_POST, 0, 0), (_POST, 0, 0), (_POST, 0, end), (0, 0, top), (-_POST, 0, end)], dark, 0.38)
    for x in np.arange(-_POST, _POST, 0.35):
        bar([(x, 0, 0), (x, 0, top)], 0.01, dark, 0.5)
    bar([(-_POST, 0, end), (0, 0, top), (_POST, 0, end)], 0.09, _WHITE)
    bar([(0, 0, 0), (0, 0, top)], 0.06, _WHITE)
    for sign in (-1, 1):
        bar([(sign * _POST, 0, 0), (sign * _POST, 0, end + 0.05)], 0.12, dark)
    chair = float(rng.choice([-1, 1])) * (_POST + 0.9)
    for leg in (-0.3, 0.3):
        bar([(chair + leg, 0, 0), (chair + leg * 0.7, 0, 1.6)], 0.08, np.array([200.0, 200.0, 205.0]))
    bar([(chair, 0, 1.5), (chair, 0, 2.35)], 0.5, np.array([50.0, 60.0, 95.0]))
    bar([(chair, 0, 2.5), (chair, 0, 2.56)], 0.24, np.array([205.0, 160.0, 130.0]))
    bar([(-chair * 0.96, 0, 0.0), (-chair * 0.96, 0, 0.85)], 0.34, np.array([190.0, 60.0, 60.0]))
    bar([(-chair * 0.96, 0, 1.0), (-chair * 0.96, 0, 1.05)], 0.22, np.array([70.0, 50.0, 40.0]))
    return Layer.cut(colour.smaller(), mask.smaller())


def make_light(venue: Venue) -> NDArray[np.float32]:
    """(H, W, 1) factors: a slope over the picture, darker corners, and the soft-edged shadow of a roof."""
    width, height = venue.camera.size_wh
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
    light = 1 + venue.light_slope[0] * x + venue.light_slope[1] * y - 0.05 * (x**2 + y**2)
    if venue.shadow is not None:
        mask = np.zeros((height, width), np.float32)
        on_ground = np.column_stack([venue.shadow, np.zeros(4)])
        on_ground[:, 1] = np.maximum(on_ground[:, 1], _nearest(venue))
        cv2.fillPoly(mask, [np.rint(venue.camera.project(on_ground)).astype(np.int32)], (1.0,))
        light = light * (1 - (1 - venue.shadow_light) * cv2.GaussianBlur(mask, (0, 0), 1.5))
    return np.asarray(light, dtype=np.float32)[..., None]

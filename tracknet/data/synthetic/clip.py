"""One clip: all that happens in it, its pictures and its labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.synthetic.backdrop import draw_backdrop, draw_net, make_light
from tracknet.data.synthetic.clutter import DRAWN_BALL_RADIUS, SHUTTER, Clutter, draw_birds, draw_still, draw_stirring, make_clutter
from tracknet.data.synthetic.paint import Canvas, Layer, blob
from tracknet.data.synthetic.people import Player, draw_player, make_player
from tracknet.data.synthetic.rally import Rally, make_rally
from tracknet.data.synthetic.venue import Venue

_CLEAR, _HIDDEN = 0.95, 0.15  # the share of the ball that must show to be seen with ease; below the second it counts as hidden
_NOISE_MARGIN = 64  # px


@dataclass(frozen=True)
class Label:
    """A row of `Label.csv`; `xy_px` is None where no ball is in play or it is outside of the picture."""

    visibility: int  # 0 no ball, 1 seen with ease, 2 partly covered, 3 hidden
    xy_px: tuple[float, float] | None
    status: int | None  # 0 flying, 1 hit, 2 bouncing


@dataclass(frozen=True)
class SyntheticClip:
    """A clip that can be drawn frame by frame, in any order."""

    venue: Venue
    rally: Rally
    times: NDArray[np.float64]  # (N,), s, middle of each exposure
    players: tuple[Player, Player]
    clutter: Clutter
    still: Canvas  # (H, W, 4), all that does not move
    net: Layer
    light: NDArray[np.float32]  # (H, W, 1)
    gain: NDArray[np.float64]  # (N,)
    noise: NDArray[np.float32]  # larger than the picture by `_NOISE_MARGIN`; each frame uses another part of it
    noise_at: NDArray[np.int64]  # (N, 2)

    def ball_px(self, frame: int) -> NDArray[np.float64] | None:
        """(K, 2) places of the ball during the exposure, or None where no ball is in play."""
        shutter = SHUTTER * self.venue.exposure / self.venue.fps
        if self.rally.ball(self.times[frame]) is None:
            return None
        places = [self.rally.ball(time) for time in self.times[frame] + shutter]
        return self.venue.camera.project(np.stack([place for place in places if place is not None]))

    def draw(self, frame: int, with_ball: bool = True) -> tuple[NDArray[np.uint8], Label]:
        """Draws one frame.

        Args:
            frame: its number.
            with_ball: False leaves the ball in play out, and it alone.

        Returns:
            (H, W, 3) RGB picture, and its label (that of a frame without a ball if it was left out).
        """
        canvas = self.still.copy()
        draw_stirring(canvas, self.venue, self.clutter, frame)
        streak = self.ball_px(frame) if with_ball else None
        whole = self._draw_by_depth(canvas, frame, streak)
        draw_birds(canvas, self.clutter, frame)
        shown = float(canvas[..., 3].sum()) / 255 / whole if whole else 0.0
        return self._develop(canvas, frame), self._label(frame, streak, shown)

    def _draw_by_depth(self, canvas: Canvas, frame: int, streak: NDArray[np.float64] | None) -> float:
        """Players, net and ball, the farthest first; returns the ball's coverage in pixels before anything hides it."""
        camera, whole = self.venue.camera, 0.0
        things: list[tuple[float, Player | Layer | None]] = [(float(player.base[frame, 1]), player) for player in self.players]
        things.append((0.0, self.net))
        ball = self.rally.ball(self.times[frame])
        if streak is not None and ball is not None:
            things.append((float(ball[1]), None))
        for _, thing in sorted(things, key=lambda entry: -entry[0]):
            if isinstance(thing, Player):
                draw_player(canvas, camera, thing, frame)
            elif isinstance(thing, Layer):
                thing.draw(canvas)
            elif streak is not None and ball is not None:
                whole = blob(canvas, streak, DRAWN_BALL_RADIUS * camera.metres_to_px(ball), self.venue.ball, ball=True)
        return whole

    def _develop(self, canvas: Canvas, frame: int) -> NDArray[np.uint8]:
        """Light, flicker and sensor noise."""
        top, left = self.noise_at[frame]
        height, width = canvas.shape[:2]
        noise = self.noise[top : top + height, left : left + width]
        lit = canvas[..., :3] * (self.light * np.float32(self.gain[frame]))
        lit += noise
        return np.clip(lit, 0, 255, out=lit).astype(np.uint8)

    def _label(self, frame: int, streak: NDArray[np.float64] | None, shown: float) -> Label:
        if streak is None:
            return Label(0, None, None)
        x, y = (round(float(value), 2) for value in streak.mean(axis=0))
        width, height = self.venue.camera.size_wh
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            return Label(0, None, None)
        visibility = 1 if shown >= _CLEAR else 2 if shown >= _HIDDEN else 3
        return Label(visibility, (x, y), self._status(frame))

    def _status(self, frame: int) -> int:
        half = 0.5 / self.venue.fps

        def near(moments: list[float]) -> bool:
            return any(-half <= moment - self.times[frame] < half for moment in moments)

        if near([contact.time for contact in self.rally.contacts]):
            return 1
        return 2 if near(self.rally.bounces) else 0


def make_clip(rng: np.random.Generator, venue: Venue, frames: int) -> SyntheticClip:
    """Draws a clip by lot: it starts anywhere in a match."""
    begin = rng.uniform(0.0, 8.0)
    times = begin + (np.arange(frames, dtype=np.float64) + 0.5) / venue.fps
    rally = make_rally(rng, begin + (frames + 1) / venue.fps)
    players = (make_player(rng, rally, -1, times), make_player(rng, rally, 1, times))
    clutter = make_clutter(rng, venue, frames)
    backdrop = draw_backdrop(rng, venue)
    still = np.dstack([backdrop, np.zeros(backdrop.shape[:2], np.uint8)])
    draw_still(still, clutter)
    width, height = venue.camera.size_wh
    noise = rng.standard_normal((height + _NOISE_MARGIN, width + _NOISE_MARGIN, 3), dtype=np.float32) * np.float32(venue.noise)
    return SyntheticClip(
        venue=venue,
        rally=rally,
        times=times,
        players=players,
        clutter=clutter,
        still=still,
        net=draw_net(rng, venue),
        light=make_light(venue),
        gain=1 + venue.flicker * rng.standard_normal(frames),
        noise=noise,
        noise_at=rng.integers(0, _NOISE_MARGIN, (frames, 2)),
    )

"""The flight of the ball: parabolas between rackets and bounces, in metres and seconds (world axes as in `camera`)."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

GRAVITY = 9.81  # m/s^2
BALL_RADIUS = 0.033  # m; ITF Rules of Tennis, appendix I (6.54 to 6.86 cm across)
RESTITUTION = 0.75  # share of the vertical speed that a bounce leaves; ITF: 100 inches of drop return 53 to 58, sqrt(0.555) = 0.745
FRICTION = 0.70  # share of the horizontal speed that a bounce leaves on a medium court
NET_HEIGHT = 0.914  # m, at the centre
BASELINE = 11.885  # m from the net
BACK_WALL = 17.5  # m from the net; behind it the ball is lost from sight

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Flight:
    """One parabola: from `start` to `end` (s) the ball moves freely from `position` (m) with `velocity` (m/s)."""

    start: float
    end: float
    position: Vector
    velocity: Vector

    def at(self, time: float) -> Vector:
        """(3,) position in m."""
        passed = time - self.start
        place: Vector = self.position + self.velocity * passed - np.array([0.0, 0.0, GRAVITY * passed**2 / 2])
        return place

    def velocity_at(self, time: float) -> Vector:
        """(3,) velocity in m/s."""
        velocity: Vector = self.velocity - np.array([0.0, 0.0, GRAVITY * (time - self.start)])
        return velocity


@dataclass(frozen=True)
class Contact:
    """A racket meets the ball. `side` is -1 for the near player and +1 for the far one."""

    time: float
    side: int
    position: Vector


@dataclass
class Rally:
    """Points played one after the other, with pauses without a ball between them."""

    flights: list[Flight] = field(default_factory=list)
    contacts: list[Contact] = field(default_factory=list)
    bounces: list[float] = field(default_factory=list)

    def ball(self, time: float) -> Vector | None:
        """(3,) position in m, or None where no ball is in play."""
        return next((flight.at(time) for flight in self.flights if flight.start <= time < flight.end), None)


def make_rally(rng: np.random.Generator, until: float) -> Rally:
    """Plays points until `until` seconds are filled (the last one is played to its end)."""
    rally, time = Rally(), 0.0
    while time < until:
        time = _play_point(rng, rally, time)
    return rally


def _play_point(rng: np.random.Generator, rally: Rally, time: float) -> float:
    """A pause, the toss, the serve and some strokes; returns the time when the ball is gone."""
    side = int(rng.choice([-1, 1]))
    time = _toss(rng, rally, time + rng.uniform(0.5, 1.6), side)
    strokes = int(rng.integers(2, 7))
    for stroke in range(strokes):
        contact = rally.contacts[-1]
        bounce = _strike(rng, rally, contact, serve=stroke == 0)
        if stroke == strokes - 1:
            return _run_out(rally, bounce)
        time = _return(rng, rally, bounce, -contact.side)
    return time


def _toss(rng: np.random.Generator, rally: Rally, time: float, side: int) -> float:
    """The server throws the ball up beside the baseline and hits it just after its highest point."""
    hand = np.array([rng.uniform(-2.5, 2.5), side * (BASELINE - 0.1), 1.5])
    rise, duration = rng.uniform(1.15, 1.4), rng.uniform(0.55, 0.6)
    velocity = np.array([0.0, 0.0, rise / duration + GRAVITY * duration / 2])
    flight = Flight(time, time + duration, hand, velocity)
    rally.flights.append(flight)
    rally.contacts.append(Contact(flight.end, side, flight.at(flight.end)))
    return flight.end


def _strike(rng: np.random.Generator, rally: Rally, contact: Contact, serve: bool) -> Flight:
    """From the racket over the net to the first bounce on the other side; returns the flight after that bounce, without an end."""
    depth = rng.uniform(3.5, 6.2) if serve else rng.uniform(5.0, 11.0)
    target = np.array([rng.uniform(-3.8, 3.8), -contact.side * depth, BALL_RADIUS])
    way = target - contact.position
    duration = float(np.hypot(way[0], way[1])) / (rng.uniform(27.0, 36.0) if serve else rng.uniform(15.0, 27.0))
    clearance = NET_HEIGHT + rng.uniform(0.15, 0.9)
    while _height_at_net(contact.position, target, duration) < clearance:
        duration += 0.02
    velocity = way / duration + np.array([0.0, 0.0, GRAVITY * duration / 2])
    flight = Flight(contact.time, contact.time + duration, contact.position, velocity)
    rally.flights.append(flight)
    return _bounce(rally, flight)


def _height_at_net(start: Vector, target: Vector, duration: float) -> float:
    share = start[1] / (start[1] - target[1])
    straight = start[2] + share * (target[2] - start[2])
    return float(straight + GRAVITY * duration**2 / 2 * share * (1 - share))


def _bounce(rally: Rally, flight: Flight) -> Flight:
    """Notes the bounce at the end of `flight`; returns what follows, up to the next bounce."""
    rally.bounces.append(flight.end)
    velocity = flight.velocity_at(flight.end) * np.array([FRICTION, FRICTION, -RESTITUTION])
    position = flight.at(flight.end)
    return Flight(flight.end, flight.end + 2 * velocity[2] / GRAVITY, position, velocity)


def _return(rng: np.random.Generator, rally: Rally, bounced: Flight, side: int) -> float:
    """The receiver meets the ball between its bounce and the next one."""
    time = bounced.start + min(rng.uniform(0.35, 0.75) * (bounced.end - bounced.start), _time_to_wall(bounced, BACK_WALL - 2.0))
    rally.flights.append(Flight(bounced.start, time, bounced.position, bounced.velocity))
    rally.contacts.append(Contact(time, side, bounced.at(time)))
    return time


def _run_out(rally: Rally, bounced: Flight) -> float:
    """Nobody returns the ball: it bounces on until it passes the back wall."""
    while True:
        gone = bounced.start + _time_to_wall(bounced, BACK_WALL)
        rally.flights.append(Flight(bounced.start, min(bounced.end, gone), bounced.position, bounced.velocity))
        if gone <= bounced.end or bounced.end - bounced.start < 0.15:
            return rally.flights[-1].end
        bounced = _bounce(rally, bounced)


def _time_to_wall(flight: Flight, wall: float) -> float:
    y, speed = float(flight.position[1]), float(flight.velocity[1])
    return max(0.0, (wall - (y if speed > 0 else -y)) / abs(speed))

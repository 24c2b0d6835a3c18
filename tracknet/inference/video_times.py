"""Times of a video's frames from its time stamps."""

import av

JOIN_S = 1.0  # a step back by more is a place where recordings were joined: what follows counts from there
JOIN_STAMPS = 3  # as many that rise from where a smaller step back led to make it such a place too; else that stamp was wrong


def stamp_s(frame: av.VideoFrame, stamp: int | None) -> float | None:
    """One of the frame's time stamps in seconds on the file's clock; None where it has none."""
    return None if stamp is None or frame.time_base is None else float(stamp * frame.time_base)


class VideoTimes:
    """Seconds since the first frame, rising from frame to frame.

    A frame without a time stamp comes one frame behind the one before. One whose time stamp is not behind the one before comes half a frame
    behind it, so that the next good time stamp counts again; where a new recording begins, see `JoinedClock`, it comes one frame behind.

    Args:
        fps: average frames per second; None where the file does not say.

    Attributes:
        missing: frames without a time stamp so far.
        backwards: frames so far whose time stamp was not behind the one before.
    """

    def __init__(self, fps: float | None) -> None:
        self.missing = self.backwards = 0
        self._stamps = _Stamps()
        self._frame_s = 1 / fps if fps else float("nan")
        self._clock: JoinedClock | None = None
        self._last_s: float | None = None

    @property
    def last_s(self) -> float:
        """The time given last; 0 before the first."""
        return self._last_s or 0.0

    def next(self, frame: av.VideoFrame) -> float:
        """The time of the next frame; NaN where neither a time stamp nor the rate says it."""
        self._last_s = self._time_s(stamp_s(frame, self._stamps.best(frame.pts, frame.dts)))
        return self._last_s

    def _time_s(self, clock_s: float | None) -> float:
        expected_s = 0 * self._frame_s if self._last_s is None else self._last_s + self._frame_s
        if clock_s is None:
            self.missing += 1
            return expected_s
        if self._clock is None:
            self._clock = JoinedClock(clock_s if self._last_s is None else clock_s - expected_s)
        if self._last_s is None:
            return 0.0
        self.backwards += self._clock.is_behind(clock_s, self._last_s)
        time_s = self._clock.time_s(clock_s, self._last_s, expected_s)
        return self._last_s + self._frame_s / 2 if time_s <= self._last_s else time_s


class JoinedClock:
    """The time in a file that may hold several recordings, each with a clock of its own: where the clock goes back a new one begins.

    A single stamp that goes back is wrong. It is a new recording where it goes back by more than `JOIN_S`, or where the next
    `JOIN_STAMPS` go on from there.

    Args:
        zero_s: what the first recording's clock shows at time 0.
    """

    def __init__(self, zero_s: float) -> None:
        self._zero_s = self._zero_of_next_s = zero_s
        self._back_s: float | None = None  # the clock at the last step back or the last stamp that rose from there
        self._risen = 0

    def is_behind(self, clock_s: float, last_s: float) -> bool:
        """Whether the clock shows no later time than the last."""
        return clock_s - self._zero_s <= last_s

    def time_s(self, clock_s: float, last_s: float, expected_s: float) -> float:
        """The time of the next stamp; no later than the last where the stamp is wrong.

        Args:
            clock_s: the stamp.
            last_s: time given to what came before.
            expected_s: time of what comes next if nothing lacks.
        """
        if not self.is_behind(clock_s, last_s):
            self._back_s = None
            return clock_s - self._zero_s
        if self._back_s is None or clock_s <= self._back_s:
            self._zero_of_next_s, self._risen = clock_s - expected_s, 0
        else:
            self._risen += 1
        self._back_s = clock_s
        if clock_s - self._zero_s < last_s - JOIN_S or self._risen == JOIN_STAMPS:
            self._zero_s, self._back_s = self._zero_of_next_s, None
        return clock_s - self._zero_s


class _Stamps:
    """Chooses between the two time stamps of a frame, of presentation and of decoding: the kind that has risen more faithfully.

    AVI keeps no times of presentation, and FFmpeg guesses them badly where frames are reordered. The rule is that of FFmpeg's own programs,
    `guess_correct_pts` in libavcodec/decode.c.
    """

    def __init__(self) -> None:
        self._last_pts: float = float("-inf")
        self._last_dts: float = float("-inf")
        self._faulty_pts = self._faulty_dts = 0

    def best(self, pts: int | None, dts: int | None) -> int | None:
        """The time stamp to go by; None where the frame has neither."""
        if dts is not None:
            self._faulty_dts += dts <= self._last_dts
            self._last_dts = dts
        if pts is not None:
            self._faulty_pts += pts <= self._last_pts
            self._last_pts = pts
        return pts if pts is not None and (dts is None or self._faulty_pts <= self._faulty_dts) else dts

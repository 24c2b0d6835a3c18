"""Stop signals: a request that the training loop reads between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75 of sysexits.h: stopped by SIGTERM after saving; start it again and it goes on
EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130, as a shell counts it: stopped by Ctrl-C
_EXIT_CODES = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}


class StoppedBeforeTrainingError(BaseException):
    """SIGTERM came while there was nothing to save yet. Not an `Exception`: no handler of errors may take it for one."""


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM raises `StoppedBeforeTrainingError` inside, except where a `StopRequest` is entered."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBeforeTrainingError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


class StopRequest:
    """Notes SIGTERM (preemption) and SIGINT (Ctrl-C) while it is entered, so that the run can save first and leave then.

    The first signal decides the exit code. A second SIGINT raises `KeyboardInterrupt` at once, for a user who will not wait.
    The handlers do nothing else: no lock, no log, no input or output, so they are safe wherever they interrupt.
    Python lets only the main thread install handlers; entered in another thread this object never sees a signal.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def exit_code(self) -> int | None:
        """What the process leaves with: 75 after SIGTERM, 130 after SIGINT, None while no signal has come."""
        return None if self._first is None else _EXIT_CODES[self._first]

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _EXIT_CODES:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None stands for a handler that was not installed from Python and that Python cannot install again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

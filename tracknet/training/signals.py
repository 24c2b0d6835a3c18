"""Stop signals: a request that the training loop reads between two steps."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75 of sysexits.h: stopped by SIGTERM after saving; start it again and it goes on
EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130, as a shell counts it: stopped by Ctrl-C
_EXIT_CODES = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}
KEYPRESS_SECONDS = 0.5  # the terminal and the launcher may both pass on one Ctrl-C; nobody means two by two as quick as that
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHERS = (
    *("accelerate", "accelerate-launch", "accelerate.commands.accelerate_cli", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)


class StoppedBeforeTrainingError(BaseException):
    """SIGTERM came while there was nothing to save yet. Not an `Exception`: no handler of errors may take it for one."""


class _StopAtOnce:
    """A handler. What it raises may come up in a library's clean-up and get lost there, so it also remembers that it was called."""

    def __init__(self) -> None:
        self.called = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.called = True
        raise StoppedBeforeTrainingError


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM raises `StoppedBeforeTrainingError` inside, until a `StopRequest` is entered. At its end the handlers before are back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _StopAtOnce()), signal.SIGINT: signal.getsignal(signal.SIGINT)}
    try:
        yield
    finally:
        _put_back(before)


class StopRequest:
    """Notes SIGTERM (preemption) and SIGINT (Ctrl-C) while it is entered, so that the run can save first and leave then.

    The first signal decides the exit code. A second SIGINT, no sooner than half a second after the first, raises `KeyboardInterrupt` at
    once, for a user who will not wait; so does SIGTERM after a SIGINT where torchrun's launcher makes that of it. The handlers do nothing
    else: no lock, no log, no input or output, so they are safe wherever they interrupt. Once it is left the exit code is decided, and
    SIGTERM is ignored: a launcher sends it to whoever leaves later than another.
    Python lets only the main thread install handlers; entered in another thread this object never sees a signal.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        # torchrun and `accelerate launch` of several processes pass a first Ctrl-C on as it is, and a second one as SIGTERM
        self._launcher_passes_on = "TORCHELASTIC_RUN_ID" in os.environ

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
            before = self._previous[signal.SIGTERM]
            if isinstance(before, _StopAtOnce) and before.called and self._first is None:
                self._first = signal.SIGTERM
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _put_back({signal.SIGINT: self._previous[signal.SIGINT]})
            self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first = signal.Signals(number)
        now = time.monotonic()
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = now
        elif self._interrupted_at is not None and (number == signal.SIGINT or self._launcher_passes_on):
            again = now - self._interrupted_at > KEYPRESS_SECONDS
            if again:
                raise KeyboardInterrupt


def stop_with_launcher() -> None:
    """Asks the kernel for SIGTERM when the launcher that started this process ends. Linux only; elsewhere nothing happens.

    `accelerate launch` of one process passes no signal on, and a killed launcher none at all: the worker would train on, an orphan. The
    kernel goes by the thread that started this process; all the launchers start their workers from their main thread.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if not is_launcher(_command_line(parent)):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def is_launcher(command_line: list[str]) -> bool:
    """Whether it is `accelerate launch` or torchrun that a command line runs: as a program, a script or a module of an interpreter."""
    words = [word for word in command_line if not word.startswith("-")]
    return any(Path(word).name in LAUNCHERS for word in words[:2])


def _command_line(pid: int) -> list[str]:
    """Empty for a process that has ended or that may not be read."""
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None stands for a handler that was not installed from Python and that Python cannot install again
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""Stop signals: a request that the training loop reads between two steps."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from tracknet.training.exit_record import write_exit_record

EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75 of sysexits.h: stopped by SIGTERM after saving; start it again and it goes on
EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130, as a shell counts it: stopped by Ctrl-C
_EXIT_CODES = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}
LEAVE_SECONDS = 1.0  # for the main thread to leave by itself after a second Ctrl-C; else it waits for something that never comes
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


class _Presses:
    """Tells a second Ctrl-C from the first one."""

    def __init__(self) -> None:
        self._first_at: float | None = None
        # torchrun and `accelerate launch` of several processes pass a first Ctrl-C on as it is, and a second one as SIGTERM
        self._launcher_passes_on = "TORCHELASTIC_RUN_ID" in os.environ

    def is_second(self, number: int) -> bool:
        """Takes in a signal that comes now."""
        now = time.monotonic()
        if number == signal.SIGINT and self._first_at is None:
            self._first_at = now
            return False
        means_ctrl_c = number == signal.SIGINT or (number == signal.SIGTERM and self._launcher_passes_on)
        return self._first_at is not None and means_ctrl_c and now - self._first_at > KEYPRESS_SECONDS


class _Listener:
    """Hears a second Ctrl-C on a thread of its own, and ends the process where the main thread does not.

    Python's handlers run in the main thread, between two of its instructions: never while it waits in a collective for a process that is
    stuck. The C part of Python's handler, which runs at once, writes the signal's number into a pipe, and this thread reads it.

    Attributes:
        heard: a second Ctrl-C has come.
        answered: set by the main thread once it leaves because of that.
    """

    _END = b"\0"  # no signal's number

    def __init__(self) -> None:
        self.heard = self.answered = False
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)  # set_wakeup_fd asks for it
        self._previous = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="second Ctrl-C", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what heard of signals before does so again."""
        self.answered = True
        signal.set_wakeup_fd(self._previous)
        # the end of the pipe would not tell it: forked processes may hold that open
        os.write(self._writing, self._END)
        self._thread.join()
        os.close(self._writing)
        os.close(self._reading)

    def _listen(self) -> None:
        presses = _Presses()
        while (byte := os.read(self._reading, 1)) != self._END:
            if presses.is_second(byte[0]):
                self.heard = True
                self._leave_unless_answered()

    def _leave_unless_answered(self) -> None:
        end = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < end:
            if self.answered:
                return
            time.sleep(0.02)
        try:
            write_exit_record(EXIT_INTERRUPTED, "interrupted twice: left at once, without saving", os.environ)
        finally:
            os._exit(EXIT_INTERRUPTED)


class StopRequest:
    """Notes SIGTERM (preemption) and SIGINT (Ctrl-C) while it is entered, so that the run can save first and leave then.

    The first signal decides the exit code. A second SIGINT, no sooner than half a second after the first, raises `KeyboardInterrupt` at
    once, for a user who will not wait; so does SIGTERM after a SIGINT where torchrun's launcher makes that of it. Where the main thread is
    stuck and cannot raise it within a second, the process ends with 130. The handlers do nothing else: no lock, no log, no input or
    output, so they are safe wherever they interrupt. Once it is left the exit code is decided, and SIGTERM is ignored: a launcher sends it
    to whoever leaves later than another.
    Python lets only the main thread install handlers; entered in another thread this object never sees a signal.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._presses = _Presses()
        self._listener: _Listener | None = None
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
            before = self._previous[signal.SIGTERM]
            if isinstance(before, _StopAtOnce) and before.called and self._first is None:
                self._first = signal.SIGTERM
            self._listener = _Listener()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._listener:
                self._listener.close()
        finally:
            self._listener = None
            if self._previous:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                _put_back({signal.SIGINT: self._previous[signal.SIGINT]})
                self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first = signal.Signals(number)
        listener = self._listener
        second = self._presses.is_second(number)
        # while the main thread waited somewhere, the handler has missed the first one; the thread has not
        if second or (listener and listener.heard and not listener.answered):
            if listener:
                listener.answered = True
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
    return any(Path(word).name in LAUNCHERS for word in (*command_line[:1], _script_or_module(command_line)))


def _script_or_module(command_line: list[str]) -> str:
    """What an interpreter runs; empty where that is nothing that has a name."""
    words = iter(command_line[1:])
    for word in words:
        if not word.startswith("-"):
            return word
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(words, None)
        elif option := re.search("[cmXW]", word):  # after others without a value, as in -um
            value = word[option.end() :] or next(words, "")
            if option[0] in "cm":
                return value if option[0] == "m" else ""
    return ""


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

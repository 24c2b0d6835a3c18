"""Stop signals: what they set, what they leave behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tracknet.training.signals import StopRequest


def send(number: signal.Signals) -> None:
    """Signals this process; Python runs the handler before the next line."""
    os.kill(os.getpid(), number)
    time.sleep(0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_first_signal_sets_the_exit_code(number: signal.Signals, code: int) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.exit_code is None
        send(number)
        assert stop.requested
        assert stop.exit_code == code


def test_a_second_signal_of_the_other_kind_does_not_change_the_exit_code() -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.exit_code == 75


@pytest.mark.parametrize("before", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_a_second_ctrl_c_interrupts_at_once(before: list[signal.Signals]) -> None:
    with StopRequest() as stop:
        for number in before:
            send(number)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 75}[before[0]]


def test_the_handlers_before_are_back_afterwards_even_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopRequest():  # noqa: PT012
        assert signal.getsignal(signal.SIGTERM) not in before
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_another_thread_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(*before, False)]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


CHILD = """
import sys, time
from tracknet.training.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)  # a step
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_process_finishes_its_step_and_leaves_with_the_code(number: signal.Signals, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        out, errors = child.communicate(timeout=60)
    assert (out, errors, child.returncode) == ("saved\n", "", code)

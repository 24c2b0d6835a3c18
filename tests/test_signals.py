"""Stop signals: what they set, what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from launch_probe import wait_for

from tracknet.training import signals
from tracknet.training.signals import StoppedBeforeTrainingError, StopRequest, is_launcher, stopping_at_once


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One number: the present time of the handlers."""
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


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
def test_a_second_ctrl_c_interrupts_at_once(before: list[signal.Signals], clock: list[float]) -> None:
    with StopRequest() as stop:
        for number in before:
            send(number)
        clock[0] = 0.6
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 75}[before[0]]


def test_one_ctrl_c_that_comes_twice_is_one(clock: list[float]) -> None:
    """From the terminal and from a launcher; the third one is the user's second."""
    with StopRequest() as stop:
        send(signal.SIGINT)
        clock[0] = 0.4
        send(signal.SIGINT)
        assert stop.exit_code == 130
        clock[0] = 0.8
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("launcher", [True, False])
def test_after_ctrl_c_torchruns_launcher_makes_sigterm_of_a_second_one(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, launcher: bool
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with StopRequest() as stop:
        send(signal.SIGINT)
        clock[0] = 0.6
        with pytest.raises(KeyboardInterrupt) if launcher else nullcontext():
            send(signal.SIGTERM)
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # none of them is a second Ctrl-C
            send(number)
            clock[0] += 0.6
        assert stop.exit_code == 75


def test_before_training_a_signal_stops_at_once_and_afterwards_not_at_all() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping_at_once(), pytest.raises(StoppedBeforeTrainingError):
        send(signal.SIGTERM)
    with stopping_at_once():
        with StopRequest() as stop:
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # from a launcher, to the one that leaves last
        assert stop.exit_code == 75
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_whose_exception_a_library_swallowed_stops_the_run_later() -> None:
    with stopping_at_once():
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.exit_code == 75


def test_the_handlers_before_are_back_afterwards_even_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), stopping_at_once(), StopRequest():  # noqa: PT012
        assert signal.getsignal(signal.SIGTERM) not in before
        assert signal.getsignal(signal.SIGINT) not in before
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


WAITS = """
import sys, threading, time
from tracknet.training.signals import StopRequest
saver = threading.Thread(target=time.sleep, args=(60,), daemon=True)
saver.start()
done = threading.Event()
with StopRequest() as stop:
    print("ready", flush=True)
    try:
        saver.join() if sys.argv[1] == "join" else done.wait()
    except KeyboardInterrupt:
        print(stop.exit_code, flush=True)
"""


@pytest.mark.parametrize("how", ["join", "wait"])
def test_the_main_thread_hears_a_second_ctrl_c_while_it_waits_for_another_thread(how: str) -> None:
    """So it does where a checkpoint is written on a thread of its own."""
    with subprocess.Popen([sys.executable, "-c", WAITS, how], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=20)
    assert (out, child.returncode) == ("130\n", 0)


STUCK = """
import ctypes, sys, threading, time
from tracknet.training.signals import StopRequest
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)

def free_it():
    while not stop._listener.heard:
        time.sleep(0.01)
    libc.pthread_mutex_unlock(mutex)

with StopRequest() as stop:
    if sys.argv[1] == "comes free":
        threading.Thread(target=free_it).start()
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    try:
        libc.pthread_mutex_lock(mutex)  # as in a collective: neither a signal nor another thread's work wakes it
        time.sleep(0)
    except KeyboardInterrupt:
        print("raised", flush=True)
"""


def press_twice(how: str, record: Path, pause_s: float) -> subprocess.Popen[str]:
    environment = os.environ | {"TRACKNET_EXIT_FILE": str(record)}
    child = subprocess.Popen([sys.executable, "-c", STUCK, how], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    time.sleep(pause_s)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    return child


@pytest.mark.skipif(sys.platform != "linux", reason="the child takes a mutex as glibc lays it out")
def test_a_second_ctrl_c_ends_a_process_whose_main_thread_is_stuck(tmp_path: Path) -> None:
    with press_twice("stays", tmp_path / "record", 0.8) as child:
        out, _ = child.communicate(timeout=20)
    assert (out, child.returncode) == ("", 130)
    assert json.loads((tmp_path / "record").read_text())["code"] == 130


@pytest.mark.skipif(sys.platform != "linux", reason="the child takes a mutex as glibc lays it out")
def test_a_main_thread_that_comes_free_after_a_second_ctrl_c_leaves_by_itself(tmp_path: Path) -> None:
    with press_twice("comes free", tmp_path / "record", 0.8) as child:
        out, _ = child.communicate(timeout=20)
    assert (out, child.returncode) == ("raised\n", 0)
    assert not (tmp_path / "record").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the child takes a mutex as glibc lays it out")
def test_one_ctrl_c_that_comes_twice_does_not_end_a_process_that_is_stuck(tmp_path: Path) -> None:
    with press_twice("stays", tmp_path / "record", 0.05) as child:
        time.sleep(1.8)
        assert child.poll() is None
        child.kill()


def test_afterwards_signals_wake_what_they_woke_before_and_nothing_is_left_open() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        threads, next_free = threading.active_count(), os.dup(reading)
        os.close(next_free)
        for _ in range(3):
            with StopRequest():
                send(signal.SIGTERM)
                assert threading.active_count() == threads + 1
        assert threading.active_count() == threads
        again = os.dup(reading)
        os.close(again)
        assert again == next_free
    finally:
        assert signal.set_wakeup_fd(before) == writing
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("/usr/bin/python3 /usr/bin/accelerate launch -m tracknet.scripts.train", True),
        ("python -m accelerate.commands.launch --num_processes 1 -m tracknet.scripts.train", True),
        ("python -u -m torch.distributed.run --nproc_per_node 2 -m tracknet.scripts.train", True),
        ("/opt/bin/python /opt/bin/torchrun --nproc_per_node 2 train.py", True),
        ("/opt/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -X dev -m torch.distributed.run train.py", True),
        ("python -Xdev -W ignore -Im torch.distributed.run train.py", True),
        ("python --check-hash-based-pycs never -mtorch.distributed.run train.py", True),
        ("python -X dev train.py torchrun", False),
        ("python -c pass torchrun", False),
        ("python -m", False),
        ("bash ./launch.sh", False),
        ("python -m pytest tests/torchrun", False),
        ("/sbin/init", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(command_line: str, expected: bool) -> None:
    assert is_launcher(command_line.split()) is expected


# `torchrun` by its name; it starts its worker and waits, as accelerate does for one process.
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""
WORKER = """
import os, pathlib, time
from tracknet.training.signals import StopRequest, stop_with_launcher
with StopRequest() as stop:
    {before}
    stop_with_launcher()
    {after}
    end = time.monotonic() + 20
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.01)
    pathlib.Path("code").write_text(str(stop.exit_code))
"""
READY = 'pathlib.Path("ready").write_text(str(os.getpid()))'
# the launcher is gone by the time that the kernel is asked
KILLED_IN_BETWEEN = """
    import signal
    from tracknet.training import signals
    command_line = signals._command_line
    def then_kill(pid):
        line = command_line(pid)
        os.kill(pid, signal.SIGKILL)
        while os.getppid() == pid:
            time.sleep(0.01)
        return line
    signals._command_line = then_kill
"""


def run_under(name: str, worker: str, folder: Path) -> subprocess.Popen[bytes]:
    (folder / name).write_text(LAUNCHER)
    return subprocess.Popen([sys.executable, name, worker], cwd=folder)


def wait_for_code(folder: Path) -> str:
    end = time.monotonic() + 30
    while not (text := (folder / "code").read_text() if (folder / "code").exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.05)
    return text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_worker_stops_when_its_launcher_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    launcher = run_under("torchrun", WORKER.format(before="", after=READY), tmp_path)
    wait_for(tmp_path / "ready", launcher)
    launcher.send_signal(number)
    launcher.wait()
    assert wait_for_code(tmp_path) == "75"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_launcher_that_ends_while_the_kernel_is_asked_is_noticed(tmp_path: Path) -> None:
    run_under("torchrun", WORKER.format(before=KILLED_IN_BETWEEN, after=""), tmp_path).wait()
    assert wait_for_code(tmp_path) == "75"


def test_a_program_that_is_no_launcher_may_end_before_its_run(tmp_path: Path) -> None:
    launcher = run_under("nohup.py", WORKER.format(before="", after=READY), tmp_path)
    wait_for(tmp_path / "ready", launcher)
    launcher.terminate()
    launcher.wait()
    time.sleep(0.5)
    assert not (tmp_path / "code").exists()
    os.kill(int((tmp_path / "ready").read_text()), signal.SIGTERM)
    assert wait_for_code(tmp_path) == "75"

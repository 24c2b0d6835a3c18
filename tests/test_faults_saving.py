"""Whatever happens while a checkpoint is saved, the folder holds one that loads, and what loads is what was saved."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from fault_table import FaultTable
from saved_runs import (
    RUN_ID,
    SMALL,
    foreign_files_are_untouched,
    leftovers,
    model_texts_of,
    put_foreign_files,
    resumed_step,
    save,
    silence,
    state_of,
    tensors_of,
    what_is_wrong,
)

from tracknet.errors import UserError
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.saver import BackgroundSaver

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:.*fork")]

HERE = Path(__file__).parent
SIZEABLE = 2_000_000  # numbers in the largest tensor: 16 MB in all, so that most of a writer's time is saving


@pytest.fixture(autouse=True)
def _quiet(_fresh_process: None) -> None:
    silence()


# SIGKILL at random moments


def save_for_ever(run_folder: Path, first: int, report: int) -> None:
    """Steps in a row, each twice: the second time it is replaced. Reports `s` where a save begins and `d` where it is done."""
    for number in range(2 * first, 10**6):
        step = number // 2
        os.write(report, f"s{step}\n".encode())
        save(run_folder, step, SIZEABLE, best=step % 3 == 0)
        os.write(report, f"d{step}\n".encode())


def save_for_ever_in_the_background(run_folder: Path, first: int, report: int) -> None:
    """As a training run does: the tensors change as soon as the copy is taken."""
    saver = BackgroundSaver(CheckpointStore(run_folder, keep_last=1), after=lambda _: None)
    for number in range(2 * first, 10**6):
        step = number // 2
        os.write(report, f"s{step}\n".encode())
        tensors = tensors_of(step, SIZEABLE)
        saver.save(step, model_texts_of(step), tensors, state_of(step), best=step % 3 == 0)
        for group in tensors.values():
            for tensor in group.values():
                tensor.add_(1)
        if number % 2:
            saver.wait()
            os.write(report, f"d{step}\n".encode())


def fork(job, *arguments) -> tuple[int, int]:
    """A child that does the job for ever; gives its number and the end of the pipe that it reports to."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        job(*arguments, writing)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def kill(child: int, reading: int) -> list[str]:
    """What it had reported."""
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it failed by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reading) as pipe:
        return pipe.read().split()


@pytest.mark.parametrize("job", [save_for_ever, save_for_ever_in_the_background])
def test_sigkill_at_random_moments(job, tmp_path: Path, faults: FaultTable) -> None:
    run_folder = tmp_path / RUN_ID
    save(run_folder, 1, SIZEABLE)
    put_foreign_files(run_folder)
    drawn = faults.random(job.__name__)
    done = inside = 1
    for number in range(100):
        child, reading = fork(job, run_folder, done + 1)
        begun = os.read(reading, 1)  # of its first save
        moment = drawn.uniform(0.0, 0.4)
        time.sleep(moment)
        events = kill(child, reading)
        events[0] = begun.decode() + events[0]
        done = max([done, *(int(event[1:]) for event in events if event[0] == "d")])
        # nothing that was done is lost, and what had begun may be there
        wrong = what_is_wrong(tmp_path, {done, *(int(event[1:]) for event in events if int(event[1:]) > done)})
        if wrong or events[-1][0] == "s":  # a moment between two saves shows nothing
            faults.record("SIGKILL at a random moment of saving", not wrong, f"{job.__name__} {number} at {moment:.3f} s: {wrong}")
            inside += 1
        if inside > 30:
            break
        done = max(done, resumed_step(tmp_path) or 0)
    assert inside > 30, "too few moments fell into saving"
    save(run_folder, done + 10)
    assert not leftovers(run_folder)


# Disks that fail


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a faulty disk needs Linux and a C compiler (cc)")
    library = tmp_path_factory.mktemp("faulty_disk") / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty_disk.c"), "-ldl"], check=True)
    return library


FAULTS = {
    "kill_before": "SIGKILL before each call that changes the disk",
    "kill_after": "SIGKILL after each such call, and halfway through each write",
    "full": "the disk is full from each such call on (ENOSPC)",
    "fail_once": "each such call fails once (EIO)",
    "flip_a_bit": "a bit flips on its way to the disk, in each write",
}


@pytest.mark.parametrize("step", [2, 1], ids=["new", "replaced"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_call_that_changes_the_disk(fault: str, step: int, tmp_path: Path, faulty_disk: Path, faults: FaultTable) -> None:
    command = [sys.executable, str(HERE / "faulty_disk_probe.py"), str(tmp_path), fault, str(step)]
    done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": str(faulty_disk)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    if fault == "flip_a_bit":
        trials = [trial for trial in trials if trial["call"].startswith("write") or trial["wrong"]]  # other calls carry no bits
    for number, trial in enumerate(trials):
        faults.record(FAULTS[fault], not trial["wrong"], f"step {step}, {number}, {trial['call']}: {trial['wrong']}")
    if not fault.startswith("kill"):
        written = {trial["call"].split("/")[-1] for trial in trials if trial["call"].startswith("write")}
        assert written == {
            "config.json",
            "README.md",
            "state.json",
            "manifest.json",
            *(f"{name}.safetensors" for name in tensors_of(1, SMALL)),
        }


def test_a_disk_that_is_full_at_each_page_of_each_file(small_disk: Path, faults: FaultTable) -> None:
    """The free space grows page by page, so that it ends in the first file, then in the second, and so on to the last."""
    run_folder, filler, page = small_disk / RUN_ID, small_disk / "filler", 4096
    save(run_folder, 1, 10_000)
    put_foreign_files(run_folder)
    for pages in range(1000):
        disk = os.statvfs(small_disk)
        filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - pages * page))
        failure = ""
        try:
            save(run_folder, 2, 10_000)
        except UserError as error:
            failure = str(error)
        filler.unlink()
        wrong = what_is_wrong(small_disk, {1} if failure else {2})
        if failure and ("No space left on device" not in failure or "\n" in failure):
            wrong = f"not one clear line: {failure}"
        faults.record("a full tmpfs, at each page of each file", not wrong, f"{pages} pages free: {wrong}")
        if not failure:
            break
    assert pages > 20, "the space never ended inside a file"
    assert not leftovers(run_folder)


# Two at once


def test_two_processes_save_in_one_folder(tmp_path: Path, faults: FaultTable) -> None:
    """Both are killed at some moment, and all the while a third one looks what it could go on from."""
    run_folder = tmp_path / RUN_ID
    save(run_folder, 1, SIZEABLE)
    put_foreign_files(run_folder)
    drawn = faults.random("two")
    read = 0
    for number in range(10):
        writers = [fork(save_for_ever, run_folder, first) for first in (2, 1000)]
        for writer in writers if number % 2 else reversed(writers):
            end = time.monotonic() + drawn.uniform(0.2, 0.8)
            while time.monotonic() < end:
                with contextlib.suppress(UserError):  # one that is pruned while it is read is refused, and no harm is done
                    read += resumed_step(tmp_path) is not None
            kill(*writer)
        wrong = what_is_wrong(tmp_path, range(1, 10**6))
        faults.record("two processes save in one folder", not wrong, f"{number}: {wrong}")
    assert read, "nothing could ever be read meanwhile"
    save(run_folder, 2000)
    assert not leftovers(run_folder)
    assert foreign_files_are_untouched(run_folder)

"""Training on two machines that loses a process, a machine or the cable: who is gone is said in seconds, and nothing is lost."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from fault_table import FaultTable
from test_train import arguments, metrics_of, only_run
from two_machines import FIRST_ADDRESS, Machine, two_machines

from tracknet.training.checkpoint import LAST, linked_step

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

EVERY_STEPS = 10  # between checkpoints
EPOCHS = 60
FAULT_AT_STEP = 35
FAR = 400.0  # seconds that only a hang takes
SURVIVORS_END_S = 30.0  # they take about one; what takes this long has not noticed
SILENCE_S = 150.0  # a machine that says nothing is given up after one minute
CABLE_IS_CUT_S = 20.0
RESTARTS = 3
LOADER_WORKER = "training.data_loader.num_workers=1"  # it has the connections of its process, and lives on for a while when that is killed


@dataclass
class Run:
    """A training run on both machines.

    Attributes:
        machines: where it runs.
        clips: its data.
        folder: of its output and of the machines' logs, `0.log` and `1.log`.
        launchers: those now running, by machine.
    """

    machines: tuple[Machine, Machine]
    clips: Path
    folder: Path
    launchers: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def launch(self, machine: Machine, *more: str) -> None:
        options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--machine_rank", str(machine.number)]
        meeting = ["--main_process_ip", FIRST_ADDRESS, "--main_process_port", "29500", "--max_restarts", str(RESTARTS)]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, *meeting, "-m", "tracknet.scripts.train"]
        length = [
            f"training.epochs={EPOCHS}",
            f"training.evaluation.every_epochs={EPOCHS}",
            f"training.checkpoint.every_steps={EVERY_STEPS}",
        ]
        own = {
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": machine.namespace,
            "HF_HOME": str(self.folder / "hf"),
            "TRACKNET_CACHE_DIR": str(self.folder / f"cache-{machine.number}"),
        }
        command = [*launcher, *arguments(self.clips, self.folder, *length, *more)]
        self.launchers[machine.number] = machine.start(command, self.log_of(machine), os.environ | own)

    def log_of(self, machine: Machine) -> Path:
        return self.folder / f"{machine.number}.log"

    def output(self, machine: Machine) -> str:
        return self.log_of(machine).read_text(errors="replace")

    def worker(self, machine: Machine) -> psutil.Process:
        """The process that trains there; it is the launcher's child, and the loader's workers are its own."""
        launchers = {process.pid for process in machine.processes() if "accelerate.commands.launch" in process.cmdline()}
        (found,) = [
            process for process in machine.processes() if process.ppid() in launchers and "tracknet.scripts.train" in process.cmdline()
        ]
        return found

    def step(self) -> int:
        """How far training has come, by the metrics that it has written."""
        files = list((self.folder / "logs").glob("run-*/metrics.jsonl"))
        text = files[0].read_text() if files else ""
        return max((int(step) for step in re.findall(r'"step": (\d+)', text)), default=0)

    def saved_step(self) -> int:
        step = linked_step(only_run(self.folder / "checkpoints"), LAST)
        assert step is not None
        return step

    def resumed_steps(self) -> list[int]:
        """The steps after which each continuation began, as the log of the run says."""
        return [int(step) for step in re.findall(r"continuing \S+ after step (\d+)", self.output(self.machines[0]))]

    def wait(self, condition: Callable[[], bool], seconds: float = FAR) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "\n".join(f"{machine.host}:\n{self.output(machine)[-3000:]}" for machine in self.machines)
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step)
        assert self.step() < last_step(), "it ended before the fault"

    def finish(self) -> bytes:
        """Waits for the end, and returns the weights."""
        codes = {}
        for number, launcher in self.launchers.items():
            try:
                codes[number] = launcher.wait(timeout=FAR)
            except subprocess.TimeoutExpired:
                codes[number] = -1
        assert set(codes.values()) == {0}, "\n".join(f"{machine.host}:\n{self.output(machine)[-3000:]}" for machine in self.machines)
        steps = [line["step"] for line in metrics_of(self.folder) if "train/loss" in line]
        assert steps == list(range(1, last_step() + 1))  # none is missing and none is there twice
        return (only_run(self.folder / "checkpoints") / LAST / "model.safetensors").read_bytes()


def last_step() -> int:
    return EPOCHS * 2  # of 4 windows each, on two ranks


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as both:
        yield both


@pytest.fixture(scope="module")
def undisturbed(machines: tuple[Machine, Machine], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run that is left alone."""
    run = Run(machines, clips, tmp_path_factory.mktemp("undisturbed"))
    for machine in machines:
        run.launch(machine)
    return run.finish()


@pytest.fixture
def run(machines: tuple[Machine, Machine], clips: Path, tmp_path: Path, undisturbed: bytes) -> Iterator[Run]:
    """A run at the step where it is to be disturbed."""
    started = Run(machines, clips, tmp_path)
    try:
        for machine in machines:
            started.launch(machine, LOADER_WORKER)
        started.wait_for_step(FAULT_AT_STEP)
        yield started
    finally:
        for machine in machines:
            machine.kill_all()


def survivor_ends(run: Run, survivor: psutil.Process, machine: Machine, line: str, seconds: float = SURVIVORS_END_S) -> float:
    """Waits until the process of the other machine has ended with that line.

    Returns:
        how long that took, in seconds.
    """
    begin = time.monotonic()
    run.wait(lambda: not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE, seconds)
    assert f"{line}; the last checkpoint is whole" in run.output(machine)
    took = time.monotonic() - begin
    print(f"{line}; the other ended after {took:.1f} s")
    return took


def goes_on_and_ends_alike(run: Run, saved_step: int, reached_step: int, undisturbed: bytes) -> None:
    """The run goes on by itself from the checkpoint that was there, and nothing of the fault is left in the end."""
    assert saved_step > reached_step - 2 * EVERY_STEPS  # one save may have been under way
    assert run.finish() == undisturbed
    assert run.resumed_steps() == [saved_step]


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_worker(run: Run, undisturbed: bytes, faults: FaultTable, number: int) -> None:
    row = "two machines: a worker killed"
    with faults.trial(row, f"rank {number}"):
        killed, other = run.machines[number], run.machines[1 - number]
        survivor = run.worker(other)
        run.worker(killed).kill()
        took = survivor_ends(run, survivor, other, f"rank {number} on {killed.host} has gone")
        faults.took(row, took)
        goes_on_and_ends_alike(run, run.saved_step(), run.step(), undisturbed)


def test_a_killed_machine_that_is_started_again(run: Run, undisturbed: bytes, faults: FaultTable) -> None:
    row = "two machines: the second killed whole, and started again"
    with faults.trial(row):
        first, second = run.machines
        survivor = run.worker(first)
        second.kill_all()
        took = survivor_ends(run, survivor, first, "rank 1 on node-b has gone")
        faults.took(row, took)
        saved, reached = run.saved_step(), run.step()
        run.wait(lambda: "waiting for rank 1 (last seen on node-b) since 10 s" in run.output(first))
        run.launch(second, LOADER_WORKER)
        goes_on_and_ends_alike(run, saved, reached, undisturbed)


def test_the_machine_that_keeps_the_store_killed(run: Run, undisturbed: bytes, faults: FaultTable) -> None:
    row = "two machines: the first killed whole, both started again"
    with faults.trial(row):
        first, second = run.machines
        survivor, launcher = run.worker(second), run.launchers[1]
        first.kill_all()
        took = survivor_ends(run, survivor, second, "rank 0 on node-a has gone")
        faults.took(row, took)
        assert launcher.wait(timeout=SURVIVORS_END_S) != 0  # the store has gone with the first machine, so nothing is left to restart with
        saved, reached = run.saved_step(), run.step()
        for machine in run.machines:
            run.launch(machine, LOADER_WORKER, "--resume", "auto")
        goes_on_and_ends_alike(run, saved, reached, undisturbed)


def test_a_cable_that_is_cut_for_a_while(run: Run, undisturbed: bytes, faults: FaultTable) -> None:
    row = f"two machines: the cable cut for {CABLE_IS_CUT_S:.0f} s"
    with faults.trial(row):
        _, second = run.machines
        second.cut_cable()
        time.sleep(CABLE_IS_CUT_S / 2)  # what was under way comes to its end
        reached = run.step()
        time.sleep(CABLE_IS_CUT_S / 2)
        stands_still = run.step() == reached < last_step()
        second.mend_cable()
        assert stands_still
        assert run.finish() == undisturbed
        assert run.resumed_steps() == []  # ridden out


def test_a_machine_that_vanishes_without_a_word(run: Run, undisturbed: bytes, faults: FaultTable) -> None:
    row = "two machines: the second gone without a word, and started again"
    with faults.trial(row):
        first, second = run.machines
        survivor = run.worker(first)
        second.cut_cable()  # no word of its death gets through
        try:
            second.kill_all()
            took = survivor_ends(run, survivor, first, "rank 1 on node-b cannot be reached", SILENCE_S)
            faults.took(row, took)
            saved, reached = run.saved_step(), run.step()
        finally:
            second.mend_cable()
        run.launch(second, LOADER_WORKER)
        goes_on_and_ends_alike(run, saved, reached, undisturbed)

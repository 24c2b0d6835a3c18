"""A run that is told to stop, through the real launchers: it saves, leaves with its code within 10 s, and goes on as if nothing had been.

Each trial hits a moment of a run on tiny clips: `preemption_probe` keeps the run there until the signal has come.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from clips import write_games
from fault_table import FaultTable
from launch_probe import PACKAGE, ROOT, clean_environment, hear_signals
from preemption_probe import EVALUATION, FIRST_STEP, LIMIT_SECONDS, MOMENTS, SAVING, TRAINING
from test_launch_started import free_port
from test_train import arguments, only_run

from tracknet.scripts.train import main
from tracknet.training.checkpoint import verify_checkpoint

PROBE = Path(__file__).with_name("preemption_probe.py")
MODULE = ["-m", "tracknet.scripts.train"]
LEAVES_WITHIN_S = 10.0
LEAVES_AT_ONCE_WITHIN_S = 3.0
STARTS_WITHIN_S = 120.0
ROW = "SIGTERM or Ctrl-C to a rank or to the launcher: all ranks save one step and leave with 75 or 130 within 10 s, and `auto` goes on"
SECOND_ROW = "a second Ctrl-C: all leave at once with 130"
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
LAUNCHER = "launcher"
# 4 steps an epoch of 8 windows, on one process or on two; 8 windows to evaluate
SETTINGS = [
    "training.epochs=4",
    "training.evaluation.every_epochs=2",
    "training.evaluation.batch_size=1",
    "training.checkpoint.every_steps=3",
    "training.ema_decay=0.9",
]


@dataclass(frozen=True)
class Trial:
    """What is started, and who is told to stop when.

    Attributes:
        starter: "python -m", "accelerate launch" or "launch.sh".
        processes: 1 or 2.
        target: a rank, or the launcher. Ctrl-C goes from the terminal to the launcher's whole group of processes.
        number: SIGTERM or SIGINT.
        moment: one of `MOMENTS`.
        workers: that load the data, for each process.
    """

    starter: str
    processes: int
    target: int | str
    number: signal.Signals
    moment: str
    workers: int

    def __str__(self) -> str:
        to = self.target if self.target == LAUNCHER else f"rank {self.target}"
        return f"{self.number.name} to {to} of {self.processes}, {self.starter}, in {self.moment}, {self.workers} workers"

    @property
    def signalled(self) -> list[int]:
        return list(range(self.processes)) if isinstance(self.target, str) else [self.target]

    @property
    def holding(self) -> list[int]:
        """The main rank is the one that saves."""
        return [0] if self.moment == SAVING else self.signalled

    def arguments(self, clips: Path, output: Path) -> list[str]:
        sizes = [f"training.batch_size={4 // self.processes}", f"training.data_loader.num_workers={self.workers}"]
        return arguments(clips, output, *SETTINGS, *sizes)


def trials() -> list[Trial]:
    """40: all targets, signals and moments on two processes; on one, each way to start it."""
    signals = (signal.SIGTERM, signal.SIGINT)
    two = [
        Trial("launch.sh" if number % 2 else "accelerate launch", 2, target, which, moment, 2 * (number // 2 % 2))
        for number, (target, moment, which) in enumerate(product((0, 1, LAUNCHER), MOMENTS, signals))
    ]
    one = [Trial("python -m", 1, 0, which, moment, 2 * (number % 2)) for number, (which, moment) in enumerate(product(signals, MOMENTS))]
    one += [
        Trial(starter, 1, LAUNCHER, signals[(number + (starter == "launch.sh")) % 2], moment, 2 * (number // 2))
        for starter, (number, moment) in product(("accelerate launch", "launch.sh"), enumerate(MOMENTS))
    ]
    return two + one


class Run:
    """A trial that was started; `left_after_s` is how long its workers took to leave, once they have."""

    left_after_s: float

    def __init__(self, trial: Trial, clips: Path, folder: Path, **variables: str) -> None:
        self.trial, self.folder, self.output = trial, folder, folder / "output"
        scripts = folder / "tracknet" / "scripts"
        scripts.mkdir(parents=True)
        (folder / "tracknet" / "__init__.py").write_text(PACKAGE)
        (scripts / "__init__.py").write_text("")
        (scripts / "train.py").write_text("import preemption_probe\n\npreemption_probe.train()\n")
        (folder / "arguments").write_text("\n".join([*trial.arguments(clips, self.output), "--resume", "auto"]))
        environment = launch_environment(
            folder,
            clips,
            NUM_PROCESSES=str(trial.processes),
            PROBE_MOMENT=trial.moment,
            PROBE_HOLDS=",".join(map(str, trial.holding)),
            PROBE_SIGNALLED=",".join(map(str, trial.signalled)),
            **variables,
        )
        commands = {
            "python -m": [sys.executable, *MODULE],
            "accelerate launch": [*accelerate_launch(trial.processes), *MODULE],
            "launch.sh": [str(ROOT / "launch.sh")],
        }
        command = [*commands[trial.starter], *trial.arguments(clips, self.output)]
        with (folder / "console").open("wb") as console:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=console, stderr=console, start_new_session=True, preexec_fn=hear_signals
            )

    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")

    def told(self, name: str) -> list[str]:
        """What each rank told under a name; nothing where one has not."""
        files = [self.folder / f"{name}-{rank}" for rank in range(self.trial.processes)]
        return [file.read_text() for file in files] if all(file.exists() for file in files) else []

    def wait_until_inside(self) -> None:
        end = time.monotonic() + STARTS_WITHIN_S
        while not all((self.folder / f"inside-{rank}").exists() for rank in self.trial.holding):
            assert self.process.poll() is None, f"it left with {self.process.returncode} before {self.trial.moment}: {self.console()}"
            assert time.monotonic() < end, f"{self.trial.moment} never came: {self.console()}"
            time.sleep(0.02)

    def signal(self) -> None:
        """As the trial says; a Ctrl-C for the launcher is what a terminal makes of it."""
        if not isinstance(self.trial.target, str):
            os.kill(int(self.told("pid")[self.trial.target]), self.trial.number)
        elif self.trial.number == signal.SIGINT:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.terminate()

    def wait_until_left(self, ranks: list[int]) -> float:
        """Until these workers have ended; returns the seconds that it took."""
        began = time.monotonic()
        pids = self.told("pid")
        while any(is_alive(int(pids[rank])) for rank in ranks):
            assert time.monotonic() - began < LIMIT_SECONDS, f"ranks {ranks} do not leave: {self.console()}"
            time.sleep(0.02)
        return time.monotonic() - began

    def end(self) -> None:
        """Whatever is left of it."""
        for pid in [self.process.pid, *map(int, self.told("pid"))]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def launch_environment(folder: Path, clips: Path, **variables: str) -> dict[str, str]:
    own = {
        "PYTHONPATH": f"{folder}{os.pathsep}{PROBE.parent}",
        "TRACKNET_CACHE_DIR": str(clips.parent / "cache"),
        "ACCELERATE_USE_CPU": "true",
        # else each process may compile 3,000 modules: 5 seconds
        "PYTHONPYCACHEPREFIX": str(clips.parent / "bytecode"),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    return clean_environment(folder, **own, **variables)


def accelerate_launch(processes: int) -> list[str]:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"] if processes > 1 else ["--cpu", "--num_processes", "1"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preemption") / "clips"
    write_games(root, ["game1", "game2"], clips=2, count=10)
    return root


def carry_out(trial: Trial, clips: Path, folder: Path) -> Run:
    """Stops a run as the trial says; an `AssertionError` says what it did not do."""
    run = Run(trial, clips, folder)
    try:
        run.wait_until_inside()
        run.signal()
        (folder / "sent").touch()
        seconds = run.wait_until_left(list(range(trial.processes)))
        run.process.wait(LIMIT_SECONDS)
    finally:
        run.end()
    code = CODES[trial.number]
    assert run.told("code") == [str(code)] * trial.processes, f"workers left with {run.told('code')}: {run.console()}"
    assert seconds < LEAVES_WITHIN_S, f"left after {seconds:.1f} s: {run.console()}"
    left = {"python -m": code, "launch.sh": code}
    assert run.process.returncode == left.get(trial.starter, run.process.returncode) != 0, f"{run.process.returncode}: {run.console()}"
    assert "exitcode: -" not in run.console(), run.console()  # accelerate names a worker that a signal ended
    steps = run.told("step")
    assert len(set(steps)) == 1, f"the ranks stopped after {steps}"
    last = only_run(run.output / "checkpoints") / "last"
    assert os.readlink(last) == f"step-{int(steps[0]):08}", f"{os.readlink(last)} is saved, stopped after {steps}"
    verify_checkpoint(last.resolve())
    assert (only_run(run.output / "logs") / "PREEMPTED").exists(), "no PREEMPTED"
    run.left_after_s = seconds
    return run


def weights_of(output: Path) -> bytes:
    return (only_run(output / "checkpoints") / "last" / "model.safetensors").read_bytes()


def go_on_on_two_processes(folders: list[Path], clips: Path) -> None:
    """All of them in one launch, for imports take longer than the runs."""
    for folder in folders:
        (folder / "port").write_text(free_port())
    command = [*accelerate_launch(2), str(PROBE), *map(str, folders)]
    done = subprocess.run(command, env=launch_environment(clips.parent, clips), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def check_resumed(run: Run, codes: list[str], undisturbed: Path) -> None:
    assert codes == ["0"] * run.trial.processes, f"resumed, it left with {codes}"
    assert weights_of(run.output) == weights_of(undisturbed), "resumed, it ends with other weights than the undisturbed run"
    assert not (only_run(run.output / "logs") / "PREEMPTED").exists(), "resumed, it still says PREEMPTED"


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_all_ranks_save_leave_with_the_code_and_go_on(clips: Path, tmp_path: Path, faults: FaultTable) -> None:
    all_trials = trials()
    assert len(set(all_trials)) == 40
    lost: dict[Trial, str] = {}
    stopped: dict[Trial, Run] = {}

    def attempt(number: int, trial: Trial) -> None:
        try:
            stopped[trial] = carry_out(trial, clips, tmp_path / f"trial-{number}")
        except Exception as error:
            lost[trial] = f"{type(error).__name__}: {error}"

    undisturbed = {processes: tmp_path / f"undisturbed-{processes}" for processes in (1, 2)}
    assert main(all_trials[-1].arguments(clips, undisturbed[1] / "output")) == 0  # also fills the cache
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, range(len(all_trials)), all_trials))

    undisturbed[2].mkdir()
    (undisturbed[2] / "arguments").write_text("\n".join(all_trials[0].arguments(clips, undisturbed[2] / "output")))
    go_on_on_two_processes([undisturbed[2], *(run.folder for trial, run in stopped.items() if trial.processes == 2)], clips)
    for trial, run in stopped.items():
        alone = trial.processes == 1
        codes = [str(main((run.folder / "arguments").read_text().splitlines()))] if alone else run.told("resumed")
        try:
            check_resumed(run, codes, undisturbed[trial.processes] / "output")
        except AssertionError as error:
            lost[trial] = str(error)
    for trial in all_trials:
        took_s = stopped[trial].left_after_s if trial in stopped else None
        faults.record(ROW, trial not in lost, f"{trial}: {lost.get(trial)}", took_s)


@pytest.fixture(scope="module")
def evaluations(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `validation_probe` tells, for each rank."""
    folder = tmp_path_factory.mktemp("evaluations")
    write_games(folder / "more clips", ["game1", "game2"], clips=2, count=16)  # 3 batches of 2 windows for each rank
    more = ["training.evaluation.batch_size=2", "training.ema_decay=0.9", "training.min_micro_batch_size=1"]
    command = [
        *accelerate_launch(2),
        str(PROBE.with_name("validation_probe.py")),
        str(folder),
        *arguments(folder / "more clips", folder, *more),
    ]
    done = subprocess.run(command, env=launch_environment(folder, clips), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_all_ranks_end_an_evaluation_alike_whatever_happens_on_one(evaluations: list[dict[str, Any]]) -> None:
    metrics = evaluations[0]["undisturbed"]["outcome"]
    assert metrics["val/f1_tracknetv2"] >= 0
    expected = {
        "stop": None,
        "falls back": metrics,
        "undisturbed": metrics,
        "data": "DataError: a clip has gone",
        "no memory": "UserError: out of memory in the evaluation, at micro-batches of 1",
        "cannot": "UserError: out of memory",
    }
    for name, told in evaluations[0].items():
        outcome, of_other = told["outcome"], evaluations[1][name]
        assert outcome == of_other["outcome"], name
        wanted = next(value for kind, value in expected.items() if name.startswith(kind))
        if name.startswith("stop") and "in 3" in name:
            wanted = metrics  # it was over anyway
        if name.startswith("falls back") and "stop on the other" in name:
            wanted = None
        if name.startswith("cannot join") and "stop on the other" in name:
            wanted = None  # nothing is joined
        assert outcome == wanted or (isinstance(wanted, str) and outcome.startswith(wanted)), f"{name}: {outcome}"
        assert told["shown"] == ([2] if isinstance(outcome, dict) else []), name
        assert told["untouched"], name
        assert of_other["untouched"], name
        if not isinstance(outcome, str):
            assert told["size"] == of_other["size"], name


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_counts_for_no_larger_size_but_keeps_a_smaller_one(evaluations: list[dict[str, Any]]) -> None:
    sizes = {name: told["size"] for name, told in evaluations[0].items()}
    assert sizes["undisturbed"]["clean_steps"] == 3
    assert sizes["stop on 1 in 2"]["clean_steps"] == 0
    assert [sizes[f"falls back on {rank}, stop on the other"]["value"] for rank in (0, 1)] == [1, 1]


SECOND_TRIALS = (
    Trial("python -m", 1, 0, signal.SIGINT, EVALUATION, 2),
    Trial("python -m", 1, 0, signal.SIGINT, SAVING, 0),
    Trial("accelerate launch", 1, LAUNCHER, signal.SIGINT, TRAINING, 0),
    Trial("accelerate launch", 2, LAUNCHER, signal.SIGINT, EVALUATION, 2),
    Trial("accelerate launch", 2, 1, signal.SIGINT, FIRST_STEP, 0),
    Trial("launch.sh", 1, LAUNCHER, signal.SIGINT, SAVING, 2),
    Trial("launch.sh", 2, LAUNCHER, signal.SIGINT, TRAINING, 2),
)


def press_twice(trial: Trial, clips: Path, folder: Path) -> float:
    run = Run(trial, clips, folder, PROBE_HOLDS_FOR_EVER="1")
    try:
        run.wait_until_inside()
        run.signal()
        time.sleep(1.0)
        assert all(is_alive(int(pid)) for pid in run.told("pid")), f"left after one: {run.console()}"
        run.signal()
        seconds = run.wait_until_left(trial.signalled)
        run.process.wait(LIMIT_SECONDS)
    finally:
        run.end()
    codes = [(folder / f"code-{rank}") for rank in trial.signalled]
    assert [code.read_text() for code in codes if code.exists()] == ["130"] * len(codes), run.console()
    assert seconds < LEAVES_AT_ONCE_WITHIN_S, f"left after {seconds:.1f} s: {run.console()}"
    assert run.process.returncode != 0
    if trial.starter != "accelerate launch":
        assert run.process.returncode == 130
    return seconds


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_second_ctrl_c_leaves_at_once(clips: Path, tmp_path: Path, faults: FaultTable) -> None:
    def attempt(number: int, trial: Trial) -> tuple[Trial, float | Exception]:
        try:
            return trial, press_twice(trial, clips, tmp_path / f"trial-{number}")
        except Exception as error:
            return trial, error

    with ThreadPoolExecutor(2) as pool:
        for trial, outcome in pool.map(attempt, range(len(SECOND_TRIALS)), SECOND_TRIALS):
            survived = isinstance(outcome, float)
            faults.record(SECOND_ROW, survived, f"{trial}: {outcome}", outcome if survived else None)

"""Whole runs through the command line whose allocator really fails, on one rank of one or two, on tiny clips and on real ones.

A launch takes seconds before the first step, so one launch makes all runs of a case; the tests look at what the runs left.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import first_frames_of_real_clip, real_video_clip, write_games
from numpy.typing import NDArray
from safetensors.numpy import load_file
from test_launch_started import free_port
from test_train import arguments, metrics_of, only_run

WORKER = Path(__file__).with_name("limited_train.py")
STEPS = 14
SHORT_FROM, SHORT_TO = 2, 6  # the steps at whose start memory becomes short, for more than 8 samples at once, and plenty again
SIZES = [32, 32, 8, 8, 8, 8, 8, 8, 8, 8, 16, 32, 32, 32]  # 16 is tried after 2 clean steps, in vain, and again after 4
# Real clips in one process: the fourth batch ends an epoch and is so small that it proves nothing; memory is plenty when 16 is tried.
SIZES_LATER = [32, 32, 8, 8, 8, 8, 16, 32, 32, 32, 32, 32, 32, 32]
RETRIES = [0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
EVALUATIONS = [4, 8, 12, 14]  # updates made; memory is short in the first one
DOUBLE_TOLERANCE = 1e-13  # of the weights, relative, in L2; 5e-17 was measured, with half of the weights in other bits
ENDINGS = {
    "training.adaptive_micro_batch=false": "step 3: out of memory at micro-batches of 32; lower training.micro_batch_size, or set"
    " training.adaptive_micro_batch=true",
    "training.min_micro_batch_size=16": "step 3: out of memory at micro-batches of 16, the smallest that"
    " training.min_micro_batch_size=16 allows; lower it if it is above 1, else data.sequence.length, data.preprocess.resize,"
    " data.augment.crop or the model",
    "training.oom_retries=1": "step 3: out of memory at micro-batches of 16 after 1 retry (training.oom_retries=1); start lower with"
    " training.micro_batch_size, or allow more retries",
}


@dataclass(frozen=True)
class Case:
    """Where runs take place, and which.

    Attributes:
        processes: 1 or 2.
        real: real clips in place of tiny ones.
        place: of the failures in training; evaluation runs out of memory as well.
        limited_rank: whose memory is short.
        double: the network computes in float64, and one run is undisturbed.
        resumes: one run is stopped and resumed, and one ends in the evaluation.
        endings: settings under which a run may not fall far enough.
    """

    processes: int
    real: bool
    place: str
    limited_rank: int
    double: bool
    resumes: bool
    endings: tuple[str, ...]

    @property
    def tries_later(self) -> bool:
        return self.real and self.processes == 1

    @property
    def sizes(self) -> list[int]:
        """Of all steps."""
        return SIZES_LATER if self.tries_later else SIZES

    @property
    def trials(self) -> tuple[tuple[int, int], ...]:
        """Steps from 1, and the larger size that each tries."""
        return ((7, 16), (8, 32)) if self.tries_later else ((6, 16), (11, 16), (12, 32))

    @property
    def retries(self) -> list[int]:
        """Of all steps."""
        return [0, 0, 2] + [0] * (STEPS - 3) if self.tries_later else RETRIES


CASES = {
    "1 process, tiny clips": Case(1, False, "forward", 0, double=False, resumes=True, endings=tuple(ENDINGS)),
    "2 processes, real clips": Case(2, True, "backward", 1, double=True, resumes=False, endings=("training.oom_retries=1",)),
    "1 process, real clips": Case(1, True, "backward", 0, double=True, resumes=False, endings=()),
    "2 processes, tiny clips": Case(2, False, "forward", 0, double=False, resumes=True, endings=tuple(ENDINGS)),
}
SLOW = ("1 process, real clips", "2 processes, tiny clips")


def in_cases(wanted: Callable[[Case], Any] = lambda _: True) -> pytest.MarkDecorator:
    """Runs a test on the runs of each case that is wanted."""
    kept = [(name, case) for name, case in CASES.items() if wanted(case)]
    params = [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in kept]
    return pytest.mark.parametrize("runs", params, indirect=True)


@dataclass(frozen=True)
class Finished:
    """What a run left.

    Attributes:
        told: its own folder.
        output: its output folder, which a resumed run shares with the one that it continues.
    """

    told: Path
    output: Path

    def rank(self, rank: int) -> dict[str, Any]:
        """Exit code, sizes and digest of the weights."""
        return json.loads((self.told / f"rank{rank}.json").read_text())

    def console(self, rank: int = 0) -> list[str]:
        return (self.told / f"rank{rank}.log").read_text().splitlines()

    def lines_with(self, text: str) -> list[str]:
        """Of the main rank's console, without the time in front."""
        return [line.split(" ", 1)[1] for line in self.console() if text in line]

    def column(self, key: str) -> list[Any]:
        """A metric, step by step."""
        return [line[key] for line in metrics_of(self.output) if "train/loss" in line]

    def counts(self) -> list[dict[str, Any]]:
        """Those of each evaluation, with its step."""
        evaluations = [line for line in metrics_of(self.output) if "val/f1_wasb" in line]
        return [{key: value for key, value in line.items() if key == "step" or key.startswith("val/")} for line in evaluations]

    def checkpoint(self) -> Path:
        return only_run(self.output / "checkpoints") / "last"

    def tensor_files(self) -> dict[str, bytes]:
        """Weights, their average and the optimizer's state."""
        return {path.name: path.read_bytes() for path in self.checkpoint().glob("*.safetensors")}

    def weights(self) -> NDArray[np.float64]:
        loaded = load_file(self.checkpoint() / "weights.safetensors")
        return np.concatenate([loaded[name].ravel() for name in sorted(loaded)])


@dataclass(frozen=True)
class Runs:
    """All runs of a case."""

    case: Case
    folder: Path
    exit_code: int  # of the launcher, whose own run is the last

    def __getitem__(self, name: str) -> Finished:
        return Finished(self.folder / name, self.folder / ("stopped" if name == "resumed" else name))


def write_clips(case: Case, root: Path) -> None:
    """So many that full batches stand at all steps where the size changes, and each rank evaluates more than 8 windows."""
    if case.real:
        first_frames_of_real_clip(root, count=100 if case.processes == 1 else 207)  # 4 steps an epoch, the last one ragged
        real_video_clip(root, "game8_Clip1")
    else:
        write_games(root, ["game1"], clips=4, count=18)  # 2 steps an epoch on one process, 1 on two
        write_games(root, ["game2"], clips=2, count=48)


def settings(case: Case) -> list[str]:
    of_clips = ["data.split.val_games=[game2]"]
    if case.real:
        of_clips = ["data.split.val_games=[game8]", "data.preprocess.resize=[64,36]", "model.heatmap.size=[32,18]"]
    return [
        *of_clips,
        "training.batch_size=32",
        f"training.max_steps={STEPS}",
        f"training.evaluation.every_epochs={1 if case.real else 2 * case.processes}",
        "training.evaluation.threshold=0",  # each frame's peak counts, so that the counts depend on where it is
        "training.mb_growth_steps=2",
        "training.ema_decay=0.9",
    ]


def plan(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """What each run is besides its settings; see `limited_train.Run`. `more` are further arguments."""
    short = {
        "hungry": [case.place, "evaluation"],
        "limited_rank": case.limited_rank,
        "limit_step": SHORT_FROM,
        "lift_step": SHORT_TO,
    }
    runs: dict[str, dict[str, Any]] = {"short": short, "prescribed": {"sizes_of": str(folder / "short")}}
    if case.double:
        runs["undisturbed"] = {}
    if case.resumes:
        runs["stopped"] = {**short, "stop_step": 2}
        runs["resumed"] = {**short, "limit_step": 4, "more": ["--resume", "auto"]}
        in_evaluation = {**short, "hungry": ["evaluation"], "limited_rank": case.processes - 1}
        runs["ended in the evaluation"] = {**in_evaluation, "more": ["training.min_micro_batch_size=16"]}
    return runs | {ending: {**short, "more": [ending]} for ending in case.endings}


def launch(case: Case, folder: Path) -> Runs:
    write_clips(case, folder / "clips")
    runs = Runs(case, folder, exit_code=0)
    described = []
    for name, run in plan(case, folder).items():
        runs[name].told.mkdir()
        all_arguments = [*arguments(folder / "clips", runs[name].output, *settings(case)), *run.pop("more", [])]
        described.append({"folder": str(runs[name].told), "arguments": all_arguments, "port": free_port(), "double": case.double, **run})
    unset = ("RANK", "LOCAL_RANK", "TRACKNET_EXIT_FILE", "TRACKNET_EXPECTED_WORLD_SIZE", "TRACKNET_TIMESTAMP", "TRACKNET_CONFIG_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in (*unset, "PYTHONDONTWRITEBYTECODE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1]), "TRACKNET_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPYCACHEPREFIX"] = str(folder.parent / "bytecode")  # else each process may compile 3,000 modules: 5 seconds
    launcher = [sys.executable]
    if case.processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(case.processes), "--main_process_port", "0"]
    done = subprocess.run([*launcher, str(WORKER), json.dumps(described)], env=environment, capture_output=True, text=True, timeout=280)
    return Runs(case, folder, done.returncode)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch(request.param, tmp_path_factory.mktemp("runs"))


@in_cases()
def test_the_run_finishes_and_says_once_per_step_and_evaluation_what_happened(runs):
    short = runs["short"]
    assert [short.rank(rank)["code"] for rank in range(runs.case.processes)] == [0] * runs.case.processes
    in_vain = [] if runs.case.tries_later else ["WARNING: step 6: out of memory at 16; now 4 micro-batches of 8, the update is unchanged"]
    assert short.lines_with("out of memory") == [
        "WARNING: step 3: out of memory at 32; now 4 micro-batches of 8, the update is unchanged",
        "WARNING: evaluation: out of memory at 32; now 8 windows at once",
        *in_vain,
    ]
    assert not runs["prescribed"].lines_with("out of memory")


@in_cases()
def test_sizes_fall_and_rise_with_the_memory_on_all_ranks_alike(runs):
    short = runs["short"]
    assert [short.rank(rank)["sizes"] for rank in range(runs.case.processes)] == [runs.case.sizes] * runs.case.processes
    assert [line for line in short.lines_with("again") if line.startswith("step")] == [
        f"step {step}: trying micro-batches of {size} again" for step, size in runs.case.trials
    ]


@in_cases()
def test_metrics_carry_sizes_retries_and_peak_memory(runs):
    short = runs["short"]
    assert short.column("train/micro_batch_size") == runs.case.sizes
    assert short.column("train/oom_retries") == runs.case.retries
    peaks = short.column("train/peak_memory_gb")
    assert 0.05 < peaks[0] <= peaks[-1] < 10
    assert peaks == sorted(peaks)


@in_cases()
def test_all_that_is_saved_equals_a_run_whose_sizes_were_prescribed_bit_by_bit(runs):
    short, prescribed = runs["short"], runs["prescribed"]
    assert prescribed.column("train/micro_batch_size") == runs.case.sizes
    assert prescribed.column("train/oom_retries") == [0] * STEPS
    assert short.tensor_files().keys() == {"model.safetensors", "weights.safetensors", "optimizer.safetensors"}
    assert short.tensor_files() == prescribed.tensor_files()
    assert {run.rank(rank)["weights"] for run in (short, prescribed) for rank in range(runs.case.processes)} == {short.rank(0)["weights"]}
    assert short.counts() == prescribed.counts()


@in_cases(lambda case: case.double)
def test_in_double_the_weights_are_those_of_the_undisturbed_run(runs):
    short, undisturbed = runs["short"].weights(), runs["undisturbed"].weights()
    assert short.dtype == np.float64
    assert runs["undisturbed"].column("train/micro_batch_size") == [32] * STEPS
    assert np.linalg.norm(short - undisturbed) <= DOUBLE_TOLERANCE * np.linalg.norm(undisturbed)


@in_cases(lambda case: case.double)
def test_an_evaluation_in_smaller_pieces_counts_the_same(runs):
    undisturbed = runs["undisturbed"].counts()
    assert [line["step"] for line in undisturbed] == EVALUATIONS
    assert all(line["val/tp_wasb"] + line["val/fp1_wasb"] > 0 for line in undisturbed)
    assert runs["short"].counts() == undisturbed


@in_cases(lambda case: case.resumes)
def test_a_resumed_run_starts_at_the_smaller_size_and_ends_as_if_it_had_not_been_stopped(runs):
    short, stopped, resumed = runs["short"], runs["stopped"], runs["resumed"]
    for rank in range(runs.case.processes):
        assert (stopped.rank(rank)["code"], resumed.rank(rank)["code"]) == (75, 0)
        assert (stopped.rank(rank)["sizes"], resumed.rank(rank)["sizes"]) == (SIZES[:4], SIZES[4:])
    assert resumed.lines_with("in micro-batches of 8")
    assert resumed.tensor_files() == short.tensor_files()


def assert_ended(ended: Finished, processes: int, message: str) -> None:
    """In one line, on the main rank alone, unless nothing ends the others for some seconds after that."""
    assert ended.rank(0)["code"] == 1
    assert [line for line in ended.console() if "out of memory" in line] == ended.console()[-1:] == [message]
    for rank in range(1, processes):
        assert ended.console(rank) in ([], [message])


@in_cases(lambda case: case.endings)
def test_where_the_size_may_not_fall_far_enough_one_line_says_what_to_lower(runs):
    for ending in runs.case.endings:
        assert_ended(runs[ending], runs.case.processes, ENDINGS[ending])
    assert runs.exit_code == 1  # the last of them is the launcher's own


@in_cases(lambda case: case.resumes)
def test_an_evaluation_that_does_not_fit_ends_in_one_line_and_costs_no_training(runs):
    ended = runs["ended in the evaluation"]
    at_failure = "out of memory in the evaluation, at micro-batches"
    message = ENDINGS["training.min_micro_batch_size=16"].replace("step 3: out of memory at micro-batches", at_failure)
    assert_ended(ended, runs.case.processes, message)
    assert ended.checkpoint().resolve().name == "step-00000004"

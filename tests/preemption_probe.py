"""Runs the real `tracknet.scripts.train`, and lets a test hit a moment of it: inside, it says so and stays until the signal has come.

PROBE_OUT is the folder where it leaves what it tells: `pid-<rank>`, `inside-<rank>` at the moment that PROBE_MOMENT names, `step-<rank>`
with the updates made so far, `code-<rank>` with the exit code. It stays at that moment on the ranks of PROBE_HOLDS until `sent` is there,
and where the rank is one of PROBE_SIGNALLED, until it has noted the signal itself: a launcher takes some time to pass one on. Where the
variable PROBE_HOLDS_FOR_EVER is set it stays for a minute.

Run as a script with folders as arguments it trains many times, one after the other, each time in a fork: imports take most of the time.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from tracknet.training import checkpoint_store, validation
from tracknet.training.gradient import SummedLoss
from tracknet.training.signals import StopRequest
from tracknet.training.step import TrainingStep

TRAIN = Path(__file__).resolve().parents[1] / "tracknet" / "scripts" / "train.py"
FIRST_STEP, TRAINING, EVALUATION, SAVING = MOMENTS = ("the first step", "training", "evaluation", "saving")
TRAINING_STEP, SAVED_STEP = 5, 6  # where "training" and "saving" are, and there is an evaluation at step 8
LIMIT_SECONDS = 60.0
FOLDER, RANK = Path(os.environ.get("PROBE_OUT", ".")), int(os.environ.get("RANK", "0"))


class Moment:
    """Holds the process once, where the test wants it."""

    def __init__(self) -> None:
        self.requests: list[StopRequest] = []
        self._passed = str(RANK) not in os.environ["PROBE_HOLDS"].split(",")
        self._is_signalled = str(RANK) in os.environ["PROBE_SIGNALLED"].split(",")

    def at(self, moment: str) -> None:
        if self._passed or moment != os.environ["PROBE_MOMENT"]:
            return
        self._passed = True
        (FOLDER / f"inside-{RANK}").touch()
        end = time.monotonic() + LIMIT_SECONDS
        while not self._is_over() and time.monotonic() < end:
            time.sleep(0.01)

    def _is_over(self) -> bool:
        if "PROBE_HOLDS_FOR_EVER" in os.environ or not (FOLDER / "sent").exists():
            return False
        return not self._is_signalled or any(request.requested for request in self.requests)


def install(moment: Moment) -> None:
    """Puts the moment into its places."""
    backward, step_of, detect = SummedLoss.backward, TrainingStep.__call__, validation.detect
    write_files, enter = checkpoint_store._write_files, StopRequest.__enter__
    detected = []

    def backward_held(self: SummedLoss, batch: Any, step: int) -> Any:
        if step in (0, TRAINING_STEP):
            moment.at(FIRST_STEP if step == 0 else TRAINING)
        return backward(self, batch, step)

    def step_told(self: TrainingStep, batch: Any, step: int, stop: bool) -> Any:
        result = step_of(self, batch, step, stop)
        (FOLDER / f"step-{RANK}").write_text(str(step + 1))
        return result

    def detect_held(*arguments: Any) -> Any:
        detected.append(1)
        if len(detected) == 2:
            moment.at(EVALUATION)
        return detect(*arguments)

    def write_files_held(folder: Path, step: int, *rest: Any) -> None:
        if step == SAVED_STEP:
            moment.at(SAVING)
        write_files(folder, step, *rest)

    def enter_told(self: StopRequest) -> StopRequest:
        moment.requests.append(self)
        return enter(self)

    SummedLoss.backward, TrainingStep.__call__, validation.detect = backward_held, step_told, detect_held  # type: ignore[method-assign]
    checkpoint_store._write_files, StopRequest.__enter__ = write_files_held, enter_told  # type: ignore[method-assign]


def tell(code: object) -> None:
    (FOLDER / f"code-{RANK}").write_text(str(code))


def train() -> None:
    """As `python -m tracknet.scripts.train` does."""
    leave = os._exit

    def leave_told(code: int) -> Any:
        tell(code)
        leave(code)

    os._exit = leave_told
    (FOLDER / f"pid-{RANK}").write_text(str(os.getpid()))
    install(Moment())
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except SystemExit as error:
        tell(error.code or 0)
        raise


def go_on_with(folders: list[Path]) -> None:
    """Trains once for each folder, which has the arguments in `arguments`, a line each, and in `port` where the ranks of this run meet."""
    from tracknet.scripts.train import main

    for folder in folders:
        if (child := os.fork()) == 0:
            # the launcher's meeting place still has what the ranks of the run before left there
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": (folder / "port").read_text()}
            with (folder / f"resumed-{RANK}.log").open("wb") as console:
                os.dup2(console.fileno(), sys.stderr.fileno())
            code = main((folder / "arguments").read_text().splitlines())
            sys.stderr.flush()
            os._exit(code)  # the interpreter would take seconds to take itself apart, run after run
        status = os.waitpid(child, 0)[1]
        (folder / f"resumed-{RANK}").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    go_on_with([Path(argument) for argument in sys.argv[1:]])

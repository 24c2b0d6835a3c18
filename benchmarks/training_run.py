"""A short run of the demo recipe with a clock in it: what evaluating, saving, pictures and logging cost.

The run is the real one: worker processes, checkpoints, previews, metrics, W&B off.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from ratios import Row, Spread, significant, time_ratio

from tracknet.training import build, run
from tracknet.training.progress import Progress
from tracknet.training.tracking import Tracker
from tracknet.training.trainer import Trainer
from tracknet.training.validation import Validation
from tracknet.utils.config import build_cfg

SETTINGS = [
    "data.split.train_games=[court1]",
    "data.split.val_games=[court7]",
    "training.epochs=9",
    "training.evaluation.every_epochs=1",
    "training.checkpoint.every_steps=10",
    "training.tracking.log_every_steps=10",
]


class Clock:
    """What was noted while a run went on."""

    def __init__(self) -> None:
        self.began: list[float] = []  # of each step
        self.work: dict[int, dict[str, float]] = {}  # by step: the same work alone, which is made once more there
        self.extra: dict[int, float] = {}  # by step: seconds that the benchmark itself took
        self.telling_s = 0.0  # of the training thread, for logging and previews
        self.drawing_s = 0.0  # CPU seconds of the thread that draws

    def telling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Counts what a function takes on the training thread."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                if threading.current_thread() is threading.main_thread():
                    self.telling_s += time.perf_counter() - start

        return timed

    def drawing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Counts the CPU time of a function on its thread, and of what it draws."""

        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.drawing_s += time.thread_time() - start

        return timed

    def alone(self, step: int, name: str, action: Callable[[], object]) -> None:
        """Does the work of a step once more, by itself."""
        start = time.perf_counter()
        action()
        self.work.setdefault(step, {})[name] = time.perf_counter() - start

    def paused(self, step: int, action: Callable[[], object]) -> None:
        """What the benchmark does in between."""
        start = time.perf_counter()
        action()
        self.extra[step] = self.extra.get(step, 0.0) + time.perf_counter() - start


def run_rows() -> list[Row]:
    """The rows of this run."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        _train(clock, Path(folder))
    whole = {
        step: end - start - clock.extra.get(step, 0.0)
        for step, (start, end) in enumerate(zip(clock.began, clock.began[1:], strict=False), 1)
    }
    plain = [seconds for step, seconds in whole.items() if step > 5 and not {step, step - 1, step - 2} & clock.work.keys()]
    rows = []
    for kind, names in (("evaluates and saves", {"evaluation", "copy"}), ("saves", {"copy"})):
        steps = [step for step, work in clock.work.items() if set(work) == names and step in whole]
        taken = [whole[step] for step in steps]
        own = [median(plain) + sum(clock.work[step].values()) for step in steps]
        parts = ", ".join(f"{name} {_ms([clock.work[step][name] for step in steps])}" for name in sorted(names))
        remark = f"{_ms(taken)} against a plain step of {_ms(plain)} and alone: {parts}"
        rows.append(Row(f"a step that {kind}", "plain step + the same work alone", "1, no stall", time_ratio(taken, own), remark))
    seconds = sum(whole.values())
    share = 100 * (clock.telling_s + clock.drawing_s) / seconds
    remark = (
        f"{len(clock.began)} steps, {seconds:.0f} s; on the training thread {clock.telling_s * 1e3:.0f} ms,"
        f" CPU time of the thread that draws {clock.drawing_s * 1e3:.0f} ms"
    )
    return [*rows, Row("previews and logging, % of a run", "the run", "<= 1", Spread(share, share, share, 1), remark)]


def _train(clock: Clock, folder: Path) -> None:
    os.environ["TRACKNET_CACHE_DIR"] = str(folder / "cache")
    cfg = build_cfg("demo", "demo", "demo", overrides=SETTINGS, output_dir=folder / "outputs", dry_run=True)
    build.Validation = _measured_validation(clock)  # type: ignore[misc]
    make_trainer = run.build_trainer

    def measured_trainer(*arguments: Any, **named: Any) -> Trainer:
        trainer = make_trainer(*arguments, **named)
        _measure(trainer, clock)
        return trainer

    run.build_trainer = measured_trainer
    for owner, name in ((Tracker, "log"), (Tracker, "log_previews"), (Progress, "update")):
        setattr(owner, name, clock.telling(getattr(owner, name)))
    Tracker._write_previews = clock.drawing(Tracker._write_previews)  # type: ignore[method-assign]
    build.draw_previews = clock.drawing(build.draw_previews)
    code = run.train(cfg, None)
    if code != 0:
        raise RuntimeError(f"the run ended with {code}")


def _measure(trainer: Trainer, clock: Clock) -> None:
    make_step, saving, state = trainer._make_step, trainer._saving, trainer._state
    save = saving.save

    def noted_step(batch: Any) -> Any:
        clock.began.append(time.perf_counter())
        return make_step(batch)

    def noted_save(saved_state: Any, f1: float | None = None) -> None:
        save(saved_state, f1)
        step = state.position.step
        if step:  # the first checkpoint is written before the first step
            copy = lambda: [t.clone() for group in state.tensors(keep=True).values() for t in group.values()]  # noqa: E731
            clock.paused(step, lambda: clock.alone(step, "copy", copy))

    trainer._make_step = noted_step  # type: ignore[method-assign]
    saving.save = noted_save  # type: ignore[method-assign]


def _measured_validation(clock: Clock) -> type[Validation]:
    class Measured(Validation):
        def __call__(self, step: int) -> dict[str, float] | None:
            metrics = super().__call__(step)
            show, self._show_previews = self._show_previews, lambda *_: None
            clock.paused(step, lambda: clock.alone(step, "evaluation", lambda: super(Measured, self).__call__(step)))
            self._show_previews = show
            return metrics

    return Measured


def _ms(seconds: list[float]) -> str:
    return f"{significant(median(seconds) * 1e3)} ms"


if __name__ == "__main__":
    for row in run_rows():
        print(f"{row.what} | {row.against} | {row.target} | {row.measured} | {row.remark}", flush=True)

"""Evaluates on the ranks of one launch, again and again, with a stop or a failure at each place; writes what came out.

The first argument is the folder for `rank-<n>.json`, the others are those of `tracknet.scripts.train`. An evaluation whose ranks do not
meet in the same collectives hangs, and ends by the watchdog.
"""

import faulthandler
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tracknet.data.loader import EpochLoader
from tracknet.data.sampler import EpochBatchSampler
from tracknet.errors import DataError, UserError
from tracknet.models import TrackNetModel
from tracknet.scripts.train import parse_arguments
from tracknet.training import validation
from tracknet.training.accelerator import start_accelerator
from tracknet.training.build import build_data, build_network, build_state
from tracknet.training.ranks import Ranks
from tracknet.training.state import EVALUATION, TrainingState
from tracknet.training.validation import Validation
from tracknet.utils.config import cfg_from_arguments, typed

SECONDS = 90
BATCHES = 3  # of each rank
detect, join, finished_model = validation.detect, validation.join_detections, TrainingState.finished_model


class Case:
    """What happens on which rank: (rank, batch from 1) for a stop, or for what `fails` raises there."""

    def __init__(self, name: str, *, stop: tuple[int, int] = (-1, 0), fails: tuple[int, int] = (-1, 0), how: str = "") -> None:
        self.name, self.stop, self.fails, self.how = name, stop, fails, how
        self.batch = 0


def cases() -> Iterator[Case]:
    yield Case("undisturbed")
    for rank in (0, 1):
        for batch in range(1, BATCHES + 1):
            yield Case(f"stop on {rank} in {batch}", stop=(rank, batch))
            for how in ("data", "no memory at all", "falls back"):
                yield Case(f"{how} on {rank} in {batch}", fails=(rank, batch), how=how)
        for how in ("cannot enter", "cannot join"):
            yield Case(f"{how} on {rank}", fails=(rank, 0), how=how)
        for how in ("data", "falls back", "cannot enter", "cannot join"):
            yield Case(f"{how} on {rank}, stop on the other", fails=(rank, 2), how=how, stop=(1 - rank, 2))
    yield Case("undisturbed in the end")


@contextmanager
def injected(case: Case, rank: int) -> Iterator[None]:
    failed = []

    def detect_or_fail(model: TrackNetModel, part: Any, *rest: Any) -> Any:
        if (rank, case.batch) == case.fails:
            if case.how == "data":
                raise DataError("a clip has gone")
            if case.how == "no memory at all" or (case.how == "falls back" and not failed):
                failed.append(1)
                raise MemoryError
        return detect(model, part, *rest)

    def join_or_fail(found: Any) -> Any:
        if case.how == "cannot join" and rank == case.fails[0]:
            raise MemoryError
        return join(found)

    @contextmanager
    def enter_or_fail(state: TrainingState) -> Iterator[TrackNetModel]:
        if case.how == "cannot enter" and rank == case.fails[0]:
            raise MemoryError
        with finished_model(state) as model:
            yield model

    validation.detect, validation.join_detections, TrainingState.finished_model = detect_or_fail, join_or_fail, enter_or_fail
    try:
        yield
    finally:
        validation.detect, validation.join_detections, TrainingState.finished_model = detect, join, finished_model


class CountingLoader(EpochLoader):
    """Tells a case at which batch it is."""

    counted: Callable[[int], None]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(super().epoch(epoch, first), 1):
            self.counted(number)
            yield batch


def main(folder: Path, argv: list[str]) -> None:
    config = typed(cfg_from_arguments(*parse_arguments(argv)))
    accelerator, precision = start_accelerator(config.training)
    ranks = Ranks(accelerator)
    datasets = build_data(config, ranks)
    sampler = EpochBatchSampler(len(datasets.val), 2, ranks.rank, ranks.size, 0, shuffle=False, drop_last=False)
    loader = CountingLoader(datasets.val, sampler, config.training.data_loader)
    assert len(loader) == BATCHES
    told = {}
    for case in cases():
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        torch.manual_seed(0)  # the same network each time
        state = build_state(config, build_network(config, datasets, ranks, None), precision, None)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.mul_(1.01)  # so that the average is another
        before = digest(state)
        loader.counted = lambda number, case=case: setattr(case, "batch", number)
        shown: list[int] = []
        evaluate = Validation(
            state,
            loader,
            ranks=ranks,
            threshold=0.5,
            previews=2,
            autocast=accelerator.autocast,
            show_previews=lambda step, pictures, shown=shown: shown.append(len(pictures)),
            stop_requested=lambda case=case: ranks.rank == case.stop[0] and case.batch >= case.stop[1],
        )
        with injected(case, ranks.rank):
            try:
                outcome: Any = evaluate(1)
            except UserError as error:
                outcome = f"{type(error).__name__}: {error}"
        told[case.name] = {
            "outcome": outcome,
            "shown": shown,
            "size": state.micro_batch_sizes[EVALUATION].as_json(),
            "untouched": digest(state) == before and state.model.training,
        }
        ranks.gather([case.name])
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(told))
    accelerator.end_training()


def digest(state: TrainingState) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in state.model.parameters())).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

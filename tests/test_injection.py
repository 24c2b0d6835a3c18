"""Memory runs out on any rank, in any place, once or twice in a step: both ranks retry alike, and end as if it had not."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from injection_probe import CONTENTS, ERRORS, PLACES, RANKS, STEPS, WRONG_SHAPE, Settings, cases

PROBE = Path(__file__).with_name("injection_probe.py")


# one in 13 passes through all values of all axes
@pytest.fixture(scope="module", params=[13, pytest.param(1, marks=pytest.mark.slow)], ids=["sample", "all"])
def launched(request, tmp_path_factory) -> SimpleNamespace:
    """What two ranks wrote, run by run: pairs of the first's and the second's."""
    folder = tmp_path_factory.mktemp("injection")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, str(PROBE), str(folder), str(request.param)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(PROBE.parents[1])},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert "Timeout (" not in done.stderr, done.stderr  # the watchdog's word
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["world_size"] == second["world_size"] == 2
    return SimpleNamespace(
        cases=cases()[:: request.param],
        runs=list(zip(first["runs"], second["runs"], strict=True)),
        ends=(first["ends"], second["ends"]),
        returncode=done.returncode,
        stderr=done.stderr,
    )


def test_every_run_took_place_and_failed_where_it_should(launched):
    assert len(launched.cases) in (35, 448)
    assert [first["number"] for first, _ in launched.runs] == [case.number for case in launched.cases]
    for case, ran in zip(launched.cases, launched.runs, strict=True):
        assert [of_rank["raised"] for of_rank in ran] == [sum(case.fails(rank, a) for a in range(case.attempts)) for rank in (0, 1)], case


def test_both_ranks_retry_the_same_step_at_the_same_size_and_end_with_the_same_weights(launched):
    for case, (first, second) in zip(launched.cases, launched.runs, strict=True):
        assert {**first, "raised": None} == {**second, "raised": None}, case
        assert first["retries"] == [case.attempts if step == case.step else 0 for step in range(STEPS)], case
        assert first["sizes"][: case.step + 1] == [4] * case.step + [4 >> case.attempts], case


def test_a_run_is_bit_for_bit_the_one_whose_sizes_were_prescribed(launched):
    assert [first["number"] for first, second in launched.runs if not (first["as_prescribed"] and second["as_prescribed"])] == []


def test_without_internal_dropout_a_run_is_the_undisturbed_one_up_to_rounding(launched):
    runs = [first for case, (first, _) in zip(launched.cases, launched.runs, strict=True) if not case.internal_dropout]
    assert len(runs) >= 15
    assert all(run["moved"] > 0.01 for run in runs)
    assert [run["number"] for run in runs if not run["error_to_undisturbed"] <= 1e-12] == []


def test_what_no_retry_helps_ends_both_ranks_alike(launched):
    first, second = launched.ends
    assert first == second
    assert {name: error.split(";")[0] for name, error in first.items()} == {
        "no batch on the second rank": "UserError: frame 7 is broken",
        "no batch on the first rank": "UserError: frame 7 is broken",
        "no loss on the second rank": f"UserError: step 1: the loss is not finite for {', '.join(map(str, range(8)))}",
        "no memory for one sample": "UserError: step 1: out of memory at micro-batches of 1, the smallest that"
        " training.min_micro_batch_size=1 allows",
        "a wrong shape on both ranks": f"RuntimeError: {WRONG_SHAPE}",
    }


def test_a_wrong_shape_on_one_rank_is_not_retried_and_leaves_no_rank_waiting(launched):
    assert launched.returncode != 0
    assert f"[rank1]: RuntimeError: {WRONG_SHAPE}" in launched.stderr


def test_the_runs_are_of_every_kind(launched):
    axes = (RANKS, PLACES, ("first", "last"), range(STEPS), (1, 2), (False, True))
    seen = {(case.ranks, case.place, case.micro_batch, case.step, case.attempts, case.internal_dropout) for case in launched.cases}
    for axis, values in enumerate(axes):
        assert {place[axis] for place in seen} == set(values)
    drawn = [Settings.of(case) for case in launched.cases]
    assert {settings.error for settings in drawn} == set(ERRORS)
    assert {settings.contents[case.step] for case, settings in zip(launched.cases, drawn, strict=True)} == set(CONTENTS)
    assert {(settings.optimizer, settings.loss) for settings in drawn} == set(product(("adam", "sgd"), ("mse", "focal")))
    assert any(first["sizes"][-1] > min(first["sizes"]) for first, _ in launched.runs)  # grew back within the run

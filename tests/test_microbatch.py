"""The micro-batch size follows the memory there is: at once downwards, patiently upwards."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.errors import UserError
from tracknet.schema.training import TrainingConfig
from tracknet.training.microbatch import MicroBatchSize

K = 500  # the default of training.mb_growth_steps


@dataclass
class Run:
    """Steps under a limit of memory, in samples."""

    size: MicroBatchSize
    steps: int = 0
    failed_at: list[tuple[int, int]] = field(default_factory=list)  # (step, size)
    values: list[int] = field(default_factory=list)  # that fitted, by step

    def under(self, limit: int, steps: int) -> "Run":
        for _ in range(steps):
            retries = 0
            while self.size.value > limit:
                self.failed_at.append((self.steps, self.size.value))
                self.size.back_off(retries)
                retries += 1
            self.values.append(self.size.value)
            self.steps += 1
            if retries == 0:
                self.size.passed()
        return self


def start_at(start: int, **settings) -> Run:
    config = TrainingConfig(batch_size=start, **settings)
    return Run(MicroBatchSize(start, config))


def test_the_sizes_are_divided_down_to_the_smallest_and_climb_back_the_same_way():
    run = start_at(33, min_micro_batch_size=3, mb_growth_steps=10)
    assert run.under(3, 1).failed_at == [(0, 33), (0, 16), (0, 8), (0, 4)]
    assert sorted(set(run.under(33, 100).values)) == [3, 4, 8, 16, 33]
    assert run.values[-1] == 33


@given(st.integers(1, 64), st.integers(0, 6 * K))
def test_a_limit_that_stays_costs_two_failures_in_a_thousand_steps_at_most(limit, warm_up):
    run = start_at(64).under(64, warm_up).under(limit, 12_000)
    discovery = run.failed_at[0][0] if run.failed_at else 0
    later = [step for step, _ in run.failed_at if step > discovery]
    assert all(sum(first <= step < first + 1000 for step in later) <= 2 for first in later)
    assert later == [warm_up + K * (2**n - 1) + n for n in range(1, len(later) + 1)] or limit == 64  # K, 2K, 4K clean steps apart


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 3 * K)), max_size=12), st.integers(1, 64))
def test_no_size_fails_twice_within_k_steps_whatever_the_limit_does(limits, last):
    run = start_at(64)
    for limit, steps in [*limits, (last, 3 * K)]:
        run.under(limit, steps)
    for size in {size for _, size in run.failed_at}:
        steps = [step for step, failed in run.failed_at if failed == size]
        assert all(later - earlier > K for earlier, later in pairwise(steps))


@given(st.integers(1, 64), st.integers(1, K), st.integers(1, 64))
def test_a_limit_that_falls_and_rises_is_followed_to_within_one_halving_in_2k_steps(low, low_steps, high):
    """Where it was low for at most K steps; the next test has longer ones."""
    run = start_at(64).under(64, 10).under(low, low_steps).under(high, 2 * K)
    fits = max(size for size in (64, 32, 16, 8, 4, 2, 1) if size <= high)
    assert 2 * run.size.value >= fits


@given(st.integers(1, 64), st.integers(1, 12_000))
def test_after_a_long_low_the_next_size_is_tried_within_as_many_steps_again(low, low_steps):
    run = start_at(64).under(low, low_steps)
    before = run.size.value
    run.under(64, low_steps + K + 1)
    assert run.size.value > before or before == 64


def test_a_size_that_lasted_is_forgiven():
    run = start_at(4, mb_growth_steps=10)
    run.under(2, 100)  # 4 has failed again and again
    assert len(run.failed_at) > 2
    run.under(4, 200).under(2, 1)
    failures = len(run.failed_at)
    assert run.under(2, 12).failed_at[failures:]  # tried again after K steps, not after 2^n K


def test_a_trial_that_fails_is_not_counted_among_the_retries_of_its_step():
    run = start_at(4, oom_retries=1, mb_growth_steps=10)
    assert set(run.under(2, 12).failed_at) == {(0, 4), (11, 4)}
    run.under(2, 9).under(1, 1)  # one retry that the run needs, and no more
    assert run.values[-1] == 1
    run = start_at(4, oom_retries=1, mb_growth_steps=10).under(2, 11)
    assert run.size.value == 4  # on trial
    assert run.under(1, 1).values[-1] == 1  # the trial's failure, and the one retry that is allowed


@pytest.mark.parametrize("settings", [{"mb_growth_steps": 0}, {"adaptive_micro_batch": False}])
def test_it_never_grows_where_that_is_off(settings):
    config = TrainingConfig(batch_size=16, **settings)
    size = MicroBatchSize(16, config)
    if config.adaptive_micro_batch:
        size.back_off(0)
    value = size.value
    assert not any(size.passed() for _ in range(3000))
    assert size.value == value


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"adaptive_micro_batch": False}, "lower training.evaluation.batch_size"),
        ({"min_micro_batch_size": 8}, "training.min_micro_batch_size=8"),
        ({"oom_retries": 0}, "training.oom_retries=0.*training.evaluation.batch_size"),
    ],
)
def test_where_no_smaller_size_is_allowed_the_message_names_the_key(settings, advice):
    with pytest.raises(UserError, match=advice):
        MicroBatchSize(8, TrainingConfig(**settings), evaluation=True).back_off(0)


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(1, 40)), max_size=8), st.lists(st.integers(1, 32), max_size=100))
def test_what_a_checkpoint_keeps_goes_on_as_if_nothing_had_happened(before, after):
    config = TrainingConfig(batch_size=32, mb_growth_steps=7)
    run = Run(MicroBatchSize(32, config))
    for limit, steps in before:
        run.under(limit, steps)
    resumed = Run(MicroBatchSize(32, config))
    resumed.size.restore(run.size.as_json())
    run.values.clear()
    for limit in after:
        run.under(limit, 1)
        resumed.under(limit, 1)
    assert run.values == resumed.values


def test_other_settings_begin_at_their_own_start():
    size = MicroBatchSize(32, TrainingConfig())
    size.back_off(0)
    other = MicroBatchSize(24, TrainingConfig())
    other.restore(size.as_json())
    assert other.value == 24

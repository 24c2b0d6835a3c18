import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracknet.data.sampler import EpochBatchSampler
from tracknet.errors import ConfigError

counts = st.integers(1, 200)
sizes = st.integers(1, 9)
worlds = st.integers(1, 5)


def steps_of(count: int, batch: int, world: int, *, epoch: int = 0, seen: int = 0, shuffle: bool = True, drop: bool = False) -> list[list]:
    """What all ranks together see at each step, rank after rank."""
    ranks = []
    for rank in range(world):
        sampler = EpochBatchSampler(count, batch, rank, world, seed=3, shuffle=shuffle, drop_last=drop)
        sampler.set_position(epoch, seen)
        batches = list(sampler)
        assert len(batches) == sampler.steps_left(seen)
        ranks.append(batches)
    return [list(step) for step in zip(*ranks, strict=True)]


@settings(deadline=None)
@given(count=counts, batch=sizes, world=worlds, shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_all_ranks_together_see_each_window_once(count: int, batch: int, world: int, shuffle: bool, epoch: int) -> None:
    steps = steps_of(count, batch, world, epoch=epoch, shuffle=shuffle)
    keys = [key for step in steps for share in step for key in share]
    assert {key[0] for key in keys} == {epoch}
    assert sorted(key[1] for key in keys) == list(range(count))
    for step in steps[:-1]:
        assert [len(share) for share in step] == [batch] * world
    last = [len(share) for share in steps[-1]]
    assert max(last) - min(last) <= 1
    assert max(last) <= batch


@settings(deadline=None)
@given(count=counts, batch=sizes, world=worlds, epoch=st.integers(0, 5))
def test_the_world_size_does_not_change_what_a_step_sees(count: int, batch: int, world: int, epoch: int) -> None:
    many = [[key for share in step for key in share] for step in steps_of(count, batch, world, epoch=epoch)]
    one = [step[0] for step in steps_of(count, batch * world, 1, epoch=epoch)]
    assert many == one


@settings(deadline=None)
@given(count=counts, batch=sizes, world=worlds, data=st.data())
def test_a_resumed_epoch_is_the_tail_of_the_epoch(count: int, batch: int, world: int, data: st.DataObject) -> None:
    whole = steps_of(count, batch, world, epoch=2)
    first = data.draw(st.integers(0, len(whole)))
    seen = sum(len(share) for step in whole[:first] for share in step)
    assert steps_of(count, batch, world, epoch=2, seen=seen) == whole[first:]


@settings(deadline=None)
@given(count=counts, batch=sizes, worlds=st.lists(worlds, min_size=2, max_size=4), data=st.data())
def test_a_world_that_changes_in_an_epoch_goes_on_in_the_same_order(count: int, batch: int, worlds: list[int], data: st.DataObject) -> None:
    order = [key for step in steps_of(count, count, 1, epoch=2) for share in step for key in share]
    seen: list = []
    for number, world in enumerate(worlds):
        rest = steps_of(count, batch, world, epoch=2, seen=len(seen))
        made = data.draw(st.integers(0, len(rest))) if number < len(worlds) - 1 else len(rest)
        seen += [key for step in rest[:made] for share in step for key in share]
    assert seen == order


@settings(deadline=None)
@given(count=counts, batch=sizes, world=worlds)
def test_drop_last_leaves_only_full_steps(count: int, batch: int, world: int) -> None:
    if count < batch * world:
        with pytest.raises(ConfigError, match=r"drop_last: .*set it to false or lower training\.batch_size"):
            steps_of(count, batch, world, drop=True)
        return
    assert all(len(share) == batch for step in steps_of(count, batch, world, drop=True) for share in step)


def test_the_order_follows_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        sampler = EpochBatchSampler(50, 50, 0, 1, seed, shuffle, drop_last=False)
        sampler.set_position(epoch)
        return [window for _, window in next(iter(sampler))]

    np.random.seed(0)
    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2, shuffle=False) == list(range(50))


def test_iterations_keep_the_position_that_they_started_from() -> None:
    sampler = EpochBatchSampler(8, 2, 0, 1, 0, shuffle=False, drop_last=False)
    sampler.set_position(0, 2)
    early = iter(sampler)
    sampler.set_position(5, 6)
    assert [key for batch in early for key in batch] == [(0, window) for window in range(2, 8)]

"""Reading on a thread of its own: order, how far ahead, failures, and the end."""

import threading
import time
from collections.abc import Iterator

import pytest

from tracknet.inference.ahead import ReadAhead


def counted(count: int, seen: list[int]) -> Iterator[int]:
    for number in range(count):
        seen.append(number)
        yield number


def settled(seen: list[int]) -> int:
    """How many were read once no more are for a while."""
    before = -1
    while len(seen) != before:
        before = len(seen)
        time.sleep(0.05)
    return before


def test_all_items_come_in_order_and_no_more_are_read_than_may_be_undone() -> None:
    seen: list[int] = []
    with ReadAhead(counted(20, seen), most=5) as ahead:
        assert settled(seen) == 5  # though nobody has asked for one
        given = []
        for item in ahead:
            given.append(item)
            if len(given) == 5:
                assert settled(seen) == 5  # given, but not done
            if len(given) >= 5:
                ahead.done(1)
    assert given == list(range(20))


def test_a_failure_comes_behind_the_items_before_it() -> None:
    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("gone")

    with ReadAhead(broken(), most=5) as ahead:
        items = iter(ahead)
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(KeyError, match="gone"):
            next(items)


def test_whoever_leaves_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with ReadAhead(iter(range(100)), most=3) as ahead:
        assert next(iter(ahead)) == 0
    assert threading.active_count() == before

"""The arithmetic and the page of the benchmarks; what they measure is never tested."""

import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pairs = st.lists(st.tuples(st.floats(0.001, 1000), st.floats(0.001, 1000)), min_size=1, max_size=30)


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@given(pairs=pairs)
def test_a_speed_up_is_the_ratio_of_the_medians_and_lies_in_its_interval(pairs):
    from ratios import speed_up, time_ratio

    mine, other = zip(*pairs, strict=True)
    found = speed_up(mine, other)
    assert found.middle == pytest.approx(median(other) / median(mine))
    assert found.count == len(pairs)
    assert found.low <= found.high
    turned = time_ratio(mine, other)
    assert turned.middle == pytest.approx(1 / found.middle)


def test_the_interval_narrows_around_what_does_not_vary():
    from ratios import speed_up

    found = speed_up([2.0] * 10, [5.0] * 10)
    assert (found.low, found.middle, found.high) == (2.5, 2.5, 2.5)


def test_the_sides_take_turns():
    from ratios import alternate

    calls: list[str] = []
    mine, other = alternate(lambda: calls.append("mine"), lambda: calls.append("other"), pairs=4, warm_up=0)
    assert len(mine) == len(other) == 4
    assert all({first, second} == {"mine", "other"} for first, second in zip(calls[::2], calls[1::2], strict=True))
    assert calls[0] != calls[2]


@given(value=st.floats(0.001, 9000))
def test_three_significant_digits(value):
    from ratios import significant

    assert float(significant(value)) == pytest.approx(value, rel=0.005)


def test_the_page_has_every_row_under_its_group():
    import importlib

    page = importlib.import_module("all").page
    from ratios import Row, Spread

    row = Row("reading", "a loop", ">= 4", Spread(6.5, 6.0, 7.1, 9), "12 ms")
    text = page({"reading": {"where": "here", "rows": [asdict(row)]}})
    assert "| reading | a loop | >= 4 | **6.50 (6.00 to 7.10, n = 9)** | 12 ms |" in text
    assert "## A data set of a million frames" not in text

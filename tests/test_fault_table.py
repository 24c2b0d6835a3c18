"""The table of faults counts, and replaces its own part of the page only."""

from pathlib import Path

import pytest
from fault_table import BEGIN, END, PAGE, WHOLE, FaultTable


def test_the_page_keeps_all_but_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Above\n\n{BEGIN}\n| old |\n{END}\n\nBelow: é\n", encoding="utf-8")
    table = FaultTable()
    for survived, seconds in ((True, 1.0), (False, 2.25), (True, None)):
        table.record("a row", survived, "note", seconds)
    table.write(page)
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    assert (before, after) == ("# Above\n\n", "\n\nBelow: é\n")
    assert "| a row | 3 | 2 | 1 | 2.2 |" in written
    assert "old" not in written
    assert table.losses == ["a row: note"]


def test_a_page_without_the_marks_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Above\n")
    with pytest.raises(ValueError, match="lacks the two marks"):
        FaultTable().write(page)
    assert page.read_text() == "# Above\n"


def test_the_table_is_whole_only_with_all_trials_of_all_rows() -> None:
    table = FaultTable()
    for row, fewest in WHOLE.items():
        assert not table.is_whole()
        for _ in range(fewest):
            table.record(row, True)
    assert table.is_whole()


def test_a_trial_that_raises_is_lost_and_goes_on_raising() -> None:
    table = FaultTable()
    with pytest.raises(KeyError), table.trial("a row"):
        raise KeyError
    with table.trial("a row"):
        pass
    assert "| a row | 2 | 1 | 1 |  |" in table.markdown()


def test_the_real_page_has_the_marks() -> None:
    assert PAGE.read_text(encoding="utf-8").count(BEGIN) == PAGE.read_text(encoding="utf-8").count(END) == 1

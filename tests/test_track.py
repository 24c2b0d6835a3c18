import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.errors import DataError
from tracknet.inference.track import COLUMNS, DETECTED, INTERPOLATED, NO_BALL, BallTrack, TrackRow, join_tracks, read_track, track_of

ROWS = [
    TrackRow(0, 0.0, True, 12.345, 700.5, 0.987654, DETECTED),
    TrackRow(1, 0.04, True, -0.4, 0.0, math.nan, INTERPOLATED),
    TrackRow(2, 0.08, False, math.nan, math.nan, 0.000001, NO_BALL),
]


def same(one: BallTrack, other: BallTrack) -> bool:
    equal = all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name in ("time_s", "x", "y", "score")) for name in COLUMNS
    )
    return equal and (one.fps, one.size_wh) == (other.fps, other.size_wh)


def test_the_csv_has_one_row_per_frame_and_leaves_empty_what_is_not_known(tmp_path: Path) -> None:
    track_of(ROWS, 25.0, (1280, 720)).write_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == (
        "frame,time_s,visible,x,y,score,source\n"
        "0,0.000000,1,12.345,700.500,0.987654,detected\n"
        "1,0.040000,1,-0.400,0.000,,interpolated\n"
        "2,0.080000,0,,,0.000001,\n"
    )


def test_a_peak_that_is_no_ball_has_no_position(tmp_path: Path) -> None:
    track = track_of([TrackRow(0, math.nan, False, 3.0, 4.0, 0.2, NO_BALL), ROWS[0]], None, (64, 48)).without_peaks()
    assert np.isnan([track.x[0], track.y[0]]).all()
    assert (track.x[1], track.score[0]) == (12.345, 0.2)


decimal = st.integers(-5000, 5_000_000).map(lambda whole: whole / 1000)


@given(
    st.lists(
        st.builds(
            TrackRow,
            frame=st.integers(0, 10**9),
            time_s=st.one_of(st.just(math.nan), decimal),
            visible=st.booleans(),
            x=decimal,
            y=decimal,
            score=st.one_of(st.just(math.nan), st.integers(0, 10**6).map(lambda whole: whole / 10**6)),
            source=st.sampled_from([DETECTED, INTERPOLATED, NO_BALL]),
        ),
        max_size=20,
    )
)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, rows: list[TrackRow]) -> None:
    path = tmp_path_factory.getbasetemp() / "again.csv"
    track = track_of(rows, 29.97, (64, 48)).without_peaks()
    track.write_csv(path)
    assert same(read_track(path, 29.97, (64, 48)), track)
    assert [row.frame for row in track.rows()] == [row.frame for row in rows]
    assert len(track) == len(rows)


def test_rows_are_plain_values() -> None:
    (row, *_) = track_of(ROWS, None, (64, 48)).rows()
    assert [type(value) for value in row] == [int, float, bool, float, float, float, str]


def test_joined_tracks_keep_all_rows() -> None:
    track = track_of(ROWS, 25.0, (1280, 720))
    assert same(join_tracks([track_of(ROWS[:1], 25.0, (1280, 720)), track_of(ROWS[1:], 25.0, (640, 360))]), track)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("", ":1:"),
        ("frame,x,y\n", ":1:"),
        (",".join(COLUMNS) + "\n0,0.0,1,2,3,0.5,detected\n1,0.04,1,2\n", ":3:"),
        (",".join(COLUMNS) + "\n0,0.0,yes,2,3,0.5,detected\n", ":2:"),
        (",".join(COLUMNS) + "\n0,0.0,1,2,three,0.5,detected\n", ":2:"),
        (",".join(COLUMNS) + "\n0,0.0,1,2,3,0.5,guessed\n", ":2:"),
    ],
)
def test_another_file_is_named_with_its_line(tmp_path: Path, content: str, where: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=f"t.csv{where}") as raised:
        read_track(path, None, (64, 48))
    assert "\n" not in str(raised.value)


def test_a_csv_that_cannot_be_written_leaves_the_one_before(small_disk: Path) -> None:
    track = track_of(ROWS, 25.0, (1280, 720))
    track.write_csv(small_disk / "t.csv")
    before = (small_disk / "t.csv").read_bytes()
    (small_disk / "full").write_bytes(b"0" * 1_000_000)
    many = replace(join_tracks([track] * 20_000), fps=None)
    with pytest.raises(OSError, match="No space"):
        many.write_csv(small_disk / "t.csv")
    assert (small_disk / "t.csv").read_bytes() == before
    assert {path.name for path in small_disk.iterdir()} == {"t.csv", "full"}


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        replace(track_of(ROWS, None, (64, 48)), x=np.zeros(2))

"""The file of predictions: what is read, what is refused, and that it holds what the network found."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracknet.data.index import Clip, ClipIndex, LabelledClip, join_clips
from tracknet.errors import ConfigError, DataError, UserError
from tracknet.evaluation.detection import Detections
from tracknet.evaluation.files import write_together
from tracknet.evaluation.predictions import ClipPredictions, Predictions, fit_to_labels, predictions_csv, predictions_of, read_predictions

HEADER = "game,clip,frame,visible,x,y,score"


def index_of(*lengths: int, unlabelled: tuple[int, ...] = ()) -> ClipIndex:
    """Clips game1/Clip1, game1/Clip2 ... of 1280x720; the frames (rows) in `unlabelled` have no label."""
    parts = [
        LabelledClip(
            Clip("game1", f"Clip{number}", Path(f"game1/Clip{number}"), None, (1280, 720), 0, length),
            np.full((length, 2), 100, np.float32),
            np.ones(length, np.int8),
        )
        for number, length in enumerate(lengths, 1)
    ]
    index = join_clips(parts)
    index.visibility[list(unlabelled)] = -1
    return index


def write(folder: Path, *rows: str, header: str = HEADER, end: str = "\n", mark: bytes = b"") -> Path:
    path = folder / "p.csv"
    path.write_bytes(mark + end.join([header, *rows, ""]).encode())
    return path


def same(one: ClipPredictions, other: ClipPredictions) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name in ("xy_px", "score")) for name in vars(one))


peaks = st.tuples(st.floats(-0.5, 1279.5), st.floats(-0.5, 719.5), st.floats(0, 1, width=32))


@given(found=st.lists(peaks, min_size=1, max_size=20), threshold=st.integers(1, 99))
def test_what_is_written_is_read_again_to_the_bit(found: list[tuple[float, float, float]], threshold: int) -> None:
    values = np.array(found, np.float64)
    index = index_of(len(found))
    detections = Detections(np.arange(len(found)), np.round(values[:, :2], 3), np.round(values[:, 2], 6))
    predictions = predictions_of(index, detections, threshold / 100)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(predictions_csv(predictions))
        file.flush()
        again = read_predictions(Path(file.name))
    assert list(again.clips) == ["game1/Clip1"]
    assert same(again.clips["game1/Clip1"], predictions.clips["game1/Clip1"])
    assert np.array_equal(again.clips["game1/Clip1"].visible, detections.score >= threshold / 100)


def test_detections_in_any_order_come_to_their_frames_and_each_is_needed_once() -> None:
    index = index_of(2, 3)
    xy = np.array([[row, 0.0] for row in (4, 0, 2, 1, 3)])
    predictions = predictions_of(index, Detections(np.array([4, 0, 2, 1, 3]), xy, np.full(5, 0.9)), 0.5)
    assert predictions.clips["game1/Clip2"].xy_px[:, 0].tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="not one for each"):
        predictions_of(index, Detections(np.array([0, 1, 2, 3, 3]), xy, np.full(5, 0.9)), 0.5)


def test_other_programs_write_it_otherwise(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "b,1.5,0.9,x,1,a,10,20",
        "",
        "b,,,y,0,a,9,",
        'b,,,"a, b",TRUE,a,8,1e2',  # y is missing
        header=" Clip ,y,SCORE,comment,visible,game,frame,x",
        end="\r\n",
        mark=b"\xef\xbb\xbf",
    )
    with pytest.raises(DataError, match=r"p.csv:5: has one of x and y"):
        read_predictions(path)
    path.write_bytes(path.read_bytes().replace(b"TRUE", b"False").replace(b"8,1e2", b"8,"))
    clip = read_predictions(path).clips["a/b"]
    assert clip.frame.tolist() == [8, 9, 10]  # in the order of the frames, not of the rows
    assert clip.visible.tolist() == [False, False, True]
    assert clip.xy_px[2].tolist() == [20, 1.5]
    assert math.isnan(clip.score[0])
    assert clip.score[2] == 0.9


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("g,c,0,1,1,2,0.5\ng,c,0,1,1,2,0.5", "p.csv:3: frame 0 of g/c has a row already, in line 2"),
        ("g,c,0,1,1", "p.csv:2: has 5 values"),
        ("g,c,-1,1,1,2,0.5", "p.csv:2: frame is '-1'"),
        ("g,c,1.0,1,1,2,0.5", "p.csv:2: frame is '1.0'"),
        ("g,c,²,1,1,2,0.5", "p.csv:2: frame is"),
        ("g,c,99999999999,1,1,2,0.5", "p.csv:2: frame is"),
        ("g,c,0,2,1,2,0.5", "p.csv:2: visible is '2'"),
        ("g,c,0,1,nan,2,0.5", "p.csv:2: x is 'nan'"),
        ("g,c,0,1,1,inf,0.5", "p.csv:2: y is 'inf'"),
        ("g,c,0,1,1,2,high", "p.csv:2: score is 'high'"),
        ("g,c,0,1,1_0,2,", "p.csv:2: x is '1_0'"),
        ("g,c,0,1,1e308,2,", "p.csv:2: x is '1e308'; it must be in px"),
        ("g,c,0,1,\u0661,2,", "p.csv:2: x is"),
        (",,,,,,\ng,c,0,2,1,2,", "p.csv:3: visible is '2'"),
        ("g,c,0,1,,,0.5", "p.csv:2: is visible but has no x and y"),
        ("g,c,0,1,1,,0.5", "p.csv:2: has one of x and y"),
        (",c,0,1,1,2,0.5", "p.csv:2: game is ''"),
        ("g,a/c,0,1,1,2,0.5", "p.csv:2: clip is 'a/c'"),
        ('g,"c,0,1,1,2,0.5', "is no line of a CSV"),
    ],
)
def test_a_wrong_value_names_its_line(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_predictions(write(tmp_path, row))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no column game"),
        (b"game,clip,frame,visible,x,y\n", "has no column score"),
        (b"game,clip,frame,visible,x,y,score,x\n", "has the column x twice"),
        (b"game;clip;frame;visible;x;y;score\n", "separated by commas"),
        (b"game\tclip\tframe\n", "separated by commas"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
        (b"game,clip,frame,visible,x,y,score\ng,\xff,0,0,,,\n", "UTF-8"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_predictions(path)


def test_no_file_and_a_folder_are_a_mistake_of_the_command(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_predictions(path)


def rows_of(clip: str, frames: range) -> list[str]:
    return [f"game1,{clip},{frame},1,{frame},2,0.5" for frame in frames]


def test_a_frame_with_a_label_needs_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, *rows_of("Clip1", range(3)), *rows_of("Clip2", range(2)))
    with pytest.raises(DataError, match=r"no row for frame 3 of game1/Clip1, which has a label \(2 such frames\)"):
        fit_to_labels(read_predictions(path), index_of(4, 3), path)
    with pytest.raises(DataError, match=r"no row for frame 2 of game1/Clip2, which has a label \(1 such frames\)"):
        fit_to_labels(read_predictions(path), index_of(3, 3), path)
    fitted, notes = fit_to_labels(read_predictions(path), index_of(4, 3, unlabelled=(3, 6)), path)
    assert notes == []
    assert fitted.clips["game1/Clip1"].visible.tolist() == [True, True, True, False]
    assert fitted.clips["game1/Clip2"].frame.tolist() == [0, 1, 2]


def test_rows_that_count_from_one_do_not_pass(tmp_path: Path) -> None:
    path = write(tmp_path, *rows_of("Clip1", range(1, 4)))
    with pytest.raises(DataError, match="frame 0 of game1/Clip1"):
        fit_to_labels(read_predictions(path), index_of(3), path)
    path = write(tmp_path, *rows_of("Clip1", range(1, 4)))
    with pytest.raises(DataError, match="frames count from 0 within a clip"):
        fit_to_labels(read_predictions(path), index_of(3), path)
    path = write(tmp_path, *rows_of("Clip1", range(4)))
    with pytest.raises(DataError, match="game1/Clip1 has 3 frames, but a row for frame 3"):
        fit_to_labels(read_predictions(path), index_of(3), path)


def test_clips_outside_the_split_are_left_out_with_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, *rows_of("Clip1", range(3)), *rows_of("Clip9", range(2)))
    fitted, notes = fit_to_labels(read_predictions(path), index_of(3), path)
    assert list(fitted.clips) == ["game1/Clip1"]
    assert notes == ["left out of the file, because not in the split (1): game1/Clip9"]


def test_names_with_commas_and_quotes_survive(tmp_path: Path) -> None:
    clip = ClipPredictions(np.arange(1), np.array([True]), np.array([[1.0, 2.0]]), np.array([math.nan]))
    path = tmp_path / "p.csv"
    path.write_text(predictions_csv(Predictions({'a,b/"c"': clip})))
    assert same(read_predictions(path).clips['a,b/"c"'], clip)


def test_a_set_of_files_is_written_whole_or_not_at_all(small_disk: Path) -> None:
    (small_disk / "a").write_text("old")
    with pytest.raises(UserError, match=r"b cannot be written .* --output"):
        write_together({small_disk / "a": "new", small_disk / "b": "x" * 2_000_000})
    assert [path.name for path in small_disk.iterdir()] == ["a"]
    assert (small_disk / "a").read_text() == "old"
    write_together({small_disk / "a": "new", small_disk / "folder" / "b": "x"})
    assert (small_disk / "a").read_text() == "new"
    assert (small_disk / "folder" / "b").read_text() == "x"
    with pytest.raises(UserError):
        write_together({small_disk / "b": "x" * 2_000_000}, outdated=[small_disk / "a"])
    assert (small_disk / "a").read_text() == "new"
    write_together({small_disk / "b": "x"}, outdated=[small_disk / "a"])
    assert not (small_disk / "a").exists()


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_together({tmp_path / "out" / "a": "new"})
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        write_together({tmp_path / "b": "new"})
    assert not list(tmp_path.glob("*.part"))

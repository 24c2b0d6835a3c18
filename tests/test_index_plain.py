"""The quick way to read what is plain gives what the careful way gives, be it an index or an error."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from clips import HEADER, blob_picture, write_clip, write_games, write_labels, write_video
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tracknet.data import formats
from tracknet.data.formats import read_clips
from tracknet.data.index import ClipIndex
from tracknet.errors import DataError

SIZE = (64, 48)
FIELDS = (
    "",
    "0",
    "1",
    " 1",
    "1.0",
    "2",
    "3",
    "4",
    "64",
    "63.75",
    "65",
    "-1",
    "1_0",
    "nan",
    "inf",
    "1e1",
    "٣",
    "left",
    '"7"',
    '"7,5"',
    "7\x1f",
)
FILES_BESIDE = (
    "notes.txt",
    ".DS_Store",
    "._0000.png",
    "_0000.png",
    "label.csv",
    "0007.gif",
    "clip.mp4",
    "Folder/",
    "0001.png/",
    "0001.jpg/",
)


@dataclass(frozen=True)
class Oddity:
    """One thing that is not as usual in a clip."""

    name: str
    where: int
    field: int
    text: str


ODDITIES = (
    "field",
    "field",
    "field",
    "swap",
    "again",
    "gone row",
    "gone picture",
    "gone frame",
    "named",
    "beside",
    "cut",
    "longer",
    "blank",
    "spaces",
)
ODDITIES += ("mark", "crlf", "cr", "header case", "columns", "quoted", "no end", "png", "frame of another case", "link", "leads nowhere")
oddities = st.builds(Oddity, st.sampled_from(ODDITIES), st.integers(0, 11), st.integers(0, 4), st.sampled_from(FIELDS))
shapes = st.sampled_from(
    ["{:04d}.png", "{:04d}.jpg", "{:d}.jpg", "{:04d}.JPG", "img_{:04d}.png", "f{:d}.png", "{:02d}a.png", ".{:04d}.png"]
)


@contextmanager
def only_carefully() -> Iterator[None]:
    """Nothing is taken for plain inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "plain_pictures", lambda *_: None)
        patch.setattr(formats, "read_plain_labels", lambda *_: None)
        yield


def outcome(root: Path) -> tuple[object, ...]:
    """What reading gives, in a form that compares."""
    try:
        index, _ = read_clips(root, ["game1"], "stop")
    except DataError as error:
        return (str(error),)
    names = [clip.frame_names and tuple(clip.frame_names) for clip in index.clips]
    return index.clips, names, index.xy_px.tobytes(), index.xy_px.dtype, index.visibility.tobytes(), index.visibility.dtype


def rows_of(names: list[str], odd: list[Oddity]) -> list[list[str]]:
    """The table of a clip, header first."""
    rows = [[name, str(n % 4), *(["", ""] if n % 4 == 0 else [f"{5 * n}", f"{3 * n}.5"]), "0"] for n, name in enumerate(names)]
    for one in odd:
        row, other = one.where % len(rows), one.field % len(rows)
        if one.name == "field":
            rows[row][one.field % len(rows[row])] = one.text
        elif one.name == "swap":
            rows[row], rows[other] = rows[other], rows[row]
        elif one.name == "again":
            rows.insert(other, list(rows[row]))
        elif one.name == "gone row" and len(rows) > 1:
            del rows[row]
        elif one.name == "cut":
            rows[row] = rows[row][: one.field + 1]
        elif one.name == "longer":
            rows[row] = [*rows[row], one.text]
        elif one.name == "frame of another case":
            rows[row][0] = rows[row][0].swapcase()
    return [HEADER.split(","), *rows]


def written(rows: list[list[str]], odd: list[Oddity]) -> bytes:
    """The file of a table."""
    names = {one.name for one in odd}
    if "columns" in names:
        rows = [[*row[1:], *row[:1]] for row in rows]
    if "header case" in names:
        rows = [[f" {name.upper()}" for name in rows[0]], *rows[1:]]
    if "quoted" in names:
        rows = [[f'"{field}"' for field in row] for row in rows]
    lines = [",".join(row) for row in rows]
    for one in odd:
        if one.name in ("blank", "spaces"):
            lines.insert(one.where % (len(lines) + 1), "" if one.name == "blank" else " ,\t,,")
    end = "\r\n" if "crlf" in names else "\r" if "cr" in names else "\n"
    return (("\ufeff" if "mark" in names else "") + end.join(lines) + ("" if "no end" in names else end)).encode()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(blob_picture(SIZE, (20, 20))).save(path)
    return path.read_bytes()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.sampled_from([0, 0, 0, 1, 8, 95]), shapes, st.lists(oddities, max_size=3))
@example(8, 0, "{:04d}.jpg", [Oddity("field", 2, 4, '"7')])  # the rest of the file is one field then
@example(8, 0, "{:04d}.jpg", [Oddity("field", 2, 2, "1_0")])
@example(8, 0, "{:04d}.jpg", [Oddity("gone frame", 2, 0, "")])
@example(8, 0, "img_{:04d}.png", [Oddity("gone frame", 2, 0, "")])
def test_plain_and_careful_reading_agree(tmp_path: Path, picture: bytes, count: int, first: int, shape: str, odd: list[Oddity]) -> None:
    shutil.rmtree(tmp_path / "game1", ignore_errors=True)
    clip = tmp_path / "game1" / "Clip1"
    clip.mkdir(parents=True)
    names = [shape.format(number) for number in range(first, first + count)]
    for one in odd:
        if one.name == "gone frame" and len(names) > 1:
            del names[one.where % len(names)]
        place = one.where % len(names)
        if one.name == "png":
            names[place] = names[place].rpartition(".")[0] + ".png"
        elif one.name == "named":
            names[place] = ("00001.png", "1.png", "b²3.png", "x.jpeg")[one.field % 4]
    for name in names:
        (clip / name).write_bytes(picture)
    (clip / "Label.csv").write_bytes(written(rows_of(names, odd), odd))
    for one in odd:
        target = clip / names[one.where % len(names)]
        if one.name == "gone picture":
            target.unlink(missing_ok=True)
        elif one.name in ("link", "leads nowhere") and not target.is_symlink():
            target.unlink(missing_ok=True)
            target.symlink_to(clip / "Label.csv" if one.name == "link" else clip / "nowhere")
        elif one.name == "beside":
            extra = clip / FILES_BESIDE[one.where % len(FILES_BESIDE)]
            if not extra.exists():
                extra.mkdir() if FILES_BESIDE[one.where % len(FILES_BESIDE)].endswith("/") else extra.write_bytes(b"")
    quickly = outcome(tmp_path)
    with only_carefully():
        assert outcome(tmp_path) == quickly


VIDEO_FRAMES = [["0", "1", "2"], ["0000.jpg", "0001.jpg", "0002.jpg"], ["00", "1", "02"], ["0", "2", "1"], ["0", "1", "1"], ["0", "1", "3"]]
VIDEO_FRAMES += [["0.png", "1.jpg", "2"], ["0", "", "2"], ["0", "x", "2"], ["0", "1", "0" * 19 + "2"], [" 0", "1", "2"], ["0", "1.0", "2"]]


@pytest.mark.parametrize("frames", VIDEO_FRAMES)
@pytest.mark.parametrize("place", ["game1/Clip1/clip.mp4", "game1/rally.mp4"])
def test_plain_and_careful_reading_of_a_video_agree(tmp_path: Path, frames: list[str], place: str) -> None:
    write_video(tmp_path / place, [blob_picture(SIZE, (20, 20))] * 3)
    header, table = (HEADER, "Label.csv") if "Clip1" in place else ("Frame,Visibility,X,Y,Status", "rally.csv")
    write_labels((tmp_path / place).parent / table, [f"{frame},{n},{n + 1},7.25,0" for n, frame in enumerate(frames)], header)
    quickly = outcome(tmp_path)
    with only_carefully():
        assert outcome(tmp_path) == quickly


@pytest.mark.parametrize("names", ["{:04d}.jpg", "{:d}.png", "frame_{:05d}.jpg"])
def test_what_is_plain_is_read_the_quick_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    write_clip(tmp_path / "game1" / "Clip1", count=12, suffix=".png")
    clip = tmp_path / "game1" / "Clip1"
    text = (clip / "Label.csv").read_text()
    for number in range(12):
        (clip / f"{number:04d}.png").rename(clip / names.format(number))
        text = text.replace(f"{number:04d}.png", names.format(number))
    (clip / "Label.csv").write_text(text)
    for beside in (".DS_Store", "notes.txt"):
        (clip / beside).write_text("")
    write_video(tmp_path / "game1" / "rally.mp4", [blob_picture(SIZE, (20, 20))] * 3)
    write_labels(tmp_path / "game1" / "rally.csv", ["0,0,,", "1,1,3,4", "2,2.0,3.5,4"], header="Frame,Visibility,X,Y")
    monkeypatch.setattr(formats, "read_labels", None)  # the careful way
    assert [clip.length for clip in read_clips(tmp_path, ["game1"], "stop")[0].clips] == [12, 3]


def test_many_clips_cost_what_they_cost_one_by_one(tmp_path: Path) -> None:
    write_games(tmp_path, ["game1"], clips=1, count=2, size_wh=(16, 16))
    for number in range(2, 31):
        shutil.copytree(tmp_path / "game1" / "Clip1", tmp_path / "game1" / f"Clip{number}", copy_function=os.link)
    index: ClipIndex = read_clips(tmp_path, ["game1"], "stop")[0]
    assert [clip.name for clip in index.clips] == [f"Clip{number}" for number in range(1, 31)]
    assert np.array_equal(index.xy_px, np.tile(index.xy_px[:2], (30, 1)))

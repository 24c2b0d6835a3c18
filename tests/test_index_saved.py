"""An index that was saved is as good as one that is read, or it is not used."""

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clips import blob_picture, path_of_ball, write_games, write_labels, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tracknet.data import formats, saved_index
from tracknet.data.formats import read_clips
from tracknet.data.index import ClipIndex, FrameNames
from tracknet.errors import DataError

SIZE = (64, 48)
GAMES = ["game1", "match1"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of all layouts. A file that was written just now counts as old."""
    monkeypatch.setattr(saved_index, "TOO_YOUNG_S", 0.0)
    root = tmp_path / "data set"
    write_games(root, ["game1"], clips=3, count=4)
    clip = root / "game1" / "Clip2"
    for number, name in enumerate(["a1.png", "a7.png", "b²3.png", "cc.png"]):  # of different lengths
        (clip / f"{number:04d}.png").rename(clip / name)
        (clip / "Label.csv").write_text((clip / "Label.csv").read_text().replace(f"{number:04d}.png", name))
    pictures = [blob_picture(SIZE, position) for position in path_of_ball(3, SIZE)]
    write_video(root / "game1" / "Clip4" / "clip.mp4", pictures)
    write_labels(root / "game1" / "Clip4" / "Label.csv", ["0000,1,3,4,0", "0001,0,,,", "0002,2,5.5,6,0"])
    for name in ("a", "b"):
        write_video(root / "match1" / "video" / f"{name}.mp4", pictures)
        write_labels(root / "match1" / "csv" / f"{name}_ball.csv", ["0,1,3,4", "1,0,0,0", "2,2,5.5,6"], header="Frame,Visibility,X,Y")
    return root


def same(one: ClipIndex, other: ClipIndex) -> bool:
    return (
        one.clips == other.clips
        and one.xy_px.dtype == other.xy_px.dtype
        and np.array_equal(one.xy_px, other.xy_px)
        and one.visibility.dtype == other.visibility.dtype
        and np.array_equal(one.visibility, other.visibility)
    )


def read_anew(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, on_error: str = "stop") -> list[str]:
    """The clips that are read when the index is wanted; it is what it would be without a saved one."""
    anew: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("_read_clip_folder", "_read_video_and_table"):
            read = getattr(formats, name)
            patch.setattr(
                formats, name, lambda game, path, *rest, read=read: (anew.append(f"{game}/{path.stem}"), read(game, path, *rest))[1]
            )
        index, errors = read_clips(root, GAMES, on_error, cache)
    fresh, fresh_errors = read_clips(root, GAMES, on_error)
    assert same(index, fresh)
    assert list(map(str, errors)) == list(map(str, fresh_errors))
    return anew


ALL = ["game1/Clip1", "game1/Clip2", "game1/Clip3", "game1/Clip4", "match1/a", "match1/b"]


def test_what_has_not_changed_is_not_read_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    assert read_anew(root, cache, monkeypatch) == ALL
    (file,) = (cache / "index").iterdir()
    written = file.stat()
    assert read_anew(root, cache, monkeypatch) == []
    assert file.stat().st_mtime_ns == written.st_mtime_ns  # nothing to write
    monkeypatch.chdir(root)
    assert read_anew(Path(), cache, monkeypatch) == []
    assert read_clips(root, ["game1"], "stop", cache)[0].games == ("game1",)
    assert len(list((cache / "index").iterdir())) == 2


def write_same_size_and_time(path: Path, old: str, new: str) -> None:
    """As `cp -p` or `rsync -t` would: only the time of the entry tells."""
    state = path.stat()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)


def other_label(root: Path) -> None:
    write_same_size_and_time(root / "game1" / "Clip1" / "Label.csv", "0001.png,1", "0001.png,2")


def other_table(root: Path) -> None:
    write_same_size_and_time(root / "match1" / "csv" / "a_ball.csv", "0,1,3,4", "0,2,4,3")


def longer_clip(root: Path) -> None:
    clip = root / "game1" / "Clip1"
    shutil.copy(clip / "0003.png", clip / "0004.png")
    (clip / "Label.csv").write_text((clip / "Label.csv").read_text() + "0004.png,0,,,\n")


def other_names(root: Path) -> None:
    clip = root / "game1" / "Clip1"
    (clip / "0003.png").rename(clip / "0003.PNG")
    (clip / "Label.csv").write_text((clip / "Label.csv").read_text().replace("0003.png", "0003.PNG"))


def other_size(root: Path) -> None:
    Image.new("RGB", (128, 96)).save(root / "game1" / "Clip1" / "0000.png")


def other_video(root: Path) -> None:
    write_video(root / "game1" / "Clip4" / "clip.mp4", [blob_picture((96, 64), (20, 20))] * 3)


def other_video_of_table(root: Path) -> None:
    write_video(root / "match1" / "video" / "a.mp4", [blob_picture((96, 64), (20, 20))] * 3)


def table_elsewhere(root: Path) -> None:
    (root / "match1" / "csv" / "a_ball.csv").rename(root / "match1" / "csv" / "a.csv")


CHANGES = {
    other_label: "game1/Clip1",
    longer_clip: "game1/Clip1",
    other_names: "game1/Clip1",
    other_size: "game1/Clip1",
    other_video: "game1/Clip4",
    other_table: "match1/a",
    other_video_of_table: "match1/a",
    table_elsewhere: "match1/a",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    read_clips(root, GAMES, "stop", tmp_path)
    change(root)
    assert read_anew(root, tmp_path, monkeypatch) == [CHANGES[change]]
    assert read_anew(root, tmp_path, monkeypatch) == []


def test_clips_that_come_and_go_move_the_others_rows(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_clips(root, GAMES, "stop", tmp_path)
    (root / "game1" / "Clip1").rename(root / "game1" / "Clip5")
    assert read_anew(root, tmp_path, monkeypatch) == ["game1/Clip5"]
    shutil.rmtree(root / "game1" / "Clip5")
    assert read_anew(root, tmp_path, monkeypatch) == []
    assert read_anew(root, tmp_path, monkeypatch) == []


def test_a_broken_clip_is_named_each_time_until_it_is_mended(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = root / "game1" / "Clip3" / "Label.csv"
    text = table.read_text()
    read_clips(root, GAMES, "stop", tmp_path)
    table.write_text(text.replace("0001.png,1", "0001.png,9"))
    for _ in range(2):
        assert read_anew(root, tmp_path, monkeypatch, "skip") == ["game1/Clip3"]
        with pytest.raises(DataError, match=r"Clip3/Label\.csv:3: visibility is '9'"):
            read_clips(root, GAMES, "stop", tmp_path)
    table.write_text(text)
    assert read_anew(root, tmp_path, monkeypatch) == ["game1/Clip3"]


def test_a_second_table_or_a_second_clip_of_a_name_is_an_error_though_the_first_is_saved(root: Path, tmp_path: Path) -> None:
    read_clips(root, GAMES, "stop", tmp_path)
    shutil.copy(root / "match1" / "csv" / "a_ball.csv", root / "match1" / "a.csv")
    with pytest.raises(DataError, match=r"a\.mp4: needs one label file"):
        read_clips(root, GAMES, "stop", tmp_path)
    (root / "match1" / "a.csv").unlink()
    shutil.copy(root / "match1" / "video" / "a.mp4", root / "match1" / "a.mp4")
    with pytest.raises(DataError, match="another clip of this name"):
        read_clips(root, GAMES, "stop", tmp_path)


@pytest.mark.parametrize("years", [0.1, 350])  # in nanoseconds the second is more than 64 bits hold
def test_times_that_are_too_young_or_lie_ahead_are_not_trusted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: float
) -> None:
    ahead = time.time() + years * 365 * 86400
    os.utime(root / "game1" / "Clip1" / "0000.png", (ahead, ahead))
    read_clips(root, GAMES, "stop", tmp_path)
    assert read_anew(root, tmp_path, monkeypatch) == ["game1/Clip1"]
    monkeypatch.setattr(saved_index, "TOO_YOUNG_S", 100.0)
    read_clips(root, GAMES, "stop", tmp_path / "other")
    assert read_anew(root, tmp_path / "other", monkeypatch) == ALL


@pytest.mark.parametrize("damage", ["empty", "short", "head", "middle", "tail", "text", "longer"])
def test_a_damaged_index_counts_for_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    read_clips(root, GAMES, "stop", tmp_path)
    (file,) = (tmp_path / "index").iterdir()
    whole = file.read_bytes()
    places = {"head": 6, "middle": len(whole) // 2, "tail": len(whole) - 1}
    if damage in places:
        changed = bytearray(whole)
        changed[places[damage]] ^= 16
        file.write_bytes(changed)
    else:
        file.write_bytes({"empty": b"", "short": whole[:-9], "text": b"no index", "longer": whole + b"0"}[damage])
    assert read_anew(root, tmp_path, monkeypatch) == ALL
    assert file.read_bytes() == whole


def test_a_disk_that_takes_nothing_costs_only_the_saving(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING, "tracknet"):
        for _ in range(2):
            assert read_anew(root, tmp_path, monkeypatch) == ALL
    assert list((tmp_path / "index").iterdir()) == []
    (message,) = caplog.messages
    assert str(tmp_path / "index") in message
    (tmp_path / "a file").write_text("")
    assert read_anew(root, tmp_path / "a file", monkeypatch) == ALL


def _read_often(root: Path, cache: Path, expected: ClipIndex) -> None:
    for _ in range(15):
        shutil.rmtree(cache / "index", ignore_errors=True)
        assert same(read_clips(root, GAMES, "stop", cache)[0], expected)


def test_processes_that_read_and_write_at_once_do_not_disturb_each_other(root: Path, tmp_path: Path) -> None:
    expected = read_clips(root, GAMES, "stop")[0]
    processes = [multiprocessing.get_context("fork").Process(target=_read_often, args=(root, tmp_path, expected)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=6).filter(
    lambda name: not any("\ud800" <= character <= "\udfff" for character in name)
)


@given(st.lists(st.one_of(NAMES, st.sampled_from(["0001.jpg", "0002.jpg", "\udcff.png"]))), st.integers(-9, 9), st.integers(-9, 9))
def test_frame_names_are_those_of_a_tuple(names: list[str], start: int, stop: int) -> None:
    held = FrameNames(names)
    assert held == tuple(names)
    assert tuple(names) == held
    assert (held == (*names, "x"), held == names) == (False, False)
    assert held == FrameNames(names) == pickle.loads(pickle.dumps(held))
    assert hash(held) == hash(tuple(names))
    assert (len(held), list(held), [held[place] for place in range(len(names))]) == (len(names), names, names)
    assert held[start:stop] == tuple(names[start:stop])
    assert (held[-1] if names else "") == (names[-1] if names else "")
    assert all(name in held for name in names)


def test_a_million_names_pickle_small() -> None:
    names = FrameNames([f"{number:06d}.jpg" for number in range(1_000_000)])
    assert len(pickle.dumps(names)) < 11_000_000

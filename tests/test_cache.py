"""The frame cache: what is read is the same whether it was cached or not, and no fault of the cache ends a run."""

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from clips import first_frames_of_real_clip, label_rows, real_video_clip, write_clip, write_games, write_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from users import locked, open_folder
from video_files import decode_count, number_of, write_numbered

from tracknet.data import cache_files, seek
from tracknet.data import frames as frames_module
from tracknet.data.cache_files import CacheFolder, NoRoomError
from tracknet.data.decode import decode_clip
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip
from tracknet.data.prepare import claim_clips, prepare_clips
from tracknet.data.stored_frames import as_read
from tracknet.errors import DataError, UserError

FORMS = ["raw", "jpeg"]
SIZE_WH = (128, 72)


def clips_of(root: Path) -> list[Clip]:
    return list(read_clips(root, sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "cache"), "stop")[0].clips)


def prepared(clips: list[Clip], store: FrameStore, on_error: str = "stop") -> dict[str, str]:
    return prepare_clips(clips, store, on_error, (0, 1), lambda items: items)


def same_list(items: list) -> list:
    return items


def files_of(store: FrameStore) -> list[Path]:
    return sorted(store.folder.path.iterdir()) if store.folder.path.exists() else []


@pytest.fixture(scope="module")
def real_clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    """Some frames of a real clip as pictures, and a real H.264 clip whole."""
    root = tmp_path_factory.mktemp("footage")
    first_frames_of_real_clip(root / "pictures", count=30)
    real_video_clip(root / "video")
    return {kind: clips_of(root / kind)[0] for kind in ("pictures", "video")}


@pytest.fixture(scope="module")
def both_ways(
    real_clips: dict[str, Clip], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[FrameStore, FrameStore]]:
    """A store whose cache holds the clip and one that keeps nothing, by kind and form."""
    stores = {}
    for kind, clip in real_clips.items():
        for form in FORMS:
            folder = tmp_path_factory.mktemp("cache")
            stores[kind, form] = FrameStore(folder / "full", SIZE_WH, form), FrameStore(folder / "none", SIZE_WH, form, limit_gb=0)
            for store in stores[kind, form]:
                prepared([clip], store)
            assert stores[kind, form][0].holds(clip)
            assert not stores[kind, form][1].holds(clip)
            assert files_of(stores[kind, form][1]) == []
    return stores


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["pictures", "video"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_window_is_the_same_bytes_cached_and_uncached(
    both_ways: dict, real_clips: dict, kind: str, form: str, data: st.DataObject
) -> None:
    clip, (cached, uncached) = real_clips[kind], both_ways[kind, form]
    for _ in range(3):
        first = data.draw(st.integers(0, clip.length - 1))
        count = data.draw(st.integers(1, min(9, clip.length - first)))
        window = cached.window(clip, first, count)
        assert window.shape == (count, 72, 128, 3)
        np.testing.assert_array_equal(window, uncached.window(clip, first, count))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["pictures", "video"])
def test_a_pass_and_the_background_are_the_same_cached_and_uncached(both_ways: dict, real_clips: dict, kind: str, form: str) -> None:
    clip, (cached, uncached) = real_clips[kind], both_ways[kind, form]
    one, other = (np.stack(list(store.each_frame(clip))) for store in (cached, uncached))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, np.stack([as_read(form, frame) for frame in decode_clip(clip, SIZE_WH)]))
    np.testing.assert_array_equal(cached.background(clip), uncached.background(clip))
    fresh = pickle.loads(pickle.dumps(uncached))  # has the background not in memory any more
    np.testing.assert_array_equal(cached.background(clip), fresh.background(clip))


def test_the_raw_form_is_read_without_a_copy(both_ways: dict, real_clips: dict) -> None:
    store, clip = both_ways["video", "raw"][0], real_clips["video"]
    assert np.shares_memory(store.window(clip, 3, 5), store.window(clip, 7, 1))
    assert not store.window(clip, 3, 5).flags.writeable


def test_the_jpeg_form_is_smaller_and_near(both_ways: dict, real_clips: dict) -> None:
    clip = real_clips["video"]
    raw, jpeg = both_ways["video", "raw"][0], both_ways["video", "jpeg"][0]
    sizes = [max(path.stat().st_size for path in files_of(store)) for store in (raw, jpeg)]
    assert sizes[1] < sizes[0] / 4
    assert np.abs(raw.window(clip, 0, 20).astype(int) - jpeg.window(clip, 0, 20)).mean() < 2


@pytest.mark.parametrize("form", FORMS)
def test_workers_that_were_forked_from_a_reader_read_the_same(both_ways: dict, real_clips: dict, form: str) -> None:
    """They share its open files, whose positions must not matter."""
    context = multiprocessing.get_context("fork")
    for kind, clip in real_clips.items():
        for store in both_ways[kind, form]:
            expected = {first: store.window(clip, first, 3).tobytes() for first in (0, 11, 27, 5)}
            workers = [context.Process(target=read_windows, args=(store, clip, expected)) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(30)
                worker.kill()  # where it hangs
            assert [worker.exitcode for worker in workers] == [0] * 4


def read_windows(store: FrameStore, clip: Clip, expected: dict[int, bytes]) -> None:
    cv2.setNumThreads(0)  # as in the loader's workers
    for first, window in expected.items():
        assert store.window(clip, first, 3).tobytes() == window


# ---------------------------------------------------------------- videos of other kinds

VIDEOS: dict[str, dict] = {
    "closed groups": {"options": {"g": "8", "bf": "2"}},
    "open groups": {"options": {"x264-params": "keyint=8:min-keyint=8:scenecut=0:open-gop=1:bframes=3:b-pyramid=normal"}},
    "gradual refresh": {"options": {"x264-params": "keyint=8:intra-refresh=1:bframes=0"}},
    "one group": {"options": {"g": "250", "bf": "3"}},
    "variable rate": {"times_ms": [number * 40 + (number % 3) * 7 for number in range(30)], "options": {"g": "6"}},
    "MPEG-2": {"codec": "mpeg2video", "options": {"g": "6", "bf": "2"}},
    "no times": {"container": "avi", "codec": "mpeg4", "options": {"g": "6", "bf": "2"}},
    "raw stream": {"container": "h264", "options": {"g": "6", "bf": "2"}},
    "transport stream": {"container": "mpegts", "options": {"x264-params": "keyint=8:open-gop=1:bframes=2"}},
    "H.265": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=8:open-gop=1"}},
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_any_frame_of_a_video_is_the_one_of_a_pass_from_its_start(tmp_path: Path, kind: str) -> None:
    options = dict(VIDEOS[kind])
    suffix = {"mpegts": "ts", "avi": "avi", "h264": "h264"}.get(options.get("container", ""), "mkv")
    path = write_numbered(tmp_path / f"a.{suffix}", 30, fps=Fraction(25), **options)
    clip = Clip("game1", "Clip1", path, None, (160, 96), 0, 30)
    expected = list(decode_clip(clip, (80, 48)))
    reader = seek.VideoReader(path, 30, (160, 96), (80, 48))
    rng = np.random.default_rng(0)
    for first in [*rng.permutation(30).tolist(), 0, 3, 4, 9, 10]:
        count = int(min(rng.integers(1, 4), 30 - first))
        np.testing.assert_array_equal(reader.read(first, count), expected[first : first + count])


@pytest.mark.parametrize("hidden", [3, 5, 14])
@pytest.mark.parametrize("options", [{"g": "12", "bf": "2"}, {"x264-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=1:bframes=3"}])
def test_a_video_that_an_edit_list_cuts_between_key_frames(tmp_path: Path, options: dict[str, str], hidden: int) -> None:
    whole, path = write_numbered(tmp_path / "whole.mp4", 48, options=options), tmp_path / "a.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream, of_target = source.streams.video[0], target.add_stream_from_template(source.streams.video[0])
        shift = int(hidden / 25 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, of_target
                target.mux(packet)
    length = decode_count(path)
    expected = list(decode_clip(Clip("game1", "Clip1", path, None, (160, 96), 0, length), (80, 48)))
    assert length < 48
    assert number_of(expected[0]) > 0
    reader = seek.VideoReader(path, length, (160, 96), (80, 48))
    for first in [20, 0, 9, 1, 30, 2, *np.random.default_rng(0).permutation(length - 2).tolist()]:
        np.testing.assert_array_equal(reader.read(first, 3), expected[first : first + 3])


def test_a_jump_decodes_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(tmp_path / "a.mp4", 200, options={"g": "10", "sc_threshold": "0"})
    seen: list[int] = []
    monkeypatch.setattr(seek, "check_frame", lambda path, number, *_: seen.append(number))
    reader = seek.VideoReader(path, 200, (160, 96), (80, 48))
    reader.read(150, 2)
    assert seen == list(range(140, 152))
    reader.read(152, 1)  # goes on from where it stands
    assert seen[-1:] == [152]
    assert len(seen) == 13


@pytest.mark.parametrize("length", [28, 33])
def test_a_video_with_another_number_of_frames_is_no_crash(tmp_path: Path, length: int) -> None:
    path = write_numbered(tmp_path / "a.mp4", 30, options={"g": "6"})
    reader = seek.VideoReader(path, length, (160, 96), (80, 48))
    assert len(reader.read(26, 2)) == 2
    if length > 30:
        with pytest.raises(DataError, match=r"a\.mp4: ends before frame 30, but its labels are for 33"):
            reader.read(29, 3)


# ---------------------------------------------------------------- limit


def limited(root: Path, share: float) -> FrameStore:
    """A store whose limit is a share of what the clips of `write_games` need, derived files included."""
    clips = clips_of(root)
    need = sum(clip.length * (64 * 48 * 3 + frames_module.DERIVED_BYTES) + 64 * 48 * 3 + 512 for clip in clips)
    return FrameStore(root / "cache", None, limit_gb=need * share / 1e9)


def test_the_limit_holds_and_what_does_not_fit_is_read_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_games(tmp_path, ["game1", "game2"], clips=3, count=20)
    clips, store = clips_of(tmp_path), limited(tmp_path, 0.7)
    with caplog.at_level(logging.INFO, "tracknet"):
        prepared(clips, store)
    missing = [clip for clip in clips if not store.holds(clip)]
    assert 1 <= len(missing) <= 3
    assert caplog.text.count(f"{len(missing)} of 6 clips ({len(missing) * 20} frames) are decoded whenever they are read") == 1
    assert sum(path.stat().st_size for path in files_of(store)) <= store.folder.limit
    for clip in clips:
        np.testing.assert_array_equal(store.window(clip, 4, 7), list(decode_clip(clip, (64, 48)))[4:11])


def test_clips_of_two_sides_that_do_not_fit_are_not_called_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_games(tmp_path, ["game1", "game2"])
    clips, store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None, limit_gb=0)
    for clip in clips:  # as training does with its two sides in the raw form
        prepared([clip], store)
    for clip in clips:
        store.window(clip, 0, 3)
    assert "lost" not in caplog.text


def test_the_limit_counts_each_byte_once(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 1100)
    folder.reserved = 300
    with folder.writing(tmp_path / f"a-{1:016x}.npy", 600) as file:
        file.write(bytes(600))
        file.flush()
        assert folder.save(tmp_path / f"a-{1:016x}.median.npy", np.zeros(200, np.uint8))  # into what is reserved
        folder._listed_at = float("-inf")  # the writing took its time
    assert folder.reserved == 100
    assert folder.used_bytes() == 600 + 328
    folder._listed_at = float("-inf")
    with folder.writing(tmp_path / f"b-{2:016x}.npy", 30) as file:
        file.write(bytes(30))
        file.flush()
        folder._listed_at = float("-inf")
    assert folder.has_room(42)
    assert not folder.has_room(43)


def test_files_of_a_clip_that_is_in_use_stay_together(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 1000)
    frames, derived = tmp_path / f"a-{1:016x}.npy", tmp_path / f"a-{1:016x}.marks.npy"
    for path in (frames, derived):
        path.write_bytes(bytes(400))
    aged([derived], 48)  # only the use of frames is noted
    with pytest.raises(NoRoomError), folder.writing(tmp_path / f"b-{2:016x}.npy", 400):
        pass
    assert derived.exists()
    assert not folder.has_room(400)
    aged([frames], 48)
    folder._listed_at = float("-inf")
    assert folder.has_room(400)


def test_a_clip_that_does_not_fit_is_looked_through_once_and_never_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_games(tmp_path, ["game1"], clips=3, count=20)
    prepared(clips_of(tmp_path), limited(tmp_path, 0.7))
    monkeypatch.setattr(frames_module, "decode_clip", lambda *_: pytest.fail("decoded again"))
    prepared(clips_of(tmp_path), limited(tmp_path, 0.7))


def test_a_broken_clip_is_named_before_training_even_where_nothing_is_kept(tmp_path: Path) -> None:
    write_games(tmp_path, ["game1"], clips=2)
    (tmp_path / "game1" / "Clip2" / "0005.png").write_bytes(b"no picture")
    store = FrameStore(tmp_path / "cache", None, limit_gb=0)
    assert list(prepared(clips_of(tmp_path), store, "skip")) == ["game1/Clip2"]
    with pytest.raises(DataError, match=r"0005\.png"):
        prepared(clips_of(tmp_path), store)
    assert files_of(store) == []


def aged(paths: list[Path], hours: float) -> None:
    for path in paths:
        os.utime(path, (time.time() - hours * 3600,) * 2)


def test_the_longest_unused_makes_room_and_what_is_in_use_stays(tmp_path: Path) -> None:
    write_games(tmp_path, ["a", "b", "c", "d"], count=20)
    by_game = {clip.game: clip for clip in clips_of(tmp_path)}
    for game in "abc":
        prepared([by_game[game]], FrameStore(tmp_path / "cache", None))
    for game, hours in (("a", 48), ("b", 72), ("c", 1)):
        aged(list((tmp_path / "cache" / "frames").glob(f"{game}-*")), hours)
    (tmp_path / "cache" / "frames" / "mine.npy").write_bytes(b"not the cache's")
    store = limited(tmp_path, 0.8)  # for three of the four
    prepared([by_game["d"]], store)
    assert [game for game in "abcd" if FrameStore(tmp_path / "cache", None).holds(by_game[game])] == ["a", "c", "d"]
    assert (tmp_path / "cache" / "frames" / "mine.npy").exists()

    nobody_goes = limited(tmp_path, 0.8)
    aged(list((tmp_path / "cache" / "frames").glob("[acd]-*")), 12)
    prepared([by_game["b"]], nobody_goes)  # the others may be some other run's
    assert [game for game in "abcd" if FrameStore(tmp_path / "cache", None).holds(by_game[game])] == ["a", "c", "d"]


def test_the_clips_of_the_run_itself_never_go(tmp_path: Path) -> None:
    write_games(tmp_path, ["a", "b", "c", "d"], count=20)
    clips = clips_of(tmp_path)
    prepared(clips[:3], FrameStore(tmp_path / "cache", None))
    aged(list((tmp_path / "cache" / "frames").iterdir()), 100)
    store = limited(tmp_path, 0.85)
    claim_clips(clips, store)
    aged(list((tmp_path / "cache" / "frames").iterdir()), 100)
    prepared(clips, store)
    assert [store.holds(clip) for clip in clips] == [True, True, True, False]


def test_a_run_that_lasts_notes_that_its_files_are_in_use(tmp_path: Path) -> None:
    write_games(tmp_path, ["a"])
    (clip,), store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None)
    prepared([clip], store)
    aged(files_of(store), 30)
    store.window(clip, 0, 1)
    store._touch_at = time.monotonic() - 1  # an hour later
    store.window(clip, 0, 1)
    assert all(time.time() - path.stat().st_mtime < 60 for path in files_of(store))


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path) -> None:
    write_games(tmp_path, ["a"])
    store = FrameStore(tmp_path / "cache", None)
    store.folder.path.mkdir(parents=True)
    old, young = (store.folder.path / f"a-Clip1-{0:016x}.npy.{number}.part" for number in "12")
    for path in (old, young):
        path.write_bytes(b"half")
    aged([old], 25)
    prepared(clips_of(tmp_path), store)
    assert not old.exists()
    assert young.exists()


def test_a_limit_that_was_lowered_is_kept_once_the_files_are_old(tmp_path: Path) -> None:
    write_games(tmp_path, ["a", "b"])
    first, second = clips_of(tmp_path)
    prepared([first], FrameStore(tmp_path / "cache", None))
    prepared([second], limited(tmp_path, 0.3))
    assert len(list((tmp_path / "cache" / "frames").glob("a-*"))) == 2
    aged(list((tmp_path / "cache" / "frames").glob("a-*")), 25)
    prepared([second], limited(tmp_path, 0.3))
    assert list((tmp_path / "cache" / "frames").glob("a-*")) == []


@given(sizes=st.lists(st.tuples(st.integers(1, 400), st.booleans(), st.booleans()), max_size=12), size=st.integers(0, 1500))
@settings(max_examples=40, deadline=None)
def test_room_is_made_exactly_where_it_can_be(
    sizes: list[tuple[int, bool, bool]], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = CacheFolder(tmp_path_factory.mktemp("room"), 1000)
    stays = 0
    for number, (length, is_old, is_own) in enumerate(sizes):
        path = folder.path / f"game-clip-{number:016x}.npy"
        path.write_bytes(bytes(length))
        aged([path], 48 if is_old else 1)
        if is_own:
            folder.own_keys.add(f"{number:016x}")
        stays += 0 if is_old and not is_own else length
    assert folder.has_room(size) == (stays + size <= 1000)
    target = folder.path / f"game-new-{99:016x}.npy"
    if stays + size <= 1000:
        with folder.writing(target, size) as file:
            file.write(bytes(size))
        assert sum(path.stat().st_size for path in folder.path.iterdir()) <= 1000
    else:
        before = sorted(folder.path.iterdir())
        with pytest.raises(NoRoomError), folder.writing(target, size) as file:
            file.write(bytes(size))
        assert sorted(folder.path.iterdir()) == before


# ---------------------------------------------------------------- a disk that takes no more


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_foreseen", [True, False])
def test_a_full_disk_is_one_warning_and_decoding_goes_on(
    tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_foreseen: bool, form: str
) -> None:
    write_games(tmp_path / "data", ["a", "b", "c"], clips=2, count=20, size_wh=(192, 144))
    if not is_foreseen:
        monkeypatch.setattr(cache_files.CacheFolder, "_check_disk", lambda *_: None)  # it fills while it is written
        (small_disk / "other").write_bytes(bytes(1_000_000))
    clips, store = clips_of(tmp_path / "data"), FrameStore(small_disk / "cache", None, form)
    prepared(clips, store)
    assert caplog.text.count("2 GB are kept for all else" if is_foreseen else "No space left on device") == 1
    assert not any(path.suffix == ".part" for path in files_of(store))
    for clip in clips:
        expected = np.stack([as_read(form, frame) for frame in decode_clip(clip, (192, 144))])
        np.testing.assert_array_equal(store.window(clip, 3, 9), expected[3:12])
        store.background(clip)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("error", [errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_may_not_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    write_games(tmp_path, ["a", "b"])
    clips, store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None)
    monkeypatch.setattr(Path, "mkdir", refuse)
    prepared(clips, store)
    assert caplog.text.count(os.strerror(error)) == 1
    np.testing.assert_array_equal(store.window(clips[1], 2, 3), list(decode_clip(clips[1], (64, 48)))[2:5])


def test_room_is_left_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write_games(tmp_path, ["a"])
    monkeypatch.setattr(cache_files, "LEAST_FREE", (1 << 60, 0.02))
    store = FrameStore(tmp_path / "cache", None, limit_gb=1)
    with caplog.at_level(logging.INFO, "tracknet"):
        prepared(clips_of(tmp_path), store)
    assert files_of(store) == []
    assert store.folder.refuses
    assert "no room for them" in caplog.text
    assert "data.cache_limit_gb" not in caplog.text  # it is the disk


def test_a_cache_that_may_not_be_entered_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with open_folder() as folder:
        write_games(folder / "data", ["a"])
        (clip,) = clips_of(folder / "data")
        store = FrameStore(folder / "cache", None)
        store.folder.path.mkdir(parents=True)
        with locked(folder / "cache"):
            prepared([clip], store)
            np.testing.assert_array_equal(store.window(clip, 2, 3), list(decode_clip(clip, (64, 48)))[2:5])
    assert [record.message.count("Permission denied") for record in caplog.records if record.levelno >= logging.WARNING] == [1]


def test_names_of_any_length_are_cached(tmp_path: Path) -> None:
    write_games(tmp_path, ["game", "é" * 120])
    for game in ("game", "é" * 120):
        (tmp_path / game / "Clip1").rename(tmp_path / game / ("C" * 250))
    clips, store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None)
    prepared(clips, store)
    assert all(store.holds(clip) for clip in clips)
    assert len(files_of(store)) == 4


# ---------------------------------------------------------------- damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("is_open", [False, True])
def test_damage_in_the_middle_of_a_run_is_one_warning_and_repaired_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, damage: Callable[[Path], None], is_open: bool
) -> None:
    write_games(tmp_path, ["a", "b"], count=40)
    clips, store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None, form)
    prepared(clips, store)
    expected = {clip.id: np.array(store.window(clip, 0, 40)) for clip in clips}
    background = {clip.id: np.array(store.background(clip)) for clip in clips}
    reading = store if is_open else pickle.loads(pickle.dumps(store))
    for path in files_of(store):
        damage(path)
    if not (is_open and damage is overwrite):  # what is mapped already and written over within is not noticed
        for clip in clips:
            np.testing.assert_array_equal(reading.window(clip, 30, 10), expected[clip.id][30:])
            np.testing.assert_array_equal(reading.background(clip), background[clip.id])
        assert caplog.text.count("the cache has lost") <= 1
    again = FrameStore(tmp_path / "cache", None, form)
    prepared(clips, again)
    for clip in clips:
        assert again.holds(clip)
        np.testing.assert_array_equal(again.window(clip, 0, 40), expected[clip.id])


def test_a_jpeg_that_is_damaged_within_is_decoded_from_the_source(tmp_path: Path) -> None:
    write_games(tmp_path, ["a"])
    (clip,), store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None, "jpeg")
    prepared([clip], store)
    expected = np.array(store.window(clip, 0, 8))
    (path,) = (path for path in files_of(store) if path.suffix == ".jpegs")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 300)
        file.write(bytes(300))
    np.testing.assert_array_equal(FrameStore(tmp_path / "cache", None, "jpeg").window(clip, 0, 7), expected[:7])


# ---------------------------------------------------------------- several processes

FILL = """
import sys
from pathlib import Path
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore
from tracknet.data.prepare import prepare_clips
root, form, order = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = FrameStore(root / "cache", None, form)
clips = read_clips(root, ["a", "b"], "stop")[0].clips
decoded = []
kept = FrameStore._has_stored
FrameStore._has_stored = lambda self, clip, threads: decoded.append(clip.id) or kept(self, clip, threads)
print("ready", flush=True)
sys.stdin.readline()
prepare_clips(clips, store, "stop", (0, 1), lambda items: items, order=order)
print(len(decoded), sum(store.holds(clip) for clip in clips), flush=True)
"""


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_fill_one_cache_at_once(tmp_path: Path, form: str) -> None:
    write_games(tmp_path, ["a", "b"], clips=8, count=12, size_wh=(320, 240))
    clips = clips_of(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(tmp_path), form, str(order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for order in (0, 1)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [held for _, held in results] == ["16", "16"]
    assert all(process.returncode == 0 for process in processes)
    assert sum(int(decoded) for decoded, _ in results) < 32  # they share the work
    store = FrameStore(tmp_path / "cache", None, form)
    assert len(files_of(store)) == 32
    for clip in clips[::5]:
        expected = np.stack([as_read(form, frame) for frame in decode_clip(clip, (320, 240))])
        np.testing.assert_array_equal(store.window(clip, 0, 12), expected)


def test_machines_that_share_a_disk_take_other_orders_and_all_end_with_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two machines, one after the other; `gather` says what the others would."""
    write_games(tmp_path, ["a"], clips=16, count=2)
    clips, orders = clips_of(tmp_path), []
    order_of = prepare_module_order(orders)
    monkeypatch.setattr("tracknet.data.prepare._ordered", order_of)
    for rank in range(4):
        local = rank % 2

        def gather(items: list, rank: int = rank) -> list:
            if items and isinstance(items[0], tuple) and len(items[0][0]) == 32:
                others = [(f"{number:032x}", number % 2) for number in range(4)]
                return [*others[:rank], items[0], *others[rank + 1 :]]
            return items

        prepare_clips(clips, FrameStore(tmp_path / "cache", None), "stop", (local, 2), gather)
    assert [order for order, _ in orders] == [0, 0, 1, 1]
    assert set(orders[0][1]) == set(orders[2][1])
    assert orders[0][1] != orders[2][1]
    assert all(FrameStore(tmp_path / "cache", None).holds(clip) for clip in clips)


def prepare_module_order(orders: list[tuple[int, list[str]]]) -> Callable[[list[Clip], int], list[Clip]]:
    from tracknet.data.prepare import _ordered

    def noting(clips: list[Clip], order: int) -> list[Clip]:
        ordered = _ordered(clips, order)
        orders.append((order, [clip.id for clip in ordered]))
        return ordered

    return noting


def test_a_cache_whose_folder_is_a_file_is_one_line(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"^data\.cache_dir: cannot write"):
        prepared(clips_of(tmp_path), FrameStore(tmp_path / "cache", None))


def test_labels_and_clips_of_any_name_have_a_key(tmp_path: Path) -> None:
    """A name may look like a key itself."""
    name = f"x-{7:016x}.y"
    xy: NDArray[np.float64] = write_clip(tmp_path / "game1" / name, count=4)
    write_labels(tmp_path / "game1" / name / "Label.csv", label_rows(xy, [1] * 4))
    (clip,), store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None)
    prepared([clip], store)
    assert store.holds(clip)
    assert f"{7:016x}" not in store.folder.own_keys


@pytest.mark.parametrize("year", [1950, 2376])  # in nanoseconds the second is more than 64 bits hold
def test_files_of_any_time_have_a_key(tmp_path: Path, year: int) -> None:
    write_games(tmp_path, ["game1"])
    picture = tmp_path / "game1" / "Clip1" / "0002.png"
    os.utime(picture, (0, (year - 1970) * 31_556_952))
    (clip,), store = clips_of(tmp_path), FrameStore(tmp_path / "cache", None)
    prepared([clip], store)
    assert store.holds(clip)
    os.utime(picture, (0, (year - 1970) * 31_556_952 + 1))
    assert not FrameStore(tmp_path / "cache", None).holds(clip)

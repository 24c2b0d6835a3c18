"""Footage on both sides of the split is found, and nothing else is."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from clips import real, write_games
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tracknet.data import fingerprint, leaks
from tracknet.data.build import Datasets, build_datasets
from tracknet.data.cache_files import CacheFolder
from tracknet.data.code_search import bits_apart, nearest_codes
from tracknet.data.dataset import WindowDataset
from tracknet.data.decode import decode_clip
from tracknet.data.fingerprint import make_thumbnails
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip, LabelledClip, join_clips
from tracknet.data.leaks import find_leaks, log_leaks
from tracknet.schema.data import DataConfig, SequenceConfig, SplitConfig

SIZE_WH = (128, 72)
Footage = dict[str, NDArray[np.uint8]]  # frames, (n, H, W, 3), by clip id


class StoreOfArrays(FrameStore):
    """Frames that were never decoded; what is derived from them is kept in files as ever."""

    def __init__(self, cache_dir: Path, footage: Footage) -> None:
        super().__init__(cache_dir, None)
        self._footage = footage

    def each_frame(self, clip: Clip) -> Iterator[NDArray[np.uint8]]:
        return iter(self._footage[clip.id])

    def _paths(self, clip: Clip) -> tuple[Path, Path]:
        stem = self.folder.path / f"{clip.id.replace('/', '-')}-{0:016x}"
        return stem.with_suffix(".npy"), stem.with_suffix(".median.npy")


def dataset_of(cache_dir: Path, footage: Footage) -> WindowDataset:
    parts = []
    for clip_id, frames in footage.items():
        game, name = clip_id.split("/")
        clip = Clip(game, name, cache_dir / clip_id, None, (frames.shape[2], frames.shape[1]), 0, len(frames))
        parts.append(LabelledClip(clip, np.zeros((len(frames), 2), np.float32), np.zeros(len(frames), np.int8)))
    store = StoreOfArrays(cache_dir, footage)
    return WindowDataset(join_clips(parts), store, SequenceConfig(), background=False, seed=0, training=None)


def court(seed: int) -> NDArray[np.uint8]:
    """A backdrop of flat patches."""
    coarse = np.random.default_rng(seed).integers(40, 200, (5, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, SIZE_WH, interpolation=cv2.INTER_CUBIC), np.uint8)


def rally(backdrop: NDArray[np.uint8], seed: int, count: int = 60) -> NDArray[np.uint8]:
    """Two players who run about and a ball."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(backdrop[None], count, axis=0)
    for size, speed, tone in ((14, 0.25, 20), (8, 0.25, 230), (3, 1.5, 255)):
        xy, step = rng.uniform((20, 15), (100, 55)), rng.normal(0, speed, 2)
        for frame in frames:
            step = 0.9 * step + rng.normal(0, 0.5 * speed, 2)
            step = np.where((xy + step < 8) | (xy + step > np.array(SIZE_WH) - 8), -step, step)
            xy = np.clip(xy + step, 4, np.array(SIZE_WH) - 4)
            x, y = xy.astype(int)
            frame[max(y - size, 0) : y + size // 2, max(x - size // 3, 0) : x + size // 3 + 1] = tone
    return frames


def noisy(frames: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """What a second encoder makes of them."""
    noise = np.random.default_rng(seed).normal(0, 3, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


GAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def footage() -> Footage:
    """Three rallies on each of three courts."""
    return {f"{game}/{n}": noisy(rally(court(ord(game)), 10 * ord(game) + n), n) for game in GAMES for n in range(3)}


def of_game(footage: Footage, *games: str) -> Footage:
    return {clip_id: frames for clip_id, frames in footage.items() if clip_id.split("/")[0] in games}


def searched(tmp_path: Path, train: Footage, val: Footage) -> tuple[dict[str, NDArray[np.int64]], dict[str, int]]:
    """Numbers of the frames found, and how many stand beside them, by clip of `val`."""
    sides = leaks._read_side(dataset_of(tmp_path / "train", train)), leaks._read_side(dataset_of(tmp_path / "val", val))
    found = leaks._search(*sides)
    return {leak.clip.id: leak.rows - leak.clip.first_row for leak in found}, {leak.clip.id: leak.beside for leak in found}


def dealt(footage: Footage, chosen: Callable[[int], NDArray[np.bool_]]) -> tuple[Footage, Footage]:
    """The frames of each clip dealt to two sides."""
    train, val = {}, {}
    for clip_id, frames in footage.items():
        to_val = chosen(len(frames))
        train[f"train-{clip_id}"], val[f"val-{clip_id}"] = frames[~to_val], frames[to_val]
    return train, val


@pytest.mark.parametrize("share", ["every other", 0.1, 0.5, 0.9])
def test_frames_dealt_to_two_games_are_all_found(tmp_path: Path, footage: Footage, share: Any) -> None:
    rng = np.random.default_rng(1)
    train, val = dealt(footage, lambda n: np.arange(n) % 2 == 1 if share == "every other" else rng.permutation(n) < share * n)
    found, beside = searched(tmp_path, train, val)
    assert set(found) == set(val)
    for clip_id, frames in val.items():
        assert len(found[clip_id]) + beside[clip_id] == len(frames)
    assert sum(map(len, found.values())) >= (0.5 if share == 0.9 else 0.95) * sum(map(len, val.values()))


def test_frames_of_all_clips_shuffled_into_two_heaps_are_found(tmp_path: Path, footage: Footage) -> None:
    frames = np.concatenate(list(footage.values()))
    order = np.random.default_rng(1).permutation(len(frames))
    half = len(order) // 2
    found, beside = searched(tmp_path, {"t/1": frames[order[half:]]}, {"v/1": frames[order[:half]]})
    assert len(found["v/1"]) >= 0.95 * half
    assert len(found["v/1"]) + beside["v/1"] == half


def at_30_fps(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return frames[np.arange(len(frames) * 30 // 25) * 25 // 30]


@pytest.mark.parametrize("copy_trains", [False, True])
def test_a_copy_at_another_frame_rate_size_and_noise_is_found_whole(tmp_path: Path, footage: Footage, copy_trains: bool) -> None:
    copy = {}
    for clip_id, frames in of_game(footage, "b").items():
        small = [cv2.resize(cv2.resize(frame, (96, 54)), SIZE_WH) for frame in at_30_fps(frames)]
        copy[f"copy-{clip_id}"] = noisy(np.array(small, np.uint8), 9)
    original = of_game(footage, "b")
    train, val = (copy | of_game(footage, "a"), original) if copy_trains else (original | of_game(footage, "a"), copy)
    found, _ = searched(tmp_path, train, val | of_game(footage, "c"))
    assert {clip_id: len(rows) for clip_id, rows in found.items()} == {clip_id: len(frames) for clip_id, frames in val.items()}


def test_a_clip_cut_in_two_is_found_at_its_cut(tmp_path: Path, footage: Footage) -> None:
    found, _ = searched(
        tmp_path, {f"t/{k[0]}{k[2]}": v[:30] for k, v in footage.items()}, {f"v/{k[0]}{k[2]}": v[30:] for k, v in footage.items()}
    )
    assert len(found) >= len(footage) - 2
    assert all(rows[0] < 5 for rows in found.values())


@pytest.mark.parametrize("host", ["a/0", "b/2"])
@pytest.mark.parametrize("planted_in_val", [True, False])
def test_single_copied_pictures_are_found_and_no_others(tmp_path: Path, footage: Footage, host: str, planted_in_val: bool) -> None:
    """Also in a clip of the same court, whose background they share."""
    frames, places, sources = footage[host].copy(), [4, 20, 41], [50, 7, 31]
    frames[places] = noisy(footage["b/1"][sources], 9)
    if planted_in_val:
        found, _ = searched(tmp_path, {"t/1": footage["b/1"], "t/2": footage["c/0"]}, {"v/1": frames})
        assert found["v/1"].tolist() == places
    else:
        found, _ = searched(tmp_path, {"t/1": frames, "t/2": footage["c/0"]}, {"v/1": footage["b/1"]})
        assert set(sources) <= set(found["v/1"].tolist())
        assert all(min(abs(row - source) for source in sources) <= 15 for row in found["v/1"])


def test_a_copy_is_found_in_clips_of_a_picture_or_two(tmp_path: Path, footage: Footage) -> None:
    found, _ = searched(tmp_path, {"t/1": footage["a/0"][10:11], "t/2": footage["b/0"][:2]}, {"v/1": noisy(footage["a/0"][10:11], 8)})
    assert found["v/1"].tolist() == [0]


def test_rallies_on_other_courts_and_on_the_same_court_are_no_leak(tmp_path: Path, footage: Footage) -> None:
    for game in GAMES:
        others = of_game(footage, *(other for other in GAMES if other != game))
        assert searched(tmp_path / game, others, of_game(footage, game))[0] == {}
        clips = of_game(footage, game)
        for clip_id in clips:
            rest = {other: frames for other, frames in clips.items() if other != clip_id}
            assert searched(tmp_path / game / clip_id, rest, {clip_id: clips[clip_id]})[0] == {}


def flat(tone: int, count: int) -> NDArray[np.uint8]:
    return np.full((count, 72, 128, 3), tone, np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: flat(30, 40),
        lambda: flat(30, 3),
        lambda: flat(0, 1),
        lambda: np.concatenate([flat(tone, 1) for tone in range(0, 240, 4)]),
        lambda: np.repeat(court(1)[None], 40, axis=0),
        lambda: noisy(np.repeat(court(1)[None], 40, axis=0)),
    ],
    ids=["flat", "flat and short", "one black frame", "fading", "still", "still with noise"],
)
def test_where_nothing_moves_nothing_is_claimed(tmp_path: Path, make: Callable[[], NDArray[np.uint8]]) -> None:
    assert searched(tmp_path, {"t/1": make()}, {"v/1": make()})[0] == {}


# ---------------------------------------------------------------- what the user reads


def test_a_line_names_the_clips_the_frames_and_the_games_to_move(tmp_path: Path, footage: Footage) -> None:
    train, val = (
        dataset_of(tmp_path, footage),
        dataset_of(tmp_path / "val", {"copy/Clip7": footage["b/1"][5:50], "new/1": rally(court(7), 7)}),
    )
    lines = find_leaks(train, val)
    assert lines == [
        "data.split: 45 of 45 frames of copy/Clip7 (val_games) are copies or close neighbours of frames of b/1 (train_games), such as"
        " frame 0, which is its frame 5; move copy to train_games, or b to val_games"
    ]


def test_the_log_warns_in_few_lines_or_says_that_all_is_well(tmp_path: Path, footage: Footage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tracknet")
    train = dataset_of(tmp_path, of_game(footage, "a", "b"))
    log_leaks(Datasets(train, dataset_of(tmp_path / "c", of_game(footage, "c")), SIZE_WH, []))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "comparing 180 validation frames with 360 training frames" in caplog.text
    assert "no copies found" in caplog.text
    caplog.clear()
    many = {f"copy/{n}": frames[first : first + 15] for n, frames in enumerate(of_game(footage, "a").values()) for first in (0,)}
    many |= {f"copy/{n}-{first}": footage[f"a/{n}"][first : first + 15] for n in range(3) for first in (15, 30, 45)}
    assert log_leaks(Datasets(train, dataset_of(tmp_path / "d", many), SIZE_WH, [])) == 12
    assert {record.levelname for record in caplog.records[1:]} == {"WARNING"}
    assert len(caplog.records) == leaks.LINES_LOGGED + 2
    assert "12 of 12 validation clips hold footage that is in training too (10 are listed)" in caplog.records[-1].getMessage()


def test_a_few_shared_pictures_are_no_reason_to_move_games(tmp_path: Path, footage: Footage) -> None:
    frames = footage["a/0"].copy()
    frames[[4, 20, 41]] = footage["b/1"][[50, 7, 31]]
    lines = find_leaks(dataset_of(tmp_path, {"t/1": footage["b/1"]}), dataset_of(tmp_path / "val", {"v/1": frames}))
    assert len(lines) == 1
    assert lines[0].endswith("; a few pictures, such as a title, are on both sides")


@pytest.mark.parametrize("asked", [1, 4, 8])
def test_the_search_ends_between_clips_when_asked(tmp_path: Path, footage: Footage, asked: int) -> None:
    datasets = Datasets(dataset_of(tmp_path, footage), dataset_of(tmp_path / "v", {"copy/1": footage["a/1"]}), SIZE_WH, [])
    answers = iter([False] * (asked - 1) + [True])
    assert log_leaks(datasets, lambda: next(answers)) == 0
    assert next(answers, None) is None


def test_real_files_through_the_cache(tmp_path: Path) -> None:
    """`write_games` writes the same clip into both games: other files, the same content; that is a warning and no error."""
    write_games(tmp_path / "data", ["game1", "game2"], count=12, size_wh=(128, 72))
    datasets = build_datasets(
        DataConfig(root=str(tmp_path / "data"), split=SplitConfig(["game1"], ["game2"]), cache_dir=str(tmp_path / "cache")), seed=1
    )
    lines = find_leaks(datasets.train, datasets.val)
    assert len(lines) == 1
    assert lines[0].startswith(
        "data.split: 12 of 12 frames of game2/Clip1 (val_games) are copies or close neighbours of frames of game1/Clip1"
    )


# ---------------------------------------------------------------- the cache


def test_fingerprints_are_made_once_and_kept(tmp_path: Path, footage: Footage, monkeypatch: pytest.MonkeyPatch) -> None:
    searched(tmp_path, of_game(footage, "a"), of_game(footage, "b"))
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 12
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(fingerprint, "make_thumbnails", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(fingerprint, "make_marks", lambda _: pytest.fail("made again"))
    searched(tmp_path, of_game(footage, "a"), of_game(footage, "b"))


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b""), Path.unlink])
def test_damaged_fingerprints_are_made_anew(tmp_path: Path, footage: Footage, damage: Callable[[Path], Any]) -> None:
    train, copy = of_game(footage, "a"), {"copy/1": footage["a/1"]}
    before = searched(tmp_path, train, copy)[0]
    for path in tmp_path.rglob("*.npy"):
        damage(path)
    after = searched(tmp_path, train, copy)[0]
    assert before["copy/1"].tolist() == after["copy/1"].tolist() == list(range(60))


def test_a_cache_that_cannot_be_written_is_said_once_and_hides_no_leak(
    tmp_path: Path, footage: Footage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    train, val = dataset_of(tmp_path / "file" / "cache", of_game(footage, "a")), dataset_of(tmp_path / "val", {"copy/1": footage["a/1"]})
    assert len(find_leaks(train, val)) == 1
    assert caplog.text.count("data.cache_dir: cannot write") == 1
    monkeypatch.setattr(fingerprint, "make_thumbnails", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(CacheFolder, "_writing", lambda *_: pytest.fail("tried again"))
    monkeypatch.setattr("tracknet.data.open_files.FILES_OPEN", 1)
    assert len(find_leaks(train, val)) == 1


# ---------------------------------------------------------------- search


@given(flipped=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_near_code_is_found_and_a_far_one_is_not(flipped: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, place = rng.integers(0, 256, (300, 64), dtype=np.uint8), int(rng.integers(300))
    bits = np.unpackbits(known[place])
    bits[rng.choice(512, flipped, replace=False)] ^= 1
    asking = np.stack([np.packbits(bits), rng.integers(0, 256, 64, dtype=np.uint8)])
    found = nearest_codes(asking, known, count=2, key_bits=16, bucket=8, limit_bits=128)
    assert found.tolist() == [[place, -1], [-1, -1]]


def test_the_nearest_come_first_and_each_once() -> None:
    known = np.zeros((4, 64), np.uint8)
    known[0, 5], known[2, 7] = 0b111, 0b1
    found = nearest_codes(np.zeros((1, 64), np.uint8), known, count=6, key_bits=16, bucket=8, limit_bits=2)
    assert found.tolist() == [[1, 3, 2, -1, -1, -1]]
    assert bits_apart(known, known[1]).tolist() == [3, 0, 1, 0]


def test_of_a_crowded_key_only_so_many_are_met() -> None:
    crowd = np.zeros((5000, 64), np.uint8)
    found = nearest_codes(crowd[:10], crowd, count=100, key_bits=16, bucket=8, limit_bits=0)
    assert ((found >= 0).sum(axis=1) == 8).all()


# ---------------------------------------------------------------- real footage

TENNIS = ("game1", "game2", "game3", "game5", "game7", "game8", "game10")


@pytest.fixture(scope="module")
def tennis(tmp_path_factory: pytest.TempPathFactory) -> Footage:
    """The real clips, at the size of thumbnails."""
    pictures: Footage = {}
    root = tmp_path_factory.mktemp("tennis")
    for video in sorted(real("tennis/clips").glob("*.mp4")):
        game, name = video.stem.split("_")
        (root / game / name).mkdir(parents=True)
        (root / game / name / video.name).symlink_to(video)
        os.symlink(real(f"tennis/labels/{game}/{name}/Label.csv"), root / game / name / "Label.csv")
    for clip in read_clips(root, TENNIS, "stop")[0].clips:
        pictures[clip.id] = np.repeat(make_thumbnails(decode_clip(clip, (512, 288)), clip.length)[..., None], 3, axis=-1)
    return pictures


@pytest.mark.slow
def test_no_pairing_of_real_games_is_a_leak(tmp_path: Path, tennis: Footage) -> None:
    for game in TENNIS:
        others = {clip_id: frames for clip_id, frames in tennis.items() if clip_id.split("/")[0] != game}
        assert searched(tmp_path / game, others, of_game(tennis, game))[0] == {}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_real_frames_dealt_to_two_games_are_all_found(tmp_path: Path, tennis: Footage, share: float) -> None:
    rng = np.random.default_rng(1)
    train, val = dealt(tennis, lambda n: rng.permutation(n) < share * n)
    found, beside = searched(tmp_path, train, val)
    assert set(found) == set(val)
    assert sum(map(len, found.values())) + sum(beside.values()) >= 0.995 * sum(map(len, val.values()))

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from clips import (
    blob_centroid,
    blob_picture,
    first_frames_of_real_clip,
    label_rows,
    real,
    real_video_clip,
    write_clip,
    write_labels,
    write_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tracknet.data import cache_key, open_files
from tracknet.data import frames as frames_module
from tracknet.data.background import median_picture
from tracknet.data.decode import decode_clip, read_picture
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore, cache_root
from tracknet.data.index import Clip
from tracknet.errors import DataError, UserError
from tracknet.geometry import resize_points


def only_clip(root: Path, game: str = "game1") -> Clip:
    return read_clips(root, [game], "stop")[0].clips[0]


def all_frames(store: FrameStore, clip: Clip) -> np.ndarray:
    return store.window(clip, 0, clip.length)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("input_wh", [None, (64, 36), (128, 72), (100, 40), (320, 180)])
def test_stored_frames_show_the_ball_where_the_half_pixel_rule_puts_it(
    tmp_path: Path, suffix: str, input_wh: tuple[int, int] | None
) -> None:
    xy_px = write_clip(tmp_path / "game1" / "Clip1", count=5, size_wh=(256, 144), suffix=suffix)
    xy_px[:] = resize_points(xy_px, (256, 144), (256, 144))
    for number, xy in enumerate(xy_px):
        Image.fromarray(blob_picture((256, 144), xy, sigma=4)).save(tmp_path / "game1" / "Clip1" / f"{number:04d}{suffix}", quality=98)
    clip, store = only_clip(tmp_path), FrameStore(tmp_path / "cache", input_wh)
    store.prepare(clip)
    width, height = input_wh or (256, 144)
    assert all_frames(store, clip).shape == (5, height, width, 3)
    expected = resize_points(xy_px, (256, 144), (width, height))
    found = np.array([blob_centroid(picture) for picture in all_frames(store, clip)])
    np.testing.assert_allclose(found, expected, atol=0.08 * max(1.0, width / 256, height / 144))


def test_a_jpeg_that_no_reduction_divides_is_not_shifted(tmp_path: Path) -> None:
    picture, xy = tmp_path / "odd.jpg", np.array([225.0, 120.0])
    Image.fromarray(blob_picture((255, 143), xy, sigma=4)).save(picture, quality=98)
    found = blob_centroid(read_picture(picture, (255, 143), (100, 50)))
    np.testing.assert_allclose(found, resize_points(xy, (255, 143), (100, 50)), atol=0.08)


@pytest.mark.parametrize("input_wh", [None, (128, 72), (100, 40)])
def test_a_video_shows_the_ball_where_the_pictures_do(tmp_path: Path, input_wh: tuple[int, int] | None) -> None:
    xy_px = np.array([[60.0, 40.0], [90.5, 51.25], [200.0, 100.0]])
    write_video(tmp_path / "game1" / "Clip1" / "a.mp4", [blob_picture((256, 144), xy, sigma=4) for xy in xy_px])
    write_labels(tmp_path / "game1" / "Clip1" / "Label.csv", label_rows(xy_px, [1, 1, 1], ".jpg"))
    clip, store = only_clip(tmp_path), FrameStore(tmp_path / "cache", input_wh)
    store.prepare(clip)
    found = np.array([blob_centroid(picture) for picture in all_frames(store, clip)])
    np.testing.assert_allclose(found, resize_points(xy_px, (256, 144), store.size_wh(clip)), atol=0.15)


def test_real_jpegs_decode_as_a_full_decode_and_an_area_resize(tmp_path: Path) -> None:
    clip = only_clip(first_frames_of_real_clip(tmp_path).parents[1])
    for number, picture in enumerate(decode_clip(clip, (512, 288))):
        with Image.open(clip.source / f"{number:04d}.jpg") as image:
            full = np.asarray(image.convert("RGB").resize((512, 288), Image.Resampling.BOX)).astype(int)
        assert np.abs(picture - full).mean() < 2


def test_a_real_clip_decodes_alike_from_video_and_from_jpegs(tmp_path: Path) -> None:
    video = only_clip(real_video_clip(tmp_path).parents[1])
    pictures = list(decode_clip(video, video.size_wh))[:12]
    folder = tmp_path / "as_jpeg" / "game1" / "Clip1"
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:04d}.jpg", quality=95)
    labels = (video.source.parent / "Label.csv").read_text().splitlines()
    write_labels(folder / "Label.csv", labels[1:13], header=labels[0])
    from_video = list(decode_clip(video, (512, 288)))[:12]
    from_jpeg = list(decode_clip(only_clip(tmp_path / "as_jpeg"), (512, 288)))
    for one, other in zip(from_video, from_jpeg, strict=True):
        difference = np.abs(one.astype(int) - other)
        assert difference.mean() < 2
        assert np.percentile(difference, 99) < 20  # the edges of the white lines


def test_real_labels_lie_on_the_ball(tmp_path: Path) -> None:
    """What moves against the background is at the label, and not at the label mirrored or shifted by a few px."""
    index, _ = read_clips(real("tennis_jpeg"), ["game1"], "stop")
    clip, store = index.clips[0], FrameStore(tmp_path, (512, 288))
    clip = Clip(clip.game, clip.name, clip.source, (clip.frame_names or ())[:40], clip.size_wh, 0, 40)
    store.prepare(clip)
    xy = resize_points(index.xy_px[:40], clip.size_wh, (512, 288))
    moving = np.abs(all_frames(store, clip).astype(int) - store.background(clip)).max(axis=-1)

    def at(offset: tuple[float, float]) -> float:
        places = np.rint(xy + np.array(offset)).astype(int)[index.visibility[:40] == 1]
        rows = np.flatnonzero(index.visibility[:40] == 1)
        return float(np.mean(moving[rows, places[:, 1].clip(0, 287), places[:, 0].clip(0, 511)]))

    assert at((0, 0)) > 2 * max(at((8, 0)), at((-8, 0)), at((0, 8)), at((0, -8)))


@given(frames=st.integers(1, 60), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_the_background_is_the_median_of_frames_spread_over_the_clip(frames: int, seed: int) -> None:
    clip = np.random.default_rng(seed).integers(0, 256, (frames, 70, 5, 3), dtype=np.uint8)
    chosen = clip[np.linspace(0, frames - 1, min(frames, 25)).round().astype(int)]
    lower_median = np.sort(chosen, axis=0)[(len(chosen) - 1) // 2]
    np.testing.assert_array_equal(median_picture(clip), lower_median)


def test_the_background_has_no_ball(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", count=15)
    clip, store = only_clip(tmp_path), FrameStore(tmp_path / "cache", None)
    store.prepare(clip)
    assert all_frames(store, clip).max() > 200
    assert (store.background(clip) <= 60).all()


def test_a_clip_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    clip = only_clip(tmp_path)
    FrameStore(tmp_path / "cache", (32, 24)).prepare(clip)
    monkeypatch.setattr(frames_module, "decode_clip", lambda *_: pytest.fail("decoded again"))
    FrameStore(tmp_path / "cache", (32, 24)).prepare(clip)
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        FrameStore(tmp_path / "cache", (48, 24)).prepare(clip)


def test_a_changed_source_is_decoded_afresh(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    clip = only_clip(tmp_path)
    FrameStore(tmp_path / "cache", None).prepare(clip)
    picture = tmp_path / "game1" / "Clip1" / "0003.png"
    Image.new("RGB", (64, 48), (1, 2, 3)).save(picture)
    changed = FrameStore(tmp_path / "cache", None)
    assert not changed.is_prepared(clip)
    changed.prepare(clip)
    assert (all_frames(changed, clip)[3] == (1, 2, 3)).all()
    os.utime(picture, ns=(0, 1))
    assert not FrameStore(tmp_path / "cache", None).is_prepared(clip)


@pytest.mark.parametrize("name", ["CODE_VERSION", "DECODERS"])
def test_other_code_or_decoders_decode_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    clip = only_clip(tmp_path)
    FrameStore(tmp_path / "cache", None).prepare(clip)
    monkeypatch.setattr(cache_key, name, "another")
    assert not FrameStore(tmp_path / "cache", None).is_prepared(clip)


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    clip, store = only_clip(tmp_path), FrameStore(tmp_path / "cache", None)
    store.prepare(clip)
    frames = np.array(all_frames(store, clip))
    for path in (tmp_path / "cache" / "frames").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    again = FrameStore(tmp_path / "cache", None)
    assert not again.is_prepared(clip)
    again.prepare(clip)
    np.testing.assert_array_equal(all_frames(again, clip), frames)


def test_the_store_pickles_small_and_reads_on(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    clip, store = only_clip(tmp_path), FrameStore(tmp_path / "cache", None)
    store.prepare(clip)
    frames = np.array(all_frames(store, clip))
    text = pickle.dumps(store)
    assert len(text) < 2000
    shutil.rmtree(tmp_path / "game1")  # the copy reads the cache, not the source
    np.testing.assert_array_equal(all_frames(pickle.loads(text), clip), frames)


def test_few_file_handles_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "FILES_OPEN", 4)
    store = FrameStore(tmp_path / "cache", None)
    for number in range(12):
        write_clip(tmp_path / f"game{number}" / "Clip1", count=2)
        clip = only_clip(tmp_path, f"game{number}")
        store.prepare(clip)
        all_frames(store, clip)
        store.background(clip)
    handles = [
        os.readlink(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{handle}")
    ]
    assert sum(str(tmp_path) in handle for handle in handles) <= 4


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_picture_is_named_and_leaves_nothing_behind(tmp_path: Path, suffix: str) -> None:
    write_clip(tmp_path / "game1" / "Clip1", size_wh=(256, 144), suffix=suffix)
    picture = tmp_path / "game1" / "Clip1" / f"0005{suffix}"
    picture.write_bytes(picture.read_bytes()[: picture.stat().st_size * 2 // 3])
    for size in (None, (64, 36)):
        with pytest.raises(DataError) as caught:
            FrameStore(tmp_path / "cache", size).prepare(only_clip(tmp_path))
        assert str(picture) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "frames").iterdir()) == []


def test_a_real_truncated_jpeg_is_an_error(tmp_path: Path) -> None:
    whole = real("tennis_jpeg/game1/Clip1/0000.jpg").read_bytes()
    cut = tmp_path / "0000.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"0000\.jpg: unreadable picture \(.*truncated"):
        read_picture(cut, (1280, 720), (512, 288))


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    (tmp_path / "game1" / "Clip1" / "0005.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0005\.png: unreadable picture \(no known picture format\)"):
        FrameStore(tmp_path / "cache", None).prepare(only_clip(tmp_path))


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    Image.new("RGB", (60, 48)).save(tmp_path / "game1" / "Clip1" / "0005.png")
    with pytest.raises(DataError, match=r"0005\.png: is 60x48, but the clip's first picture is 64x48"):
        FrameStore(tmp_path / "cache", (32, 24)).prepare(only_clip(tmp_path))


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", count=2)
    Image.new("L", (64, 48), 77).save(tmp_path / "game1" / "Clip1" / "0000.png")
    Image.new("RGBA", (64, 48), (10, 20, 30, 255)).save(tmp_path / "game1" / "Clip1" / "0001.png")
    first, second = decode_clip(only_clip(tmp_path), (64, 48))
    assert (first == 77).all()
    assert (second == (10, 20, 30)).all()


@pytest.mark.parametrize("labels", [3, 5])
def test_a_video_with_another_number_of_frames_than_labels_is_named(tmp_path: Path, labels: int) -> None:
    xy = np.full((labels, 2), 20.0)
    write_video(tmp_path / "game1" / "Clip1" / "a.mp4", [blob_picture((64, 48), (20, 20))] * 4)
    write_labels(tmp_path / "game1" / "Clip1" / "Label.csv", label_rows(xy, [1] * labels))
    with pytest.raises(DataError, match=rf"a\.mp4: has 4 frames, but its labels are for {labels}"):
        FrameStore(tmp_path / "cache", None).prepare(only_clip(tmp_path))


def test_a_video_cut_short_is_an_error(tmp_path: Path) -> None:
    clip = real_video_clip(tmp_path)
    whole = (clip / "clip.mp4").read_bytes()
    (clip / "clip.mp4").unlink()
    (clip / "clip.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"clip\.mp4"):
        FrameStore(tmp_path / "cache", (64, 36)).prepare(only_clip(tmp_path))


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    with pytest.raises(UserError, match=r"^data\.cache_dir: cannot write .*cache"):
        FrameStore(tmp_path / "cache", None).prepare(only_clip(tmp_path))


def test_a_user_without_a_home_is_told_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("TRACKNET_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UserError, match=r"data\.cache_dir: ~/\.cache/tracknet lies in a home folder .*; set data\.cache_dir=FOLDER"):
        cache_root(None)


def test_the_cache_folder_follows_the_key_then_the_variable_then_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKNET_CACHE_DIR", str(tmp_path / "variable"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root(str(tmp_path / "key")) == tmp_path / "key"
    assert cache_root(None) == tmp_path / "variable"
    monkeypatch.delenv("TRACKNET_CACHE_DIR")
    assert cache_root(None) == tmp_path / "home" / ".cache" / "tracknet"


@pytest.mark.parametrize(("name", "depth", "mode"), [("a.png", np.uint16, "I;16"), ("a.tiff", np.int32, "I"), ("a.tiff", np.float32, "F")])
def test_pictures_of_more_than_eight_bits_are_named(tmp_path: Path, name: str, depth: type[np.generic], mode: str) -> None:
    picture = tmp_path / name
    Image.fromarray(np.full((12, 16), 900, depth)).save(picture)
    with pytest.raises(DataError, match=rf"{picture}: .*mode {mode}; save it with 8 bits"):
        read_picture(picture, (16, 12), (16, 12))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_eight_bit_picture_is_read(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (16, 12), (255, 255, 255)).convert(mode).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", (16, 12), (16, 12)) == 255).all()

"""Videos and folders of pictures as footage: every decodable frame once, in order, upright, in time; bad footage is one clear line."""

import shutil
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from clips import blob_centroid, blob_picture, real
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import SILENT_265, clicks, cut_copy, damaged_copy, decode_count, number_of, numbered, write_numbered

from tracknet.data.decode import _video_frames, read_picture
from tracknet.errors import DataError
from tracknet.inference.source import TimedFrame
from tracknet.inference.video import open_source
from tracknet.inference.video_times import VideoTimes

H264 = {"bf": "3", "g": "12", "crf": "18"}
VP9 = {"cpu-used": "8", "deadline": "realtime"}
CONTAINERS = {
    "clip.mp4": {"options": H264},
    "clip.mov": {"options": H264},
    "clip.mkv": {"options": H264},
    "clip.ts": {"options": H264},
    "h264.avi": {"options": H264},
    "mpeg4.avi": {"codec": "mpeg4"},
    "clip.mpg": {"codec": "mpeg2video"},
    "clip.webm": {"codec": "libvpx-vp9", "options": VP9},
    "clip.h264": {"options": H264, "container": "h264"},
    "clip.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "hevc.mp4": {"codec": "libx265", "options": SILENT_265},
    "odd.mkv": {"size_wh": (853, 479), "pix_fmt": "yuv444p", "options": H264},
    "ten.mkv": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": SILENT_265},
    "sound.mp4": {"sound": "aac", "options": H264},
}


def read(path: Path, size_wh: tuple[int, int] | None = None) -> tuple[list[TimedFrame], list[str]]:
    source = open_source(path)
    return list(source.frames(size_wh)), source.notes


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_source(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_gives_every_frame_once_in_order(tmp_path: Path, name: str) -> None:
    path = write_numbered(tmp_path / name, 30, **CONTAINERS[name])
    source = open_source(path)
    frames = list(source.frames(None))
    assert [frame.number for frame in frames] == list(range(30))
    assert [number_of(frame.picture) for frame in frames] == list(range(30))
    assert len(frames) == decode_count(path)
    assert source.info.name == path.stem
    assert source.info.size_wh == CONTAINERS[name].get("size_wh", (160, 96))
    assert source.info.fps == pytest.approx(25)
    assert all(frame.original_wh == source.info.size_wh for frame in frames)
    assert all(frame.picture.shape == (source.info.size_wh[1], source.info.size_wh[0], 3) for frame in frames)
    assert np.diff([frame.time_s for frame in frames]).min() > 0
    if name == "h264.avi":  # keeps no times of presentation
        np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(30) / 25, atol=0.041)
        assert len(source.notes) == 1
    else:
        np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(30) / 25, atol=0.0011)
        assert source.notes == (["30 of 30 frames have no time stamp; their times follow the frame rate"] if name == "clip.h264" else [])


def test_reading_again_from_a_later_frame_gives_the_rest(tmp_path: Path) -> None:
    source = open_source(write_numbered(tmp_path / "clip.mp4", 30, options=H264))
    whole, rest = list(source.frames((64, 48))), list(source.frames((64, 48), first=17))
    assert [(frame.number, frame.time_s) for frame in rest] == [(frame.number, frame.time_s) for frame in whole[17:]]
    assert all(np.array_equal(one.picture, other.picture) for one, other in zip(rest, whole[17:], strict=True))


@pytest.mark.parametrize("size_wh", [(512, 288), (1280, 720), (1536, 864)])
def test_a_real_clip_gives_the_pixels_of_training_and_evaluation(size_wh: tuple[int, int]) -> None:
    path = real("tennis/clips/game8_Clip1.mp4")
    frames = open_source(path).frames(size_wh)
    count = 0
    for expected, frame in zip(_video_frames(path, (1280, 720), size_wh), frames, strict=size_wh == (512, 288)):
        assert np.array_equal(frame.picture, expected)
        count += 1
        if size_wh != (512, 288) and count == 10:
            break
    assert count == (118 if size_wh == (512, 288) else 10)


@pytest.mark.parametrize(("size_wh", "way"), [((80, 48), "AREA"), ((320, 192), "BILINEAR")])
def test_scaling_is_that_of_swscale_in_one_step(tmp_path: Path, size_wh: tuple[int, int], way: str) -> None:
    """Caches of decoded frames hold these pixels; whoever changes them raises `cache_key.CODE_VERSION`."""
    path = write_numbered(tmp_path / "clip.mp4", 2)
    frame = read(path, size_wh)[0][1]
    with av.open(str(path)) as container:
        expected = list(container.decode(video=0))[1].reformat(*size_wh, format="bgr24", interpolation=way).to_ndarray()
    assert np.array_equal(frame.picture, expected[..., ::-1])


@pytest.mark.parametrize("colour", [None, {"colorspace": 1, "color_primaries": 1, "color_trc": 1}, {"colorspace": 5}])
def test_tagged_colours_give_the_pixels_of_evaluation(tmp_path: Path, colour: dict[str, int] | None) -> None:
    path = write_numbered(tmp_path / "clip.mp4", 3, colour=colour)
    frames, _ = read(path, (80, 48))
    expected = list(_video_frames(path, (160, 96), (80, 48)))
    assert all(np.array_equal(frame.picture, other) for frame, other in zip(frames, expected, strict=True))


def test_a_real_folder_gives_the_pixels_and_the_order_of_the_data_set() -> None:
    folder = real("tennis_jpeg/game1/Clip1")
    source = open_source(folder)
    paths = sorted(folder.glob("*.jpg"))[:40]
    for path, frame in zip(paths, source.frames((512, 288)), strict=False):
        assert np.array_equal(frame.picture, read_picture(path, (1280, 720), (512, 288)))
    assert (source.info.name, source.info.size_wh, source.info.fps) == ("Clip1", (1280, 720), None)


@pytest.mark.parametrize("rotation", [90, -90, 180])
@pytest.mark.parametrize("mirror_x", [False, True])
def test_a_rotated_video_comes_upright(tmp_path: Path, rotation: int, mirror_x: bool) -> None:
    """`rotation` is counter-clockwise, as PyAV says it; the mirror comes after it."""
    path = write_numbered(tmp_path / "clip.mp4", 4, first=0b1011001110, rotation=rotation, mirror_x=mirror_x, options={"crf": "4"})
    source = open_source(path)
    frames = list(source.frames((96, 160) if abs(rotation) == 90 else (160, 96)))
    stored = numbered(0b1011001110)
    shown = np.rot90(stored, rotation // 90)[:, :: -1 if mirror_x else 1]
    assert source.info.size_wh == (shown.shape[1], shown.shape[0]) == frames[0].original_wh
    assert np.abs(frames[0].picture.astype(int) - shown).mean() < 6
    assert source.notes == []
    if not mirror_x:
        with av.open(str(path)) as container:
            assert (next(container.decode(video=0)).rotation - rotation) % 360 == 0
    small = next(source.frames((40, 60)))
    assert small.picture.shape == (60, 40, 3)


def test_a_crooked_angle_is_said(tmp_path: Path) -> None:
    frames, notes = read(write_numbered(tmp_path / "clip.mp4", 4, rotation=20))
    assert [number_of(frame.picture) for frame in frames] == [0, 1, 2, 3]
    assert len(notes) == 1
    assert "multiple of 90" in notes[0]


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
def test_variable_frame_rate_gives_the_files_times(tmp_path: Path, name: str) -> None:
    times_ms = [0, 40, 100, 110, 300, 340, 1900, 1940]
    frames, notes = read(write_numbered(tmp_path / name, 8, times_ms=times_ms, options=H264))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.array(times_ms) / 1000, atol=0.0011)
    assert [number_of(frame.picture) for frame in frames] == list(range(8))
    assert notes == []


def frame_at(pts: int | None, dts: int | None = None) -> av.VideoFrame:
    frame = av.VideoFrame(16, 16)
    frame.pts, frame.time_base = pts, Fraction(1, 100)
    if dts is not None:
        frame.dts = dts
    return frame


def times_of(stamps: list[int | None], fps: float | None = 25) -> tuple[list[float], VideoTimes]:
    times = VideoTimes(fps)
    return [times.next(frame_at(stamp)) for stamp in stamps], times


def test_times_of_stamps_that_lack_or_go_back() -> None:
    times, counts = times_of([500, 504, None, 512, 510, 516])
    np.testing.assert_allclose(times, [0, 0.04, 0.08, 0.12, 0.14, 0.16])
    assert (counts.missing, counts.backwards) == (1, 1)
    joined, counts = times_of([500, 504, 508, 0, 4, 8])
    np.testing.assert_allclose(joined, [0, 0.04, 0.08, 0.12, 0.16, 0.20])
    assert counts.backwards == 1
    assert np.isnan(times_of([None, None], fps=None)[0]).all()


def test_stamps_that_rise_from_a_small_step_back_are_a_new_recording() -> None:
    """0.8 s and 0.8 s; one wrong stamp ahead, and one behind, are none."""
    part = [500 + 4 * number for number in range(20)]
    joined, _ = times_of([*part, *part])
    np.testing.assert_allclose(joined[23:], np.arange(23, 40) / 25, atol=1e-9)
    for wrong in (530, 470):
        mended, _ = times_of([*part[:5], wrong, *part[6:]])
        np.testing.assert_allclose(mended[9:], np.arange(9, 20) / 25, atol=1e-9)


def test_short_transport_streams_end_to_end_keep_their_pace(tmp_path: Path) -> None:
    path, later = (write_numbered(tmp_path / f"{first}.ts", 20, first=first, options=H264) for first in (0, 20))
    path.write_bytes(path.read_bytes() + later.read_bytes())
    frames, _ = read(path)
    assert [number_of(frame.picture) for frame in frames] == list(range(40))
    np.testing.assert_allclose([frame.time_s for frame in frames][24:], np.arange(24, 40) / 25, atol=0.011)


@pytest.mark.parametrize(
    "whole",
    [
        {"count": 10, "times_ms": [100_000 + 40 * number for number in range(10)]},
        {"count": 4, "fps": Fraction(1, 10)},
        {"count": 10, "sound": "flac", "sound_s": 3.5},
    ],
    ids=["stamps from 100 s", "a frame in 10 s", "longer sound"],
)
def test_a_whole_file_is_not_said_to_break_off(tmp_path: Path, whole: dict[str, Any]) -> None:
    assert read(write_numbered(tmp_path / "clip.mkv", **whole))[1] == []


@given(st.lists(st.one_of(st.none(), st.integers(-(10**6), 10**6)), min_size=1, max_size=60))
def test_times_always_rise_from_zero(stamps: list[int | None]) -> None:
    times, _ = times_of(stamps)
    assert times[0] == 0
    assert (np.diff(times) > 0).all()


@pytest.mark.parametrize("container", ["mp4", "ts", "mkv", "avi"])
def test_noise_anywhere_costs_no_frame_that_a_serial_decoder_finds(tmp_path: Path, container: str) -> None:
    whole = write_numbered(tmp_path / f"clip.{container}", 60, size_wh=(320, 192), options=H264).read_bytes()

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
    @given(st.floats(0.15, 0.98), st.integers(1, 1500), st.integers(0, 99))
    def check(place: float, length: int, seed: int) -> None:
        path, data, start = tmp_path / f"noise.{container}", bytearray(whole), int(place * len(whole))
        noise = np.random.default_rng(seed).integers(0, 256, length, np.uint8).tobytes()
        data[start : start + length] = noise
        path.write_bytes(data[: len(whole)])
        try:
            source = open_source(path)
        except DataError:  # the noise hit what is needed to open the file
            return
        frames = list(source.frames((64, 48)))
        assert [frame.number for frame in frames] == list(range(decode_count(path)))
        assert len(source.notes) <= 6

    check()


@pytest.mark.parametrize("packets", [[5], [5, 6, 20, 40], [56], [59]])
def test_damaged_packets_cost_only_themselves(tmp_path: Path, packets: list[int]) -> None:
    path = damaged_copy(write_numbered(tmp_path / "clip.mp4", 60, size_wh=(320, 192), options=H264), packets)
    frames, notes = read(path)
    assert len(frames) == decode_count(path) == 60 - len(packets)
    assert frames[-1].time_s > 2.2
    assert len(notes) == 2
    assert notes[1] == f"the header reports 60 frames, {60 - len(packets)} were decoded"
    word = "breaks off" if packets == [59] else "1 packet" if len(packets) == 1 else f"{len(packets)} packets"
    assert notes[0].startswith(word)


@pytest.mark.parametrize(
    ("name", "note"),
    [("clip.mp4", "header reports 120 frames"), ("clip.ts", "breaks off: the file ends amid"), ("clip.mkv", "header reports 4.8 s")],
)
def test_a_file_that_breaks_off_gives_what_was_decoded(tmp_path: Path, name: str, note: str) -> None:
    options = {"movflags": "faststart"} if name == "clip.mp4" else None
    whole = write_numbered(tmp_path / name, 120, size_wh=(320, 192), options=H264, container_options=options)
    path = cut_copy(whole, 0.6)
    frames, notes = read(path)
    assert 30 < len(frames) == decode_count(path) < 110
    assert [number_of(frame.picture) for frame in frames][:-4] == list(range(len(frames) - 4))
    assert any(note in line for line in notes)
    assert len(notes) <= 2


def test_a_header_that_reports_too_few_frames(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "clip.avi", 30, codec="mpeg4")
    data = path.read_bytes()
    assert data.count((30).to_bytes(4, "little")) >= 2
    for claim in (12, 500):
        place = data.index(b"strh") + 8 + 32  # dwLength of the stream's header
        path.write_bytes(data[:place] + claim.to_bytes(4, "little") + data[place + 4 :])
        source = open_source(path)
        assert source.info.frame_count_reported == claim
        assert [number_of(frame.picture) for frame in source.frames(None)] == list(range(30))
        assert source.notes == [f"the header reports {claim} frames, 30 were decoded"]


@pytest.mark.parametrize(("name", "container"), [("clip.ts", None), ("clip.h264", "h264")])
def test_a_resolution_that_changes_gives_each_frame_its_own_size(tmp_path: Path, name: str, container: str | None) -> None:
    path, later = tmp_path / name, tmp_path / f"later_{name}"
    write_numbered(path, 30, options=H264, container=container)
    write_numbered(later, 30, first=30, size_wh=(320, 192), options=H264, container=container)
    path.write_bytes(path.read_bytes() + later.read_bytes())
    frames, notes = read(path)
    assert [number_of(frame.picture) for frame in frames] == list(range(60))
    assert [frame.original_wh for frame in frames] == [(160, 96)] * 30 + [(320, 192)] * 30
    assert all(frame.picture.shape[1::-1] == frame.original_wh for frame in frames)
    assert sum("from 160x96 to 320x192 at frame 30" in line for line in notes) == 1
    resized, _ = read(path, (80, 48))
    assert all(frame.picture.shape == (48, 80, 3) for frame in resized)
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(60) / 25, atol=0.011)


def test_high_dynamic_range_and_interlaced_are_said(tmp_path: Path) -> None:
    pq = {"color_trc": 16, "color_primaries": 9, "colorspace": 9}
    hdr = write_numbered(tmp_path / "hdr.mp4", 5, codec="libx265", pix_fmt="yuv420p10le", colour=pq, options=SILENT_265)
    frames, notes = read(hdr)
    assert [number_of(frame.picture) for frame in frames] == list(range(5))
    assert [line.split(":")[0] for line in notes] == ["high dynamic range (PQ)"]
    _, notes = read(write_numbered(tmp_path / "fields.mpg", 5, codec="mpeg2video", options={"flags": "+ilme+ildct"}))
    assert notes == ["5 of 5 frames are interlaced; both fields stay in one picture, a fast ball shows twice"]


def test_frames_flagged_as_damaged_are_kept_and_counted(tmp_path: Path) -> None:
    whole = write_numbered(tmp_path / "clip.avi", 120, size_wh=(640, 360), options=H264)
    path = cut_copy(whole, 0.5)
    frames, notes = read(path)
    assert len(frames) == decode_count(path)
    assert sum("are damaged, the first is frame" in line for line in notes) == 1


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    cover = tmp_path / "cover.png"
    Image.fromarray(numbered(77)).save(cover)
    both, only = tmp_path / "both.mkv", tmp_path / "only.mp3"
    clip = write_numbered(tmp_path / "clip.mp4", 5)
    with av.open(str(cover)) as picture, av.open(str(clip)) as video, av.open(str(both), "w", format="mp4") as output:
        still, moving = (output.add_stream_from_template(one.streams.video[0]) for one in (picture, video))
        still.disposition = av.stream.Disposition.attached_pic
        for source, target in ((picture, still), (video, moving)):
            for packet in source.demux(source.streams.video[0]):
                if packet.size:
                    packet.stream = target
                    output.mux(packet)
    with av.open(str(both)) as container:
        assert len(container.streams.video) == 2
    frames, _ = read(both)
    assert [number_of(frame.picture) for frame in frames] == [0, 1, 2, 3, 4]
    with av.open(str(cover)) as picture, av.open(str(only), "w") as output:
        track, still = output.add_stream("libmp3lame", rate=48000), output.add_stream_from_template(picture.streams.video[0])
        still.disposition = av.stream.Disposition.attached_pic
        for packet in picture.demux():
            if packet.size:
                packet.stream = still
                output.mux(packet)
        for frame in clicks(1):
            output.mux(track.encode(frame))
        output.mux(track.encode())
    assert refusal(only).endswith("holds no video, only a cover picture and audio")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("this is no video\n" * 500)


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes())


def head_only(path: Path) -> None:
    write_numbered(path.with_suffix(".whole.mp4"), 30)
    path.write_bytes(path.with_suffix(".whole.mp4").read_bytes()[:600])


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("empty.mp4", empty, "is empty"),
        ("text.mp4", text, "no video that can be read (Invalid data"),
        ("text.txt", text, "a text file"),
        ("noise.mp4", noise, "no video"),
        ("head.mp4", head_only, "no video that can be read"),
        ("absent.mp4", lambda path: None, "no such file or folder"),
        ("folder", Path.mkdir, "a folder without pictures"),
        ("newline\n.mp4", text, "no video"),
    ],
)
def test_what_is_no_footage_is_refused_in_one_line(tmp_path: Path, name: str, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / name
    make(path)
    if "\n" in name:
        with pytest.raises(DataError) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)
    else:
        assert reason in refusal(path)


def test_a_colon_in_the_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(write_numbered(tmp_path / "clip.mp4", 5), tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read(Path("12:30.mp4"))[0]) == 5


def test_a_folder_with_a_broken_picture_and_another_size(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(12):
        size_wh = (320, 192) if number == 9 else (160, 96)
        Image.fromarray(numbered(number, size_wh)).save(folder / f"frame{number}.png")
    (folder / "frame4.png").write_bytes((folder / "frame4.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    (folder / "._frame3.png").write_text("no picture")
    source = open_source(folder)
    frames = list(source.frames((80, 48)))
    assert source.info.frame_count_reported == 12
    assert [frame.number for frame in frames] == list(range(11))
    assert [number_of(frame.picture) for frame in frames] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert frames[8].original_wh == (320, 192)
    assert len(source.notes) == 2
    assert "frame4.png" in source.notes[0]
    assert "frame9.png" in source.notes[1]
    again = list(source.frames((80, 48), first=6))
    assert [frame.number for frame in again] == [6, 7, 8, 9, 10]
    assert len(source.notes) == 2


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "clip.mp4", 900, size_wh=(640, 360), options={"preset": "ultrafast"})
    tracemalloc.start()
    process, sizes, traced = psutil.Process(), [], []
    for frame in open_source(path).frames((512, 288)):
        if frame.number in (200, 899):
            sizes.append(process.memory_info().rss)
            traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 60e6  # 700 frames are 310 MB; the allocator keeps some of what other tests used
    assert traced[1] - traced[0] < 100_000


def test_blob_position_survives_scaling_of_odd_sizes(tmp_path: Path) -> None:
    """x of the input maps back to the original by (x + 0.5) * W / w - 0.5, also for odd sizes."""
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 853, 479, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(blob_picture((853, 479), (600.0, 301.0), 6.0), format="rgb24")))
        container.mux(stream.encode())
    frame = next(open_source(path).frames((512, 288)))
    xy = (blob_centroid(frame.picture) + 0.5) * np.array([853 / 512, 479 / 288]) - 0.5
    np.testing.assert_allclose(xy, [600, 301], atol=0.3)

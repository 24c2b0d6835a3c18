"""The overlay: every frame at its time with the ball drawn, sound in sync, playable in a browser, whole or not at all."""

import csv
import http.server
import json
import shutil
import subprocess
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import real
from numpy.typing import NDArray
from PIL import Image
from video_files import SILENT_265, cut_copy, number_of, numbered, write_numbered

from tracknet.data.decode import Frame
from tracknet.errors import UserError
from tracknet.inference.overlay import write_overlay
from tracknet.inference.track import BallTrack
from tracknet.inference.trail import DETECTED_RGB, INTERPOLATED_RGB, BallPainter
from tracknet.inference.video import open_source

CHROMIUM = shutil.which("chromium")
H264 = {"bf": "3", "g": "12", "crf": "18"}


def track_of(xy: list[tuple[float, float] | None], interpolated: tuple[int, ...] = (), size_wh: tuple[int, int] = (160, 96)) -> BallTrack:
    count = len(xy)
    visible = np.array([place is not None for place in xy], bool)
    places = np.array([place or (np.nan, np.nan) for place in xy]).reshape(count, 2)
    source = np.array(["" if not seen else "interpolated" if row in interpolated else "detected" for row, seen in enumerate(visible)])
    score = np.where(visible, 0.9, np.nan)
    return BallTrack(np.arange(count), np.arange(count) / 25, visible, places[:, 0], places[:, 1], score, source, 25.0, size_wh)


def nothing(count: int) -> BallTrack:
    return track_of([None] * count)


def near(picture: Frame, colour: tuple[int, int, int], tolerance: int = 40) -> NDArray[np.bool_]:
    """(H, W): where the picture has about this colour."""
    return np.asarray(np.abs(picture.astype(int) - colour).max(axis=-1) <= tolerance)


def frames_of(path: Path) -> list[tuple[float, Frame]]:
    """Times on the file's clock and pictures of an overlay, after checks that hold for all of them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        found = [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert sorted(path.parent.glob(f"{path.name}*")) == [path]
    return found


def clicks_of(path: Path, thinnest_s: float = 0.01) -> list[float]:
    """When the tones of `video_files.clicks` start, seconds on the file's clock."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=48000)
        starts: list[float] = []
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                loud = np.flatnonzero(np.abs(piece.to_ndarray()[0]) > 0.2)
                starts += [float(piece.time or 0) + sample / 48000 for sample in loud]
    return [start for before, start in zip([-9.0, *starts], starts, strict=False) if start - before > 0.5]


def test_a_real_clip_with_its_labels_as_track(tmp_path: Path) -> None:
    video, labels = real("tennis/clips/game8_Clip1.mp4"), real("tennis/labels/game8/Clip1/Label.csv")
    with labels.open() as file:
        rows = list(csv.DictReader(file))
    xy = [(float(row["x-coordinate"]), float(row["y-coordinate"])) if row["visibility"] != "0" else None for row in rows]
    track, out = track_of(xy, interpolated=tuple(range(30, 36)), size_wh=(1280, 720)), tmp_path / "new" / "overlay.mp4"
    assert write_overlay(video, track, out) == []
    drawn, plain = frames_of(out), list(open_source(video).frames(None))
    assert len(drawn) == len(plain) == len(track)
    np.testing.assert_allclose([time_s for time_s, _ in drawn], [frame.time_s for frame in plain], atol=1e-4)
    for row in (0, 12, 33, 60, 90, 117):
        picture, place = drawn[row][1], xy[row]
        ring = near(picture, INTERPOLATED_RGB if row == 33 else DETECTED_RGB, 70)
        assert place is not None
        x, y = round(place[0]), round(place[1])
        assert ring[max(y - 12, 0) : y + 13, max(x - 12, 0) : x + 13].sum() > 15, row
        far = np.ones(ring.shape, bool)
        far[:, max(x - 300, 0) : x + 300] = False
        assert np.abs(picture.astype(int) - plain[row].picture)[far].mean() < 5


def test_order_and_times_are_kept_with_a_variable_frame_rate(tmp_path: Path) -> None:
    times_ms = [0, 40, 100, 110, 300, 340, 1900, 1940]
    video, out = write_numbered(tmp_path / "clip.mkv", 8, times_ms=times_ms, options=H264), tmp_path / "o.mp4"
    assert write_overlay(video, nothing(8), out) == []
    found = frames_of(out)
    np.testing.assert_allclose([time_s for time_s, _ in found], np.array(times_ms) / 1000, atol=0.0011)
    assert [number_of(picture) for _, picture in found] == list(range(8))
    with av.open(str(out)) as container:
        assert container.duration > 1_960_000  # the last frame is shown as well


@pytest.mark.parametrize(
    ("name", "sound", "codec", "kept"),
    [
        ("clip.mp4", "aac", "libx264", "aac"),
        ("clip.ts", "aac", "libx264", "aac"),
        ("clip.mkv", "libmp3lame", "libx264", "mp3"),
        ("clip.webm", "libopus", "libvpx-vp9", "opus"),
        ("clip.mkv", "flac", "libx264", "flac"),
        ("clip.avi", "pcm_s16le", "mpeg4", "aac"),
        ("clip.mov", "pcm_s16le", "libx264", "aac"),
        ("clip.mkv", "ac3", "libx264", "aac"),
        ("clip.mpg", "mp2", "mpeg2video", "aac"),
        ("low.mkv", "libmp3lame", "mpeg4", "aac"),
    ],
)
def test_sound_is_kept_in_sync(tmp_path: Path, name: str, sound: str, codec: str, kept: str) -> None:
    options = {"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else {}
    rate = 8000 if name == "low.mkv" else 48000
    video = write_numbered(tmp_path / name, 75, codec=codec, sound=sound, sound_rate=rate, options=options)
    out = tmp_path / "o.mp4"
    assert write_overlay(video, nothing(75), out) == []
    found = frames_of(out)
    assert [number_of(picture) for _, picture in found] == list(range(75))
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == kept
        assert container.streams.audio[0].codec_context.channels == 2
    start_s = open_source(video).start_s
    np.testing.assert_allclose(clicks_of(out), np.array(clicks_of(video)) - start_s, atol=0.012)
    assert len(clicks_of(out)) == 3
    np.testing.assert_allclose(clicks_of(out), [0, 1, 2], atol=0.06)


def test_sound_stays_in_sync_where_the_first_pictures_cannot_be_decoded(tmp_path: Path) -> None:
    video, out = (
        write_numbered(tmp_path / "clip.ts", 125, size_wh=(320, 192), sound="aac", options={"g": "50", "bf": "0"}),
        tmp_path / "o.mp4",
    )
    with av.open(str(video)) as container:
        first_packets = [packet.pos for packet in container.demux(video=0) if packet.size][:50]
    data = bytearray(video.read_bytes())
    sound_before = clicks_of(video)
    for start in first_packets:  # the identity of their packets becomes that of none
        data[start + 1], data[start + 2] = data[start + 1] | 0x1F, 0xF0
    video.write_bytes(data)
    write_overlay(video, nothing(125), out)
    source, found = open_source(video), frames_of(out)
    first = number_of(found[0][1])
    assert 50 <= first < 75
    expected = [at - source.start_s for at in sound_before if at > source.start_s]
    np.testing.assert_allclose(clicks_of(out), expected, atol=0.012)
    np.testing.assert_allclose((np.array(expected) + first / 25)[-2:], [3, 4], atol=0.06)


@pytest.mark.parametrize(("size_wh", "rotation", "expected"), [((853, 479), 0, (854, 480)), ((160, 95), 90, (96, 160))])
def test_odd_sizes_grow_by_one_px_and_rotation_is_applied(
    tmp_path: Path, size_wh: tuple[int, int], rotation: int, expected: tuple[int, int]
) -> None:
    options = {"crf": "8"}
    video = write_numbered(tmp_path / "clip.mp4", 3, first=700, size_wh=size_wh, pix_fmt="yuv444p", rotation=rotation, options=options)
    write_overlay(video, nothing(3), tmp_path / "o.mp4")
    picture = frames_of(tmp_path / "o.mp4")[0][1]
    assert picture.shape[1::-1] == expected
    upright = np.rot90(numbered(700, size_wh), rotation // 90)
    height, width = upright.shape[:2]
    assert np.abs(picture[:height, :width].astype(int) - upright).mean() < 6
    assert np.abs(picture[-1, :width].astype(int) - upright[-1]).mean() < 12


@pytest.mark.parametrize("colour", [None, {"colorspace": 1, "color_primaries": 1, "color_trc": 1}])
def test_colours_stay(tmp_path: Path, colour: dict[str, int] | None) -> None:
    """What the network saw as RGB is what a player shows."""
    video = write_numbered(tmp_path / "clip.mp4", 2, colour=colour)
    with av.open(str(tmp_path / "red.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for key, value in (colour or {}).items():
            setattr(stream.codec_context, key, value)
        picture = np.zeros((96, 160, 3), np.uint8)
        picture[:, :80], picture[:, 80:] = (200, 40, 40), (30, 180, 60)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    write_overlay(tmp_path / "red.mp4", nothing(1), tmp_path / "o.mp4")
    seen = next(open_source(tmp_path / "red.mp4").frames(None)).picture
    with av.open(str(tmp_path / "o.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)
    shown = next(open_source(tmp_path / "o.mp4").frames(None)).picture
    assert np.abs(shown.astype(int) - seen).mean() < 3
    assert video.exists()


def test_a_resolution_that_changes_keeps_one_size_and_moves_the_ball_along(tmp_path: Path) -> None:
    video, later = tmp_path / "clip.ts", tmp_path / "later.ts"
    write_numbered(video, 30, options=H264)
    write_numbered(later, 30, first=30, size_wh=(320, 192), options=H264)
    video.write_bytes(video.read_bytes() + later.read_bytes())
    notes = write_overlay(video, track_of([(140, 84)] * 30 + [(280, 168)] * 30), tmp_path / "o.mp4")
    found = frames_of(tmp_path / "o.mp4")
    assert [number_of(picture) for _, picture in found] == list(range(60))
    assert {picture.shape for _, picture in found} == {(96, 160, 3)}
    for _, picture in (found[10], found[50]):
        assert near(picture, DETECTED_RGB, 90)[74:95, 130:151].sum() > 10
    assert any("resolution" in line for line in notes)


def test_a_folder_of_pictures_plays_at_the_tracks_rate(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(10):
        Image.fromarray(numbered(number)).save(folder / f"{number:04d}.png")
    write_overlay(folder, track_of([(140.0, 84.0)] * 10), tmp_path / "o.mp4")
    found = frames_of(tmp_path / "o.mp4")
    np.testing.assert_allclose([time_s for time_s, _ in found], np.arange(10) / 25, atol=1e-4)
    assert near(found[3][1], DETECTED_RGB, 90).sum() > 10


def test_deep_colour_and_a_broken_end(tmp_path: Path) -> None:
    deep = write_numbered(tmp_path / "ten.mkv", 5, codec="libx265", pix_fmt="yuv420p10le", options=SILENT_265)
    write_overlay(deep, nothing(5), tmp_path / "o.mp4")
    assert [number_of(picture) for _, picture in frames_of(tmp_path / "o.mp4")] == list(range(5))
    options = {"movflags": "faststart"}
    broken = cut_copy(write_numbered(tmp_path / "c.mp4", 120, size_wh=(320, 192), options=H264, container_options=options), 0.6)
    notes = write_overlay(broken, nothing(120), tmp_path / "p.mp4")
    assert len(frames_of(tmp_path / "p.mp4")) == sum(1 for _ in open_source(broken).frames((16, 16)))
    assert notes


def painted(track: BallTrack, last: int, step_s: float = 0.04, size_wh: tuple[int, int] = (640, 360)) -> Frame:
    painter = BallPainter(track, size_wh)
    for number in range(last + 1):
        picture = np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
        painter.draw(picture, number, number * step_s, size_wh)
    return picture


def test_the_trail_fades_and_ends_after_half_a_second() -> None:
    track = track_of([(20.0 + 20 * row, 180.0) for row in range(30)])
    brightness = painted(track, 29)[180, :, 0].astype(int)
    assert brightness[:580].max() > 100
    assert (brightness[: 20 + 20 * (29 - 14)] == 0).all()
    along = brightness[360:560]
    assert (np.diff(along) >= 0).all()
    assert along[-1] > along[0] + 80


@pytest.mark.parametrize("gap", ["not seen", "cut", "no row"])
def test_the_trail_crosses_no_gap_and_no_cut(gap: str) -> None:
    xy: list[tuple[float, float] | None] = [(100.0 + 4 * row, 180.0) for row in range(5)]
    xy += [None] * 2 if gap == "not seen" else []
    start = 500.0 if gap == "cut" else 200.0
    xy += [(start + 4 * row, 180.0) for row in range(5)]
    track = track_of(xy)
    if gap == "no row":
        keep = np.array([0, 1, 2, 3, 4, 7, 8, 9])
        parts = {name: getattr(track, name)[keep] for name in ("frame", "time_s", "visible", "x", "y", "score", "source")}
        track = BallTrack(**parts, fps=25.0, size_wh=(640, 360))
    picture = painted(track, len(xy) - 1)
    between = picture[:, 125:190] if gap != "cut" else picture[:, 125:480]
    assert between.max() == 0
    assert picture[180, 100:112].max() > 0


def test_an_interpolated_ball_looks_different_and_no_ball_draws_nothing() -> None:
    seen, filled = (painted(track_of([(320.0, 180.0)], interpolated=rows), 0) for rows in ((), (0,)))
    assert near(seen, DETECTED_RGB).sum() > 20
    assert near(seen, INTERPOLATED_RGB).sum() == 0
    assert near(filled, INTERPOLATED_RGB, 80).sum() > 10
    assert near(filled, DETECTED_RGB).sum() == 0
    assert painted(nothing(3), 2).max() == 0
    rows, columns = np.nonzero(seen.max(axis=-1) > 0)
    np.testing.assert_allclose([columns.mean(), rows.mean()], [320, 180], atol=0.3)


def test_a_ball_outside_or_at_the_edge_of_the_picture_is_no_error() -> None:
    painted(track_of([(-50.0, -50.0), (-20.0, -30.0), (0.0, 0.0), (639.0, 359.0), (900.0, 700.0)]), 4)


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    video = write_numbered(tmp_path / "clip.mp4", 40, size_wh=(640, 360))
    noise = np.random.default_rng(0)
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "20", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for _ in range(40):
            picture = noise.integers(0, 256, (360, 640, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(UserError) as caught:
        write_overlay(video, nothing(40), small_disk / "o.mp4")
    assert "\n" not in str(caught.value)
    assert "o.mp4: the overlay cannot be written (No space left on device)" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_place_that_cannot_be_written_and_the_footage_itself_are_refused(tmp_path: Path) -> None:
    video = write_numbered(tmp_path / "clip.mp4", 5)
    before = video.read_bytes()
    for out in (video, tmp_path / "clip.mp4" / "o.mp4", tmp_path):
        with pytest.raises(UserError) as caught:
            write_overlay(video, nothing(5), out)
        assert "\n" not in str(caught.value)
    assert video.read_bytes() == before
    assert list(tmp_path.iterdir()) == [video]
    (tmp_path / "old.mp4").write_text("replaced when the new one is whole")
    write_overlay(video, nothing(5), tmp_path / "old.mp4")
    assert len(frames_of(tmp_path / "old.mp4")) == 5


PAGE = """<video muted></video><script>
const video = document.querySelector("video"), told = [], names = NAMES;
let events = [];
const next = () => { if (names.length) { events = []; video.src = names.shift(); }
  else fetch("/result", {method: "POST", body: JSON.stringify(told)}); };
const tell = () => { told.push({events, state: video.readyState, seconds: video.duration, size: [video.videoWidth, video.videoHeight],
  heard: video.webkitAudioDecodedByteCount, error: video.error && video.error.message}); next(); };
video.addEventListener("canplaythrough", () => { if (!events.length) { events.push("canplaythrough"); video.play(); } });
for (const name of ["ended", "error"]) video.addEventListener(name, () => { events.push(name); tell(); });
next();
</script>"""


def played(folder: Path, names: list[str]) -> list[dict[str, object]]:
    """What headless Chromium says of each of these videos once it has played it to its end."""
    told: list[dict[str, object]] = []
    done = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type, misc]

        def do_POST(self) -> None:
            told.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *args: object) -> None:
            pass

    (folder / "page.html").write_text(PAGE.replace("NAMES", json.dumps(names)))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
        command += [f"--user-data-dir={folder / 'profile'}", f"http://127.0.0.1:{server.server_port}/page.html"]
        command.insert(-1, "--remote-debugging-port=0")  # keeps it running
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                assert done.wait(60), "Chromium said nothing"
            finally:
                browser.terminate()
                server.shutdown()
    return told


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to play the overlay")
def test_a_browser_plays_it_to_the_end(tmp_path: Path) -> None:
    copied = write_numbered(tmp_path / "clip.ts", 20, size_wh=(320, 192), sound="aac", options=H264)
    made_anew = write_numbered(tmp_path / "clip.mkv", 20, size_wh=(853, 479), codec="mpeg4", sound="ac3")
    uneven = write_numbered(tmp_path / "uneven.mkv", 6, times_ms=[0, 40, 100, 110, 700, 800])
    for name, video in (("a.mp4", copied), ("b.mp4", made_anew), ("c.mp4", uneven)):
        write_overlay(video, track_of([(50.0, 50.0)] * 20), tmp_path / name)
    told = played(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    assert [one["error"] for one in told] == [None] * 3
    assert all(one["events"] == ["canplaythrough", "ended"] for one in told)
    assert [one["size"] for one in told] == [[320, 192], [854, 480], [160, 96]]
    np.testing.assert_allclose([one["seconds"] for one in told], [0.8, 0.8, 0.84], atol=0.05)
    assert [one["heard"] > 0 for one in told] == [True, True, False]


def test_sound_that_is_longer_than_the_pictures_is_kept_whole(tmp_path: Path) -> None:
    video = write_numbered(tmp_path / "clip.mkv", 10, sound="flac", sound_s=3.5)
    write_overlay(video, nothing(10), tmp_path / "o.mp4")
    np.testing.assert_allclose(clicks_of(tmp_path / "o.mp4"), [0, 1, 2, 3], atol=0.012)


def test_short_transport_streams_end_to_end_keep_their_sound(tmp_path: Path) -> None:
    video = write_numbered(tmp_path / "clip.ts", 20, sound="aac", options=H264)
    video.write_bytes(2 * video.read_bytes())
    write_overlay(video, nothing(40), tmp_path / "o.mp4")
    with av.open(str(tmp_path / "o.mp4")) as container:
        heard = [float(packet.pts * packet.time_base) for packet in container.demux(audio=0) if packet.size]
    assert len(heard) >= 70
    assert 1.45 < heard[-1] < 1.65
    assert frames_of(tmp_path / "o.mp4")[-1][0] == pytest.approx(1.56, abs=0.02)


def test_pixels_that_are_not_square_stay_so(tmp_path: Path) -> None:
    for rotation, expected in ((0, Fraction(16, 15)), (90, Fraction(15, 16))):
        video = write_numbered(tmp_path / "clip.mp4", 3, rotation=rotation, pixel_aspect=Fraction(16, 15))
        write_overlay(video, nothing(3), tmp_path / "o.mp4")
        with av.open(str(tmp_path / "o.mp4")) as container:
            assert container.streams.video[0].sample_aspect_ratio == expected


def test_sound_that_no_mp4_takes_is_left_out_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_numbered(tmp_path / "low.mkv", 10, codec="mpeg4", sound="libmp3lame", sound_rate=8000)
    monkeypatch.setattr("tracknet.inference.sound.LOWEST_RATE_OF_MP3", 0)
    notes = write_overlay(video, nothing(10), tmp_path / "o.mp4")
    assert len(notes) == 1
    assert notes[0].startswith("the sound is left out")
    assert [number_of(picture) for _, picture in frames_of(tmp_path / "o.mp4")] == list(range(10))


def test_fraction_rates_are_exact(tmp_path: Path) -> None:
    video = write_numbered(tmp_path / "clip.mp4", 30, fps=Fraction(30000, 1001))
    write_overlay(video, nothing(30), tmp_path / "o.mp4")
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)

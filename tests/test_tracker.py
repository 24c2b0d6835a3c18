import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clips import real
from numpy.typing import NDArray
from PIL import Image
from small_models import INPUT_WH, small_model

from tracknet import BallTracker
from tracknet.errors import ConfigError, DataError
from tracknet.inference.network import load_network, usable_device
from tracknet.inference.stream import FrameDetection
from tracknet.inference.track import BallTrack, read_track
from tracknet.inference.trajectory import TUNED, refine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model("unet").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tracker(folder: Path) -> BallTracker:
    return BallTracker.from_pretrained(folder, device="cpu", threshold=0.02, trajectory=False)


def pictures(count: int, size_wh: tuple[int, int] = INPUT_WH) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8) for _ in range(count)]


def found(score: float, number: int = 0, x: float = 10.0, size: tuple[int, int] = (1280, 720)) -> FrameDetection:
    return FrameDetection(number, number / 30, x, 20.0, score, size)


def text(track: BallTrack, path: Path) -> str:
    track.write_csv(path)
    return path.read_text()


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, tracknet; print(sorted({'torch', 'transformers', 'av', 'cv2', 'numpy'} & set(sys.modules)), dir(tracknet))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.startswith("[] ")
    assert "BallTracker" in output


def test_a_folder_a_list_an_array_and_a_generator_give_the_same(tracker: BallTracker, tmp_path: Path) -> None:
    frames = pictures(8)
    (tmp_path / "clip").mkdir()
    for number, picture in enumerate(frames):
        Image.fromarray(picture).save(tmp_path / "clip" / f"{number}.png")
    tracks = [tracker.track(source) for source in (tmp_path / "clip", str(tmp_path / "clip"), frames, np.stack(frames), iter(frames))]
    assert len({text(track, tmp_path / "t.csv") for track in tracks}) == 1
    assert len(tracks[0]) == 8
    assert np.isnan(tracks[0].time_s).all()
    assert tracks[0].fps is None


def test_an_iterator_may_use_one_buffer_again_and_again(tracker: BallTracker, tmp_path: Path) -> None:
    frames, buffer = pictures(8), np.zeros((INPUT_WH[1], INPUT_WH[0], 3), np.uint8)

    def reused() -> Iterator[NDArray[np.uint8]]:
        for picture in frames:
            buffer[:] = picture
            yield buffer

    assert text(tracker.track(reused()), tmp_path / "t.csv") == text(tracker.track(frames), tmp_path / "u.csv")


def test_a_video_gives_a_row_per_frame_with_its_time(tracker: BallTracker) -> None:
    track = tracker.track(real("tennis/clips/game8_Clip2.mp4"))
    assert track.frame.tolist() == list(range(97))
    assert (track.fps, track.size_wh) == (30.0, (1280, 720))
    np.testing.assert_allclose(np.diff(track.time_s), 1 / 30, atol=1e-3)


def test_fps_gives_pictures_their_times_and_a_video_refuses_it(tracker: BallTracker, tmp_path: Path) -> None:
    track = tracker.track(pictures(4), fps=50)
    assert (track.fps, track.time_s.tolist()) == (50, [0.0, 0.02, 0.04, 0.06])
    Image.fromarray(pictures(1)[0]).save(tmp_path / "0.png")
    assert tracker.track(tmp_path, fps=50).time_s.tolist() == [0.0]
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="fps"):
            tracker.track(pictures(4), fps=fps)
    with pytest.raises(ConfigError, match="times of its own"):
        tracker.track(real("tennis/clips/game8_Clip2.mp4"), fps=50)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "no pictures"),
        ([np.zeros((48, 64, 3), np.float32)], "picture 0 is float32"),
        ([np.zeros((48, 64), np.uint8)], "shape"),
        ([np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64, 4), np.uint8)], "picture 1"),
        ([[1, 2, 3]], "is a list"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(tracker: BallTracker, bad: list[NDArray[np.uint8]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        tracker.track(bad)


def test_a_peak_at_the_threshold_is_a_ball(folder: Path) -> None:
    tracker = BallTracker.from_pretrained(folder, device="cpu", threshold=0.4, trajectory=False)
    track = tracker.path([found(0.399999, 0), found(0.4, 1)], 30.0, (1280, 720))
    assert track.visible.tolist() == [False, True]
    assert track.source.tolist() == ["", "detected"]
    assert np.isnan(track.x[0])
    assert (track.x[1], track.score.tolist()) == (10.0, [0.399999, 0.4])


def test_the_threshold_is_the_given_one_else_the_models_else_a_half(folder: Path, tmp_path: Path) -> None:
    model = small_model("unet")
    model.config.detection = {"threshold": 0.31, "protocol": "tracknetv2", "f1": 0.9, "games": ["game8"], "frames": 97, "step": 10}
    model.save_pretrained(tmp_path)
    chosen = BallTracker.from_pretrained(tmp_path, device="cpu")
    assert (chosen.threshold, chosen.threshold_from) == (0.31, "chosen on game8 (tracknetv2)")
    assert BallTracker.from_pretrained(tmp_path, device="cpu", threshold=0.7).threshold == 0.7
    assert BallTracker.from_pretrained(folder, device="cpu").threshold == 0.5
    for threshold in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="threshold"):
            BallTracker.from_pretrained(folder, threshold=threshold)


def test_the_trajectory_is_that_of_the_peaks_and_of_each_picture_size_by_itself(folder: Path) -> None:
    tracker = BallTracker.from_pretrained(folder, device="cpu", threshold=0.5)
    peaks = [found(0.1 if n in (5, 15) else 0.9, n, 10.0 + n, (1280, 720) if n < 10 else (640, 360)) for n in range(20)]
    track = tracker.path(peaks, 30.0, (1280, 720))
    assert tracker.trajectory == TUNED
    assert track.source.tolist() == ["interpolated" if n in (5, 15) else "detected" for n in range(20)]
    assert track.x.tolist() == pytest.approx([10.0 + n for n in range(20)])
    one = replace(tracker.path(peaks[:10], 30.0, (1280, 720)))
    assert one.x.tolist() == track.x[:10].tolist()
    loose = BallTracker.from_pretrained(folder, device="cpu", threshold=0.5, trajectory=False).path(peaks[:10], 30.0, (1280, 720))
    assert refine(replace(loose, x=np.array([10.0 + n for n in range(10)]), y=np.full(10, 20.0))).source.tolist() == one.source.tolist()
    jump = tracker.path([*peaks[:10], found(0.9, 10, 20.0, (64, 48))], 30.0, (1280, 720))
    assert jump.source.tolist()[10] == "detected"  # of one frame alone nothing can be told


def test_a_clip_too_short_for_a_path_is_left_as_it_is(folder: Path) -> None:
    tracker = BallTracker.from_pretrained(folder, device="cpu", threshold=0.5)
    assert TUNED.min_frames == 4
    for count in range(1, 6):
        far_apart = [found(0.9, n, 600.0 * (n % 2)) for n in range(count)]
        near = [found(0.9, n, 10.0 + n) for n in range(count)]
        assert tracker.path(far_apart, 30.0, (1280, 720)).visible.tolist() == [count < TUNED.min_frames] * count
        assert tracker.path(near, 30.0, (1280, 720)).source.tolist() == ["detected"] * count
    assert tracker.path([found(0.4)], 30.0, (1280, 720)).source.tolist() == [""]


def test_what_is_wrong_with_the_footage_is_warned_of(tracker: BallTracker, tmp_path: Path) -> None:
    for number, picture in enumerate(pictures(4)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.track(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of 4 pictures left out") as told:
        assert len(tracker.track(tmp_path)) == 3
    assert [(warning.filename, str(tmp_path) in str(warning.message)) for warning in told] == [(__file__, True)]


def test_what_is_tracked_can_be_written_and_read(tracker: BallTracker, tmp_path: Path) -> None:
    track = tracker.track(pictures(5), fps=25)
    content = text(track, tmp_path / "t.csv")
    assert text(read_track(tmp_path / "t.csv", 25, INPUT_WH), tmp_path / "u.csv") == content
    assert len(content.splitlines()) == 6


def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    for name in ("cuda:99", "abacus", "cpu:1", "meta"):
        with pytest.raises(ConfigError, match=f"device {name}.*this machine has cpu"):
            load_network(folder, name)
    assert usable_device("cpu").type == "cpu"


def test_a_folder_that_is_no_model_of_ours_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        BallTracker.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="type bert"):
        BallTracker.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        BallTracker.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="batch_windows"):
        BallTracker.from_pretrained(folder, batch_windows=0)
    (tmp_path / "model.pt2").touch()
    with pytest.raises(ConfigError, match=r"model\.pt2.*--format onnx"):
        BallTracker.from_pretrained(tmp_path)

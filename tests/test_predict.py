import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import real
from PIL import Image
from small_models import INPUT_WH, small_model
from video_files import write_numbered

from tracknet.inference import detections_file, prediction
from tracknet.inference.detections_file import DetectionsFile
from tracknet.inference.progress import Progress
from tracknet.inference.source import FrameSource
from tracknet.inference.stream import FrameDetection
from tracknet.inference.summary import model_about
from tracknet.inference.track import COLUMNS
from tracknet.inference.tracker import BallTracker
from tracknet.scripts.predict import main

CUTS = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model("unet").save_pretrained(path)
    return path


def write_video(path: Path, count: int, seed: int = 0, size_wh: tuple[int, int] = INPUT_WH) -> Path:
    """Noise at 25 frames/s."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = size_wh
        for _ in range(count):
            picture = rng.integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "rally.mp4", 50)


def predict(folder: Path, output: Path, *arguments: object) -> int:
    options = ["--checkpoint", folder, "--output", output, "--threshold", "0.02", "--device", "cpu"]
    return main([str(part) for part in (*options, *arguments)])


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()} if output.exists() else set()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


def stop_at(frame: int) -> Callable[[BallTracker, FrameSource, int], Iterator[FrameDetection]]:
    """`BallTracker.detections` that ends before a frame's row is written."""
    whole = BallTracker.detections

    def detections(self: BallTracker, source: FrameSource, answer_from: int = 0) -> Iterator[FrameDetection]:
        for found in whole(self, source, answer_from):
            if found.number == frame:
                raise KeyboardInterrupt
            yield found

    return detections


def test_a_video_becomes_a_table_and_a_summary(folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(folder, tmp_path, video) == 0
    assert names(tmp_path) == {"rally.csv", "rally.json"}
    header, *rows = (tmp_path / "rally.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert [row.split(",")[0] for row in rows] == [str(number) for number in range(50)]
    assert [float(row.split(",")[1]) for row in rows] == pytest.approx([number / 25 for number in range(50)])
    summary = json.loads((tmp_path / "rally.json").read_text())
    assert summary["source"]["path"] == str(video)
    assert (summary["frames"], summary["fps"], summary["size"], summary["notes"]) == (50, 25.0, list(INPUT_WH), [])
    sources = [row.split(",")[-1] for row in rows]
    assert (summary["detected"], summary["interpolated"]) == (sources.count("detected"), sources.count("interpolated"))
    assert (summary["threshold"], summary["threshold_from"]) == (0.02, "given")
    assert summary["trajectory"]["max_gap_frames"] >= 0
    assert summary["versions"]["torch"]
    assert summary["frames_per_second"] > 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/rally.csv: 50 frames, ")


def test_a_real_clip_has_a_row_for_every_decoded_frame(folder: Path, tmp_path: Path) -> None:
    for clip in ("tennis/clips/game8_Clip2.mp4", "tennis_jpeg/game1/Clip1"):
        source = real(clip)
        assert predict(folder, tmp_path, source, "--no-trajectory") == 0
        rows = (tmp_path / f"{source.stem}.csv").read_text().splitlines()[1:]
        if source.is_dir():
            count = len(list(source.glob("*.jpg")))
        else:
            with av.open(str(source)) as container:
                count = sum(1 for _ in container.decode(video=0))
        assert len(rows) == count
        assert json.loads((tmp_path / f"{source.stem}.json").read_text())["trajectory"] is None


def test_the_overlay_shows_every_frame(folder: Path, video: Path, tmp_path: Path) -> None:
    assert predict(folder, tmp_path, video, "--overlay") == 0
    assert names(tmp_path) == {"rally.csv", "rally.json", "rally.overlay.mp4"}
    with av.open(str(tmp_path / "rally.overlay.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 50


def test_an_overlay_never_stands_beside_a_table_that_it_does_not_show(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "rally.overlay.mp4"
    assert predict(folder, tmp_path, video, "--overlay") == 0
    assert predict(folder, tmp_path, video, "--no-trajectory") == 0
    assert names(tmp_path) == {"rally.csv", "rally.json"}
    assert predict(folder, tmp_path, video, "--overlay") == 0
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "write_overlay", stop_at_the_end)
        assert predict(folder, tmp_path, video, "--no-trajectory", "--overlay") == 130
    assert names(tmp_path) == {"rally.csv", "rally.json"}
    assert predict(folder, tmp_path, video, "--no-trajectory", "--overlay", "--resume") == 0
    assert overlay.exists()
    capsys.readouterr()
    assert predict(folder, tmp_path, video, "--no-trajectory", "--overlay", "--resume") == 0
    assert "left as it is" in capsys.readouterr().out


def test_an_overlay_of_somebody_else_is_refused_before_the_work(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "rally.overlay.mp4"
    overlay.mkdir()
    assert predict(folder, tmp_path, video, "--overlay") == 1
    assert "rally.overlay.mp4: is there and no overlay of this program" in one_line(capsys)
    overlay.rmdir()
    overlay.write_text("mine")
    assert predict(folder, tmp_path, video, "--overlay") == 1
    assert "rally.overlay.mp4: is there" in one_line(capsys)
    assert names(tmp_path) == {"rally.overlay.mp4"}
    assert predict(folder, tmp_path, video) == 0
    assert predict(folder, tmp_path, video, "--overlay", "--resume") == 1
    assert overlay.read_text() == "mine"


def test_what_the_overlay_has_to_say_is_said_once_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_numbered(tmp_path / "low.mkv", 10, codec="mpeg4", sound="libmp3lame", sound_rate=8000)
    monkeypatch.setattr("tracknet.inference.sound.LOWEST_RATE_OF_MP3", 0)
    assert predict(folder, tmp_path / "out", video, "--overlay") == 0
    notes = json.loads((tmp_path / "out" / "low.json").read_text())["notes"]
    assert [note[:21] for note in notes if "sound" in note] == ["the sound is left out"]
    assert capsys.readouterr().err.splitlines() == [f"{video}: {note}" for note in notes]


@pytest.mark.parametrize("background", [True, False])
def test_cut_anywhere_a_resumed_run_ends_in_the_same_bytes(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tracknet.inference.stream.BLOCK_FRAMES", 13)
    small_model("unet", background=background).save_pretrained(tmp_path / "model")
    loose = ["--no-trajectory"]  # which would drop what this network finds
    assert predict(tmp_path / "model", tmp_path / "whole", video, *loose) == 0
    expected = (tmp_path / "whole" / "rally.csv").read_bytes()
    assert 10 < expected.count(b"detected") < 50
    with monkeypatch.context() as patch:
        patch.setattr(BallTracker, "path", stop_at_the_end)
        assert predict(tmp_path / "model", tmp_path / "out", video, *loose) == 130
    part = tmp_path / "out" / "rally.csv.part"
    content = part.read_bytes()
    assert content.count(b"\n") == 52  # what is said first, the names of the columns, the rows
    went_on = 0
    cuts = sorted({*np.linspace(0, len(content), CUTS).astype(int).tolist(), 1, len(content) - 1})
    for cut in cuts:
        part.write_bytes(content[:cut])
        assert predict(tmp_path / "model", tmp_path / "out", video, *loose, "--resume") == 0
        assert (tmp_path / "out" / "rally.csv").read_bytes() == expected
        assert names(tmp_path / "out") == {"rally.csv", "rally.json"}
        went_on += "goes on behind" in capsys.readouterr().err
    assert went_on > CUTS / 3
    part.write_bytes(content[: len(content) // 2] + b"\0" * 300)  # as after a power failure
    assert predict(tmp_path / "model", tmp_path / "out", video, *loose, "--resume") == 0
    assert (tmp_path / "out" / "rally.csv").read_bytes() == expected


def stop_at_the_end(self: BallTracker, found: list[FrameDetection], *_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_part_and_resume_skips_what_is_done(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tracknet.inference.stream.BLOCK_FRAMES", 12)
    with monkeypatch.context() as patch:
        patch.setattr(BallTracker, "detections", stop_at(30))
        assert predict(folder, tmp_path, video) == 130
    assert names(tmp_path) == {"rally.csv.part"}
    assert "--resume" in one_line(capsys)
    assert predict(folder, tmp_path, video) == 1  # what was found is not thrown away
    assert "--resume, or delete" in one_line(capsys)
    answered: list[int] = []
    whole = BallTracker.detections

    def counted(self: BallTracker, source: FrameSource, answer_from: int = 0) -> Iterator[FrameDetection]:
        for found in whole(self, source, answer_from):
            answered.append(found.number)
            yield found

    monkeypatch.setattr(BallTracker, "detections", counted)
    assert predict(folder, tmp_path, video, "--resume") == 0
    assert answered == list(range(24, 50))
    capsys.readouterr()
    answered.clear()
    before = (tmp_path / "rally.csv").stat().st_mtime_ns
    assert predict(folder, tmp_path, video, "--resume") == 0
    assert "left as it is" in capsys.readouterr().out
    assert (tmp_path / "rally.csv").stat().st_mtime_ns == before
    assert predict(folder, tmp_path, video, "--resume", "--overlay") == 0
    assert names(tmp_path) == {"rally.csv", "rally.json", "rally.overlay.mp4"}
    assert (tmp_path / "rally.csv").stat().st_mtime_ns == before
    assert not answered


def test_resume_refuses_what_was_made_from_something_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tracknet.inference.stream.BLOCK_FRAMES", 12)
    video, output = write_video(tmp_path / "rally.mp4", 40), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(BallTracker, "detections", stop_at(30))
        assert predict(folder, output, video) == 130
    part = (output / "rally.csv.part").read_bytes()
    capsys.readouterr()

    def refused(says: str, *arguments: object, model: Path = folder) -> None:
        assert predict(model, output, video, "--resume", *arguments) == 1
        assert says in one_line(capsys)

    shutil.copytree(folder, tmp_path / "other")
    small_model("unet", frames=3, background=False).save_pretrained(tmp_path / "other")
    refused("another model", model=tmp_path / "other")
    refused("another batch_windows (4, now 2)", "--batch-size", 2)
    os.utime(video, ns=(1, 1))
    refused("another source")
    assert (output / "rally.csv.part").read_bytes() == part
    (output / "rally.csv.part").unlink()
    assert predict(folder, output, video) == 0
    csv = (output / "rally.csv").read_bytes()
    capsys.readouterr()
    refused("another threshold (0.02, now 0.5)", "--threshold", 0.5)
    refused("another trajectory", "--no-trajectory")
    refused("another model", model=tmp_path / "other")
    assert (output / "rally.csv").read_bytes() == csv
    assert predict(folder, output, video, "--threshold", 0.5) == 0  # without --resume it is made anew
    assert json.loads((output / "rally.json").read_text())["threshold"] == 0.5


def test_one_bad_input_of_several_costs_only_itself(folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "nothing").mkdir()
    bad = [tmp_path / "text.mp4", tmp_path / "empty.mp4", tmp_path / "nothing", tmp_path / "gone.mp4"]
    output = tmp_path / "out"
    assert predict(folder, output, *bad[:2], video, *bad[2:], "--overlay") == 1
    assert names(output) == {"rally.csv", "rally.json", "rally.overlay.mp4"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(str(path) in line for path, line in zip(bad, lines, strict=False))
    assert "4 of 5 failed" in lines[-1]
    for path in bad:
        assert predict(folder, tmp_path / "alone", path) == 1
        assert str(path) in one_line(capsys)
        assert not names(tmp_path / "alone")


def test_a_folder_of_pictures_may_hold_its_own_output(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracknet.inference.stream.BLOCK_FRAMES", 3)
    rng = np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    with monkeypatch.context() as patch:
        patch.setattr(BallTracker, "detections", stop_at(7))
        assert predict(folder, tmp_path, tmp_path) == 130
    assert predict(folder, tmp_path, tmp_path, "--resume") == 0
    assert predict(folder, tmp_path, tmp_path, "--resume", "--overlay") == 0
    assert len((tmp_path / f"{tmp_path.name}.csv").read_text().splitlines()) == 10


def test_a_video_that_is_given_twice_is_predicted_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_video(tmp_path / "v" / "two.mp4", 4)
    assert predict(folder, tmp_path / "out", video, f"{tmp_path}/v/../v/two.mp4") == 0
    assert names(tmp_path / "out") == {"two.csv", "two.json"}
    assert capsys.readouterr().out.count("\n") == 1


def test_videos_of_one_name_keep_apart(folder: Path, tmp_path: Path) -> None:
    videos = [
        write_video(tmp_path / place, 4, seed) for seed, place in enumerate(["a/rally.mp4", "b/rally.mp4", "b/rally.avi", "b/other.mp4"])
    ]
    assert predict(folder, tmp_path / "out", *videos, videos[0]) == 0
    tables = {"a_rally.csv", "rally.mp4.csv", "rally.avi.csv", "other.csv"}
    assert {name for name in names(tmp_path / "out") if name.endswith(".csv")} == tables
    made = [json.loads(path.read_text())["source"]["path"] for path in sorted((tmp_path / "out").glob("*.json"))]
    assert sorted(made) == sorted(str(video) for video in videos)


def test_nothing_is_written_over_but_a_prediction_of_the_same_video(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(video, tmp_path / "rally.mp4")
    (tmp_path / "rally.csv").write_text("Frame,Visibility,X,Y\n0,1,2,3\n")  # labels beside the video, as in TrackNetV2
    assert predict(folder, tmp_path, tmp_path / "rally.mp4") == 1
    assert "rally.csv: is there and no prediction; choose another --output" in one_line(capsys)
    assert (tmp_path / "rally.csv").read_text().startswith("Frame,")
    (tmp_path / "rally.csv").unlink()
    assert predict(folder, tmp_path, tmp_path / "rally.mp4") == 0
    other = write_video(tmp_path / "other" / "rally.mp4", 5, seed=9)
    capsys.readouterr()
    assert predict(folder, tmp_path, other) == 1
    assert f"is the prediction of {tmp_path / 'rally.mp4'}" in one_line(capsys)
    assert predict(folder, tmp_path, tmp_path / "rally.mp4") == 0
    capsys.readouterr()
    for other_json in ("{}", '{"made_by": "tracknet.scripts.predict"}', '{"made_by": "tracknet.scripts.predict", "source": {}}'):
        (tmp_path / "rally.json").write_text(other_json)
        assert predict(folder, tmp_path, tmp_path / "rally.mp4") == 1
        assert "rally.json" in one_line(capsys)


@pytest.mark.parametrize("room", [200, 1500, 4000])
def test_where_there_is_no_room_nothing_stands_half_written(
    folder: Path, video: Path, small_disk: Path, room: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracknet.inference.stream.BLOCK_FRAMES", 12)
    page = os.statvfs(small_disk).f_bsize
    free = os.statvfs(small_disk).f_bfree * page
    (small_disk / "full").write_bytes(b"0" * (free - room // page * page))
    assert predict(folder, small_disk, video, "--overlay") == 1
    line = one_line(capsys)
    assert "No space left" in line
    assert "--output" in line
    assert not {name for name in names(small_disk) if name not in ("full", "rally.csv.part")}
    (small_disk / "full").unlink()
    resume = ["--resume"] if (small_disk / "rally.csv.part").exists() else []
    assert predict(folder, small_disk, video, *resume) == 0
    assert (small_disk / "rally.csv").read_text().count("\n") == 51


def test_a_place_that_cannot_be_written_is_one_line(folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert predict(folder, place, video) == 1
        assert one_line(capsys) == f"{place}: there is a file; --output names a folder"
    assert predict(folder, Path("/proc/none"), video) == 1
    line = one_line(capsys)
    assert "cannot be written" in line
    assert "make room" not in line


def test_a_name_that_is_too_long_costs_its_own_video_only(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, longest = tmp_path / f"{'a' * 240}.mp4", tmp_path / f"{'b' * 251}.mp4"
    for path in (long, longest):
        path.symlink_to(video)
    assert predict(folder, tmp_path / "out", longest, "c" * 300, long) == 1
    assert names(tmp_path / "out") == {f"{long.stem}.csv", f"{long.stem}.json"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("File name too long" in line for line in lines[:2])
    assert lines[0].endswith("give the video a shorter name")


def test_what_can_be_no_path_costs_itself_only(folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(folder, tmp_path / "out", "", "http://somewhere/other.mp4", video) == 1
    assert names(tmp_path / "out") == {"rally.csv", "rally.json"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("a VIDEO is empty text")
    assert lines[1].startswith("http://somewhere/other.mp4: is an address")


def test_an_output_that_goes_away_is_one_line(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = DetectionsFile.append
    for last in (0, 49):

        def append(self: DetectionsFile, found: FrameDetection, last: int = last) -> None:
            if found.number == last:
                shutil.rmtree(tmp_path / "out")
            whole(self, found)

        monkeypatch.setattr(DetectionsFile, "append", append)
        assert predict(folder, tmp_path / "out", video) == 1
        assert "rally.csv.part: cannot be read any more" in one_line(capsys)
    monkeypatch.undo()
    monkeypatch.setattr(BallTracker, "detections", lambda *_: shutil.rmtree(tmp_path / "out") or stop_at_the_end(*_))
    assert predict(folder, tmp_path / "out", video) == 130


@pytest.mark.parametrize("whole_writes", [0, 20])
def test_a_row_that_is_written_in_part_is_noticed(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_writes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Short(io.FileIO):
        writes = 0

        def write(self, content: Any) -> int:
            self.writes += 1
            return super().write(content if self.writes <= whole_writes else content[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(detections_file, "_open", lambda path, mode: Short(path, mode))
        assert predict(folder, tmp_path, video) == 1
    assert "rally.csv.part: cannot be written to its end; make room" in one_line(capsys)
    assert names(tmp_path) == ({"rally.csv.part"} if whole_writes else set())


def test_rows_that_something_else_takes_away_are_missed(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = DetectionsFile.append

    def append(self: DetectionsFile, found: FrameDetection) -> None:
        whole(self, found)
        if found.number == 49:
            os.truncate(self.path, self.path.stat().st_size - 1)

    monkeypatch.setattr(DetectionsFile, "append", append)
    assert predict(folder, tmp_path, video) == 1
    assert "holds 49 of the 50 rows" in one_line(capsys)
    assert names(tmp_path) == {"rally.csv.part"}


@pytest.mark.parametrize("content", ["my notes\n", "{}\n", '{"source": 1', "{broken}\nframe,time_s,x,y,score,width,height\n", "{" * 5000])
def test_a_part_of_somebody_else_is_refused_and_stays(
    folder: Path, video: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rally.csv.part").write_text(content)
    for arguments in ([], ["--resume"]):
        assert predict(folder, tmp_path, video, *arguments) == 1
        assert "rally.csv.part" in one_line(capsys)
    assert (tmp_path / "rally.csv.part").read_text() == content


def test_where_nobody_listens_nothing_is_said(folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracknet.inference.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert predict(folder, tmp_path, video, tmp_path / "gone.mp4") == 1
    assert names(tmp_path) == {"rally.csv", "rally.json"}


def test_a_file_that_another_process_writes_is_left_alone(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []

    def second_run(name: str, total: int | None, done: int) -> Progress:
        monkeypatch.setattr(prediction, "Progress", Progress)
        codes.append(predict(folder, tmp_path, video, "--resume"))
        return Progress(name, total, done)

    monkeypatch.setattr(prediction, "Progress", second_run)
    assert predict(folder, tmp_path, video) == 0
    assert codes == [1]
    assert "another process is writing it" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--threshold", "1.5"], "argument --threshold: 1.5: must be a number above 0 and below 1"),
        (["--threshold", "half"], "argument --threshold: half: must be a number"),
        (["--batch-size", "0"], "argument --batch-size: 0: must be a whole number, 1 or more"),
        (["--batch-size", "2.5"], "argument --batch-size: 2.5: must be a whole number"),
        (["--device", "abacus"], "device abacus"),
        (["--overlays"], "unrecognized arguments: --overlays"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(
    folder: Path, video: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(folder, tmp_path, video, *arguments) == 2
    assert says in one_line(capsys)
    assert not names(tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(
    folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: list[dict[str, object]] = [
        {"model_type": "vit"},
        {"architecture": "resnet"},
        {"architecture": "vit_heatmap"},
        {"frames": 5},
        {"backbone": {}},
    ]
    for change in changes:
        model = tmp_path / "-".join(str(part) for part in (*change, *change.values()))
        shutil.copytree(folder, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **change}))
        assert predict(model, tmp_path / "out", video) == 2
        assert str(model) in one_line(capsys)
    assert predict(tmp_path / "none", tmp_path / "out", video) == 2
    assert "none" in one_line(capsys)
    assert not names(tmp_path / "out")


def test_a_resolution_that_changes_is_noted_in_the_summary(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        size = (96, 64) if number < 5 else (192, 128)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(clip / f"{number}.png")
    (clip / "9.png").write_bytes(b"no picture")
    assert predict(folder, tmp_path / "out", clip) == 0
    notes = json.loads((tmp_path / "out" / "clip.json").read_text())["notes"]
    assert len(notes) == 2
    errors = capsys.readouterr().err
    assert all(note in errors for note in notes)
    assert len((tmp_path / "out" / "clip.csv").read_text().splitlines()) == 10


def test_sigterm_keeps_what_was_found(
    folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = DetectionsFile.append

    def append(self: DetectionsFile, found: FrameDetection) -> None:
        whole(self, found)
        if found.number == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(DetectionsFile, "append", append)
    assert predict(folder, tmp_path, video) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "--resume" in one_line(capsys)
    assert (tmp_path / "rally.csv.part").read_text().splitlines()[-1].startswith("30,")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_killed_process_keeps_what_it_found(folder: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    video = write_video(tmp_path / "rally.mp4", 1500)
    options = ["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--threshold", "0.02", "--device", "cpu", str(video)]
    command = [sys.executable, "-m", "tracknet.scripts.predict", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        part, deadline = tmp_path / "out" / "rally.csv.part", time.monotonic() + 120
        while not (part.exists() and part.stat().st_size > 8_000):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert names(tmp_path / "out") == {"rally.csv.part"}
    assert ("--resume" in errors) == (number != signal.SIGKILL)
    assert "Traceback" not in errors
    assert predict(folder, tmp_path / "out", video, "--resume") == 0
    assert predict(folder, tmp_path / "whole", video) == 0
    assert (tmp_path / "out" / "rally.csv").read_bytes() == (tmp_path / "whole" / "rally.csv").read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_video(folder: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from stream_memory import measure, repeat_clip

    repeat_clip(real("tennis/clips/game8_Clip2.mp4"), 2500, tmp_path / "long.mp4")
    tracker = BallTracker.from_pretrained(folder, device="cpu")
    memory, line = measure(tracker, model_about(folder), tmp_path / "long.mp4", tmp_path / "out", warm_up_frames=1500)
    assert int(line.split()[1]) >= 2500
    assert memory.growth < 50

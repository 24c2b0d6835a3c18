import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clips import (
    HEADER,
    blob_picture,
    first_frames_of_real_clip,
    label_rows,
    path_of_ball,
    real,
    real_video_clip,
    write_clip,
    write_games,
    write_labels,
    write_video,
)
from PIL import Image
from users import locked, open_folder

from tracknet.data.decode import video_size
from tracknet.data.formats import check_game_names, check_sides, read_clips
from tracknet.errors import ConfigError, DataError

SIZE = (64, 48)


def rewrite(clip: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Changes the lines of a clip's Label.csv, header included."""
    lines = (clip / "Label.csv").read_text().splitlines()
    (clip / "Label.csv").write_text("\n".join(change(lines)) + "\n")


def with_row(number: int, row: str) -> Callable[[list[str]], list[str]]:
    """Replaces the row of a frame; its line in the file is number + 2."""
    return lambda lines: [*lines[: number + 1], row, *lines[number + 2 :]]


def test_reads_the_tracknet_layout_with_crlf_and_byte_order_mark(tmp_path: Path) -> None:
    xy = write_clip(tmp_path / "game1" / "Clip1")
    rows = label_rows(xy, [1, 0, 2, 3, 1, 1, 1, 1])
    write_labels(tmp_path / "game1" / "Clip1" / "Label.csv", rows, header="\ufeff" + HEADER, end="\r\n")
    index, skipped = read_clips(tmp_path, ["game1"], "stop")
    assert (len(index), skipped) == (8, [])
    assert index.visibility.tolist() == [1, 0, 2, 3, 1, 1, 1, 1]
    np.testing.assert_allclose(index.xy_px[2], xy[2], atol=1e-3)
    assert index.xy_px[1].tolist() == [0, 0]
    assert index.clips[0].size_wh == SIZE
    assert index.clips[0].frame_names == tuple(f"{n:04d}.png" for n in range(8))


def test_clips_stand_in_natural_order_and_rows_follow_them(tmp_path: Path) -> None:
    write_games(tmp_path, ["game2", "game1"], clips=11, count=3)
    index, _ = read_clips(tmp_path, ["game2", "game1"], "stop")
    assert [clip.id for clip in index.clips] == [f"{game}/Clip{n}" for game in ("game2", "game1") for n in range(1, 12)]
    assert index.games == ("game2", "game1")
    assert index.clip_of_row.tolist() == np.repeat(np.arange(22), 3).tolist()
    assert [clip.first_row for clip in index.clips] == list(range(0, 66, 3))
    fewer = index.without({"game2/Clip2", "game1/Clip11"})
    assert len(fewer) == 60
    assert [clip.first_row for clip in fewer.clips] == list(range(0, 60, 3))
    np.testing.assert_array_equal(fewer.xy_px[3:6], index.xy_px[6:9])


def test_labels_of_unordered_rows_meet_their_frames(tmp_path: Path) -> None:
    xy = write_clip(tmp_path / "game1" / "Clip1")
    rewrite(tmp_path / "game1" / "Clip1", lambda lines: [lines[0], *reversed(lines[1:])])
    index, _ = read_clips(tmp_path, ["game1"], "stop")
    np.testing.assert_allclose(index.xy_px, xy, atol=1e-3)


@pytest.mark.parametrize(
    ("video", "table"),
    [
        ("rally.mp4", "rally.csv"),
        ("rally.mp4", "rally_ball.csv"),
        ("video/1_01_00.mp4", "csv/1_01_00_ball.csv"),
        ("video/1_01_00.mp4", "csv/1_01_00.csv"),
    ],
)
def test_reads_a_table_beside_a_video(tmp_path: Path, video: str, table: str) -> None:
    xy = path_of_ball(5, SIZE)
    write_video(tmp_path / "match1" / video, [blob_picture(SIZE, position) for position in xy])
    rows = [f"{n},{int(n != 2)},{x:.0f},{y:.0f}" if n != 2 else "2,0,0,0" for n, (x, y) in enumerate(xy)]
    write_labels(tmp_path / "match1" / table, rows, header="Frame,Visibility,X,Y")
    index, _ = read_clips(tmp_path, ["match1"], "stop")
    assert index.visibility.tolist() == [1, 1, 0, 1, 1]
    assert index.clips[0].frame_names is None
    assert (index.clips[0].name, index.clips[0].size_wh) == (Path(video).stem, SIZE)
    np.testing.assert_allclose(index.xy_px[[0, 4]], xy[[0, 4]].round())


def test_reads_real_tennis_as_pictures_and_as_video(tmp_path: Path) -> None:
    first_frames_of_real_clip(tmp_path)
    real_video_clip(tmp_path)
    index, _ = read_clips(tmp_path, ["game1"], "stop")
    assert [(clip.id, clip.length, clip.size_wh) for clip in index.clips] == [
        ("game1/Clip1", 12, (1280, 720)),
        ("game1/Clip2", 130, (1280, 720)),
    ]
    assert index.xy_px[0].tolist() == [599, 423]
    assert index.xy_px[12].tolist() == [721, 460]


def test_a_real_label_on_the_full_height_means_the_last_pixel(tmp_path: Path) -> None:
    real_video_clip(tmp_path, "game8_Clip2")
    index, _ = read_clips(tmp_path, ["game8"], "stop")
    assert index.xy_px[94].tolist() == [282, 719]
    assert index.xy_px[93].tolist() == [288, 718]


def test_reads_a_real_badminton_rally(tmp_path: Path) -> None:
    video, source = real("badminton/clips/00039.mp4"), real("badminton/csv/00039.csv")
    (tmp_path / "match1" / "video").mkdir(parents=True)
    (tmp_path / "match1" / "video" / "1_01_00.mp4").symlink_to(video)
    width, height = video_size(video)
    rows = [line.split(",") for line in source.read_text().splitlines()[1:]]
    lines = [f"{n},{seen},{float(x) * width:.0f},{float(y) * height:.0f}" for n, seen, x, y in rows]
    write_labels(tmp_path / "match1" / "csv" / "1_01_00_ball.csv", lines, header="Frame,Visibility,X,Y")
    index, _ = read_clips(tmp_path, ["match1"], "stop")
    assert len(index) == len(rows)
    assert (index.visibility == 1).sum() == sum(seen == "1" for _, seen, _, _ in rows)


BROKEN_ROWS = {
    "missing column": (
        lambda lines: ["file name,visibility,x-coordinate", *lines[1:]],
        "Label.csv:1: ",
        "y-coordinate",
        "found: file name",
    ),
    "no header": (lambda lines: [], "Label.csv:1: ", "found: none"),
    "no rows": (lambda lines: lines[:1], "Label.csv: ", "no rows"),
    "semicolons": (
        lambda lines: [line.replace(",", ";") for line in lines],
        "Label.csv:1: ",
        "found: file name;visibility",
        "separate the columns by commas",
    ),
    "tabs": (lambda lines: [line.replace(",", "\t") for line in lines], "Label.csv:1: ", "separate the columns by commas"),
    "underscore in x": (with_row(2, "0002.png,1,1_0,10,0"), "Label.csv:4: ", "x-coordinate is '1_0'", "not a number"),
    "text in x": (with_row(2, "0002.png,1,left,10,0"), "Label.csv:4: ", "x-coordinate is 'left'", "not a number"),
    "nan in y": (with_row(2, "0002.png,1,10,nan,0"), "Label.csv:4: ", "y-coordinate is 'nan'"),
    "text in visibility": (with_row(2, "0002.png,yes,10,10,0"), "Label.csv:4: ", "visibility is 'yes'"),
    "unknown visibility": (with_row(2, "0002.png,4,10,10,0"), "Label.csv:4: ", "visibility is '4'", "allowed are 0"),
    "half a visibility": (with_row(2, "0002.png,0.5,10,10,0"), "Label.csv:4: ", "visibility is '0.5'"),
    "coordinates missing": (with_row(2, "0002.png,2,,10,0"), "Label.csv:4: ", "is empty, but visibility 2"),
    "short row": (with_row(2, "0002.png,1"), "Label.csv:4: ", "2 fields"),
    "outside on the right": (with_row(2, "0002.png,1,65,10,0"), "Label.csv:4: ", "x=65", "outside of the 64x48"),
    "outside above": (with_row(2, "0002.png,1,10,-3,0"), "Label.csv:4: ", "y=-3", "outside of the 64x48"),
    "row without its frame": (lambda lines: [*lines, "0008.png,0,,,"], "Label.csv:10: ", "no picture 0008.png"),
    "frame without a row": (lambda lines: [*lines[:3], *lines[4:]], "Label.csv: ", "frame 0002.png has no row"),
    "duplicate row": (lambda lines: [*lines, lines[3]], "Label.csv:4: ", "0002.png has more than one row"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_broken_label_file_is_named_with_its_line_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    write_games(tmp_path, ["game1"], clips=3)
    change, *parts = BROKEN_ROWS[name]
    rewrite(tmp_path / "game1" / "Clip2", change)
    with pytest.raises(DataError) as caught:
        read_clips(tmp_path, ["game1"], "stop")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [str(tmp_path / "game1" / "Clip2"), *parts]), message
    index, skipped = read_clips(tmp_path, ["game1"], "skip")
    assert [clip.name for clip in index.clips] == ["Clip1", "Clip3"]
    assert [str(error) for error in skipped] == [message]


def break_label_file_missing(clip: Path) -> None:
    (clip / "Label.csv").unlink()


def break_not_text(clip: Path) -> None:
    (clip / "Label.csv").write_bytes(b"\xff\xfe\x00\x81")


def break_no_frames(clip: Path) -> None:
    for picture in clip.glob("*.png"):
        picture.unlink()


def break_frames_and_video(clip: Path) -> None:
    write_video(clip / "clip.mp4", [blob_picture(SIZE, (20, 20))] * 8)


def break_first_picture(clip: Path) -> None:
    (clip / "0000.png").write_bytes(b"no picture")


def break_into_damaged_video(clip: Path) -> None:
    break_no_frames(clip)
    (clip / "clip.mp4").write_bytes(b"no video at all")


def break_into_video_with_a_gap(clip: Path) -> None:
    break_no_frames(clip)
    break_frames_and_video(clip)
    rewrite(clip, lambda lines: [*lines[:4], *lines[5:]])


def break_into_video_with_names(clip: Path) -> None:
    break_no_frames(clip)
    break_frames_and_video(clip)
    rewrite(clip, with_row(0, "start.png,1,10,10,0"))


def break_into_video_with_half_a_frame(clip: Path) -> None:
    break_no_frames(clip)
    break_frames_and_video(clip)
    rewrite(clip, with_row(3, "12.5,1,10,10,0"))


def break_into_video_with_a_typo(clip: Path) -> None:
    break_no_frames(clip)
    break_frames_and_video(clip)
    rewrite(clip, with_row(3, "99999999999,1,10,10,0"))


def break_by_cutting_out(clip: Path) -> None:
    for number in (3, 4):
        (clip / f"{number:04d}.png").unlink()
    rewrite(clip, lambda lines: [*lines[:4], *lines[6:]])


def break_by_a_number_twice(clip: Path) -> None:
    (clip / "0007.png").rename(clip / "06.png")
    rewrite(clip, with_row(7, "06.png,1,10,10,0"))


def break_label_file_name(clip: Path) -> None:
    (clip / "Label.csv").rename(clip / "labels.CSV")


@pytest.mark.parametrize(
    ("break_clip", "part"),
    [
        (break_label_file_missing, "has no Label.csv"),
        (break_label_file_name, "has no Label.csv; rename labels.CSV to that"),
        (break_by_cutting_out, "picture 3 is missing, after 0002.png comes 0005.png"),
        (break_by_a_number_twice, "06.png have the same number"),
        (break_into_video_with_half_a_frame, "Label.csv:5: the frame is '12.5'"),
        (break_into_video_with_a_typo, "Label.csv:5: the frame is 99999999999, but frame 3 has no row"),
        (break_not_text, "is no CSV text"),
        (break_no_frames, "found 0 and 0"),
        (break_frames_and_video, "found 8 and 1"),
        (break_first_picture, "0000.png: unreadable picture"),
        (break_into_damaged_video, "clip.mp4: unreadable video"),
        (break_into_video_with_a_gap, "frame 3 has no row"),
        (break_into_video_with_names, "Label.csv:2: the frame is 'start.png'"),
    ],
)
def test_a_broken_clip_folder_is_named_and_can_be_skipped(tmp_path: Path, break_clip: Callable[[Path], None], part: str) -> None:
    write_games(tmp_path, ["game1"], clips=2)
    break_clip(tmp_path / "game1" / "Clip1")
    with pytest.raises(DataError) as caught:
        read_clips(tmp_path, ["game1"], "stop")
    assert part in str(caught.value)
    assert str(tmp_path / "game1" / "Clip1") in str(caught.value)
    assert "\n" not in str(caught.value)
    index, skipped = read_clips(tmp_path, ["game1"], "skip")
    assert ([clip.name for clip in index.clips], len(skipped)) == (["Clip2"], 1)


def test_videos_and_tables_without_a_partner_are_named(tmp_path: Path) -> None:
    pictures = [blob_picture(SIZE, (20, 20))] * 2
    write_video(tmp_path / "match1" / "video" / "alone.mp4", pictures)
    with pytest.raises(DataError, match=r"alone\.mp4: needs one label file, alone_ball\.csv or alone\.csv.*found: none"):
        read_clips(tmp_path, ["match1"], "stop")
    write_labels(tmp_path / "match1" / "csv" / "other.csv", ["0,0,,"], header="Frame,Visibility,X,Y")
    _, skipped = read_clips(tmp_path, ["match1"], "skip")
    assert len(skipped) == 2
    assert "other.csv: has no video" in str(skipped[1])


def test_a_root_or_game_that_does_not_exist_names_the_key_and_what_is_there(tmp_path: Path) -> None:
    write_games(tmp_path, ["game2", "game10"], count=1)
    with pytest.raises(ConfigError, match=r"data\.root: .*nowhere.*data\.root=FOLDER.*--data demo --model demo --training demo"):
        read_clips(tmp_path / "nowhere", ["game1"], "skip")
    with pytest.raises(ConfigError, match=r"data\.split names the game 'game1'.*games there: game2, game10"):
        read_clips(tmp_path, ["game2", "game1"], "skip")


@pytest.mark.parametrize("game", ["..", ".", "", "game1/", "./game1", "game1/Clip1"])
def test_a_game_is_the_plain_name_of_a_folder(game: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.split names the game .*plain name of a folder") as caught:
        check_game_names(["game1", game])
    assert repr(game) in str(caught.value)
    check_game_names(["game1", "match 2", "..x"])


def test_pictures_may_start_anywhere_and_have_any_names(tmp_path: Path) -> None:
    for clip, names in (("Clip1", ["0098.png", "0099.png", "0100.png"]), ("Clip2", ["a1.png", "a7.png", "b²3.png"])):
        write_clip(tmp_path / "game1" / clip, count=3)
        for number, name in enumerate(names):
            (tmp_path / "game1" / clip / f"{number:04d}.png").rename(tmp_path / "game1" / clip / name)
            rewrite(tmp_path / "game1" / clip, with_row(number, f"{name},1,10,10,0"))
    index, _ = read_clips(tmp_path, ["game1"], "stop")
    assert [clip.frame_names for clip in index.clips] == [("0098.png", "0099.png", "0100.png"), ("a1.png", "a7.png", "b²3.png")]


@pytest.mark.parametrize("linked", ["game2", "game2/Clip5"])
def test_footage_stands_on_one_side_whatever_its_name(tmp_path: Path, linked: str) -> None:
    write_games(tmp_path, ["game1", "game3"], clips=1, count=2)
    (tmp_path / linked).parent.mkdir(exist_ok=True)
    (tmp_path / linked).symlink_to(tmp_path / ("game1" if linked == "game2" else "game1/Clip1"))
    one, other, link = (read_clips(tmp_path, [game], "stop")[0] for game in ("game1", "game3", "game2"))
    check_sides(one, other)
    with pytest.raises(ConfigError, match=rf"game1/Clip1 of train_games and {link.clips[0].id} of val_games are the same footage"):
        check_sides(one, link)


def test_a_game_without_clips_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "game1").mkdir()
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match="game1: holds no clips"):
            read_clips(tmp_path, ["game1"], on_error)


def test_two_clips_of_one_name_in_a_game_are_refused(tmp_path: Path) -> None:
    for place in ("", "video"):
        write_video(tmp_path / "match1" / place / "a.mp4", [blob_picture(SIZE, (20, 20))])
    write_labels(tmp_path / "match1" / "csv" / "a.csv", ["0,0,,"], header="Frame,Visibility,X,Y")
    with pytest.raises(DataError, match="another clip of this name"):
        read_clips(tmp_path, ["match1"], "stop")


def test_hidden_files_are_no_clips(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", count=2)
    Image.new("RGB", SIZE).save(tmp_path / "game1" / "Clip1" / "._0000.png")
    shutil.copytree(tmp_path / "game1" / "Clip1", tmp_path / "game1" / ".trash")
    index, _ = read_clips(tmp_path, ["game1"], "stop")
    assert len(index) == 2


@pytest.mark.parametrize(
    ("place", "named"),
    [("", "data"), ("data", "data/game1"), ("data/game1", "data/game1"), ("data/game1/Clip1", "data/game1/Clip1")],
)
def test_a_folder_that_may_not_be_read_is_named(place: str, named: str) -> None:
    with open_folder() as folder:
        write_games(folder / "data", ["game1"])
        with locked(folder / place), pytest.raises(DataError, match=rf"{named}: cannot be read \(Permission denied\)"):
            read_clips(folder / "data", ["game1"], "stop")

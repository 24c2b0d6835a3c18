"""Finds the clips of a data set and their labels.

Three layouts are read, also mixed inside one game:

    game1/Clip1/0000.jpg 0001.jpg ... Label.csv        TrackNet; .png as well
    game1/Clip1/any.mp4 Label.csv                      the same with one video: file names in Label.csv count its frames, 0000, 0001, ...
    match1/1_01_00.mp4 1_01_00.csv                     a CSV with Frame,Visibility,X,Y per video, named like it or `<stem>_ball.csv`;
    match1/video/1_01_00.mp4 match1/csv/1_01_00_ball.csv      in the same folder, or in `video` and `csv` as TrackNetV2 ships them
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tracknet.data.decode import picture_size, video_size
from tracknet.data.index import Clip, ClipIndex, FrameNames, LabelledClip, join_clips
from tracknet.data.labels import TRACKNET, TRACKNET_V2, Columns, LabelColumns, LabelRow, fail, read_labels, read_plain_labels
from tracknet.data.plain_clips import HIDDEN, numbers_of, plain_pictures
from tracknet.data.saved_index import ClipPlace, SavedIndex
from tracknet.errors import ConfigError, DataError

PICTURES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
LABEL_FILE = "Label.csv"
NAMES_MISTAKEN_FOR_IT = ("label.csv", "labels.csv")  # in lower case
PLACES_OF_TRACKNET_V2 = ("video", "csv", "frame")  # its own scripts add `frame`, pictures cut from the videos, which are not needed here
FRAME_OF_VIDEO = re.compile(r"([0-9]{1,18})(?:\.(?:jpe?g|png))?", re.IGNORECASE)  # a number; Label.csv writes it as a picture's name
NUMBER = re.compile(r"([0-9]+)")
DEMO_COMMAND = "python -m tracknet.scripts.train --data demo --model demo --training demo"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def read_clips(root: Path, games: Sequence[str], on_error: str, cache_dir: Path | None = None) -> tuple[ClipIndex, list[DataError]]:
    """Reads the labels of all clips of some games; no picture is decoded here.

    Clips in which nothing is unusual are read by `plain_clips` and `read_plain_labels`, whole lists at a time; the others by the careful
    code here, which says what is wrong. Both give the same.

    Args:
        root: folder with one folder per game.
        games: names of the game folders, plain ones, in the order in which their clips shall stand; clips of a game stand in natural order.
        on_error: `stop` raises the first error; `skip` leaves the clip out.
        cache_dir: where the index is saved, so that next time only clips that have changed are read; None saves nothing.

    Returns:
        The index, and the errors of the clips left out.

    Raises:
        ConfigError: `root` or a game's folder does not exist.
        DataError: a clip is broken and `on_error` is `stop`, or a game holds no clips at all.
    """
    check_root(root)
    saved = SavedIndex(cache_dir, root, games)
    parts: dict[str, LabelledClip] = {}
    skipped: list[DataError] = []
    for game in games:
        for place in _places_of_game(root, game):
            try:
                part = _found(saved, place)
                if part.clip.id in parts:
                    raise DataError(f"{part.clip.source}: the game has another clip of this name")
                parts[part.clip.id] = part
            except DataError as error:
                if on_error == "stop":
                    raise
                skipped.append(error)
    saved.save()
    return join_clips(list(parts.values())), skipped


def _found(saved: SavedIndex, place: ClipPlace) -> LabelledClip:
    try:
        return saved.find(place)
    except OSError as error:  # a folder that may be listed, but not entered
        raise _unreadable(place.path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror})")


def check_root(root: Path) -> None:
    """Raises ConfigError, with where to put the data set, where the folder `root` does not exist; DataError where it cannot be read."""
    if not _is_folder(root):
        raise ConfigError(
            f"data.root: no folder {root}; put the TrackNet data set there (game1/Clip1/0000.jpg ... Label.csv), "
            f"or give its place with data.root=FOLDER, or try the demo: {DEMO_COMMAND}"
        )


def check_game_names(games: Sequence[str]) -> None:
    """Refuses what is not the plain name of a folder: `..`, `game1/`, `a/b`. Raises ConfigError."""
    for game in games:
        if Path(game).name != game or game in ("", ".."):
            raise ConfigError(f"data.split names the game {game!r}, which is not the plain name of a folder, such as game1")


def check_sides(train: ClipIndex, val: ClipIndex) -> None:
    """Refuses footage that stands on both sides of the split, also under two names: links, or a disk that ignores case.

    Raises:
        ConfigError: names a clip of each side.
        DataError: the footage has gone since it was listed.
    """
    clip_of_footage = {_identity(clip.source): clip for clip in train.clips}
    for clip in val.clips:
        same = clip_of_footage.get(_identity(clip.source))
        if same is not None:
            raise ConfigError(
                f"data.split: {same.id} of train_games and {clip.id} of val_games are the same footage, {clip.source.resolve()};"
                " a game belongs to one side only"
            )


def _identity(path: Path) -> tuple[int, int]:
    """Equal for two names of one file or folder."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: has gone since the clips were listed ({error.strerror})") from error
    return status.st_dev, status.st_ino


def natural_order(path: _Named) -> list[tuple[int, int, str]]:
    """Sort key that puts `Clip2` before `Clip10`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in NUMBER.split(path.name) if part]


def _places_of_game(root: Path, game: str) -> Iterator[ClipPlace]:
    """Where the clips of a game are; to be read one by one, so that a broken clip does not hide the others."""
    folder = root / game
    if not _is_folder(folder):
        there = ", ".join(path.name for path in _entries(root) if path.is_dir()) or "none"
        raise ConfigError(f"data.split names the game {game!r}, but there is no folder {folder}; games there: {there}")
    entries = _entries(folder)
    clip_folders = [Path(entry) for entry in entries if _is_dir(entry) and entry.name not in PLACES_OF_TRACKNET_V2]
    videos = _files(entries, VIDEOS) + _files(_entries_if_there(folder / "video"), VIDEOS)
    tables = _files(entries, (".csv",)) + _files(_entries_if_there(folder / "csv"), (".csv",))
    if not clip_folders and not videos and not tables:
        raise DataError(f"{folder}: holds no clips; it needs Clip1/{LABEL_FILE} with pictures or a video, or videos with a CSV each")
    for clip_folder in clip_folders:
        key, table_path = f"{game}/{clip_folder.name}", f"{clip_folder}/{LABEL_FILE}"
        yield ClipPlace(game, clip_folder.name, clip_folder, key, table_path, partial(_read_clip_folder, game, clip_folder))
    tables_of_stem: dict[str, list[int]] = defaultdict(list)
    for number, table in enumerate(tables):
        tables_of_stem[table.stem].append(number)
    for video in videos:
        matching = [tables[number] for number in sorted(number for stem in _table_stems(video) for number in tables_of_stem[stem])]
        key, the_table = f"{game}/{video.relative_to(folder)}", str(matching[0]) if len(matching) == 1 else None
        yield ClipPlace(game, video.stem, video, key, the_table, partial(_read_video_and_table, game, video, matching))
    stems = {stem for video in videos for stem in _table_stems(video)}
    for table in tables:
        if table.stem not in stems:
            yield ClipPlace(game, table.stem, table, f"{game}/{table.name}", None, partial(_no_video, table))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in natural order, hidden files left out. Raises DataError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(HIDDEN)), key=natural_order)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _entries_if_there(folder: Path) -> list[os.DirEntry[str]]:
    return _entries(folder) if _is_folder(folder) else []


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unreadable(path, error) from error


def _files(entries: list[os.DirEntry[str]], endings: tuple[str, ...]) -> list[Path]:
    """The files of some endings."""
    paths = [Path(entry) for entry in entries if entry.name.lower().endswith(endings)]
    return [path for path in paths if path.is_file()]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; a link that leads in circles does not."""
    try:
        return entry.is_dir()
    except OSError:
        return Path(entry).is_dir()


def _read_clip_folder(game: str, folder: Path) -> LabelledClip:
    """The TrackNet layout, with pictures or with one video."""
    plain = _read_plain_pictures(game, folder)
    if plain is not None:
        return plain
    entries = _entries(folder)
    pictures, videos = _files(entries, PICTURES), _files(entries, VIDEOS)
    if (len(videos) != 1) if not pictures else videos:
        raise DataError(f"{folder}: needs either pictures ({', '.join(PICTURES)}) or one video, found {len(pictures)} and {len(videos)}")
    table = folder / LABEL_FILE
    if not table.is_file():
        similar = next((entry.name for entry in entries if entry.name.lower() in NAMES_MISTAKEN_FOR_IT), None)
        raise DataError(f"{folder}: has no {LABEL_FILE}" + (f"; rename {similar} to that" if similar else ""))
    if videos:
        return _video_clip(game, folder.name, videos[0], table, TRACKNET)
    rows = read_labels(table, TRACKNET)
    names = [picture.name for picture in pictures]
    ordered = _one_row_per_frame(table, {row.frame: row for row in rows}, rows, names)
    _check_no_gap(folder, pictures)
    clip = Clip(game, folder.name, folder, FrameNames(names), picture_size(pictures[0]), 0, len(names))
    return _labelled(clip, table, ordered)


def _read_plain_pictures(game: str, folder: Path) -> LabelledClip | None:
    """A folder of pictures in which nothing is unusual; None for any other."""
    names = plain_pictures(str(folder), LABEL_FILE, PICTURES, VIDEOS)
    labels = None if names is None else read_plain_labels(f"{folder}/{LABEL_FILE}", TRACKNET)
    if names is None or labels is None or labels.frames != names:
        return None
    clip = Clip(game, folder.name, folder, FrameNames(names), picture_size(folder / names[0]), 0, len(names))
    return _plainly_labelled(clip, labels)


def _check_no_gap(folder: Path, pictures: list[Path]) -> None:
    """Pictures whose names are numbers must count without a gap: windows take neighbours for neighbours in time."""
    if not all(picture.stem.isdecimal() for picture in pictures):
        return
    for before, after in pairwise(pictures):
        if int(after.stem) == int(before.stem):
            raise DataError(f"{folder}: {before.name} and {after.name} have the same number")
        if int(after.stem) != int(before.stem) + 1:
            raise DataError(
                f"{folder}: picture {int(before.stem) + 1} is missing, after {before.name} comes {after.name};"
                " a clip is one run of frames, so put what follows the gap into a clip folder of its own"
            )


def _table_stems(video: Path) -> tuple[str, str]:
    return (f"{video.stem}_ball", video.stem)


def _read_video_and_table(game: str, video: Path, matching: list[Path]) -> LabelledClip:
    """The TrackNetV2 layout."""
    if len(matching) != 1:
        found = ", ".join(str(table) for table in matching) or "none"
        raise DataError(f"{video}: needs one label file, {video.stem}_ball.csv or {video.stem}.csv, beside it or in csv; found: {found}")
    return _video_clip(game, video.stem, video, matching[0], TRACKNET_V2)


def _no_video(table: Path) -> LabelledClip:
    raise DataError(f"{table}: has no video of its name beside it or in video")


def _video_clip(game: str, name: str, video: Path, table: Path, columns: Columns) -> LabelledClip:
    """A clip whose rows count the frames of a video; the video's own length is checked when it is decoded."""
    labels = read_plain_labels(table, columns)
    if labels is not None and numbers_of(labels.frames, PICTURES) == list(range(len(labels.frames))):
        plain = _plainly_labelled(Clip(game, name, video, None, video_size(video), 0, len(labels.frames)), labels)
        if plain is not None:
            return plain
    rows = read_labels(table, columns)
    by_number: dict[int, LabelRow] = {}
    for row in rows:
        number = FRAME_OF_VIDEO.fullmatch(row.frame)
        if number is None:
            fail(table, row.line, f"the frame is {row.frame!r}, but beside a video it is a whole number that counts from 0")
        by_number[int(number[1])] = row
    missing = next((number for number in range(len(by_number)) if number not in by_number), None)
    if missing is not None:
        last = by_number[max(by_number)]
        fail(table, last.line, f"the frame is {last.frame}, but frame {missing} has no row; the rows of a video count from 0 to its last")
    frames = [str(number) for number in range(len(by_number))]
    ordered = _one_row_per_frame(table, {str(number): row for number, row in by_number.items()}, rows, frames)
    return _labelled(Clip(game, name, video, None, video_size(video), 0, len(frames)), table, ordered)


def _one_row_per_frame(table: Path, by_frame: dict[str, LabelRow], rows: list[LabelRow], frames: list[str]) -> list[LabelRow]:
    """The rows in the order of the frames. `by_frame` holds the last row of each frame."""
    last_lines = {row.line for row in by_frame.values()}
    for row in rows:
        if row.line not in last_lines:
            fail(table, row.line, f"frame {row.frame} has more than one row")
    known = set(frames)
    for frame, row in by_frame.items():
        if frame not in known:
            fail(table, row.line, f"there is no picture {row.frame} in {table.parent}")
    for frame in frames:
        if frame not in by_frame:
            raise DataError(f"{table}: frame {frame} has no row")
    return [by_frame[frame] for frame in frames]


def _labelled(clip: Clip, table: Path, rows: list[LabelRow]) -> LabelledClip:
    """Joins a clip and its rows, once all positions are known to lie in the picture."""
    width, height = clip.size_wh
    for row in rows:
        x, y = row.xy_px
        if not (-0.5 <= x <= width and -0.5 <= y <= height):
            fail(table, row.line, f"the ball at x={x:g}, y={y:g} is outside of the {width}x{height} picture")
    xy_px = np.array([row.xy_px for row in rows], dtype=np.float64)
    return LabelledClip(clip, _in_picture(clip, xy_px), np.array([row.visibility for row in rows], dtype=np.int8))


def _plainly_labelled(clip: Clip, labels: LabelColumns) -> LabelledClip | None:
    """The same for whole columns; None where a position lies outside or is not finite."""
    xy_px = labels.xy_px
    if not ((xy_px >= -0.5) & (xy_px <= clip.size_wh)).all():
        return None
    return LabelledClip(clip, _in_picture(clip, xy_px), labels.visibility)


def _in_picture(clip: Clip, xy_px: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n, 2) positions as they are stored.

    Some annotators count from the picture's edge and so reach its full width or height (TrackNet's game8/Clip2 has y = 720 of 720): such a
    label means the last pixel, and is taken as that.
    """
    size = np.array(clip.size_wh, dtype=np.float32)
    rounded = xy_px.astype(np.float32)
    return np.where(rounded >= size - 0.5, size - 1, rounded)

"""Finds validation footage that is in training too: copied clips, neighbouring frames, copied pictures.

Codes of `tracknet.data.fingerprint` propose pairs of frames, thumbnails decide, by the difference of two frames over what moves in them.

Not found are copies that were mirrored, cropped or letterboxed, and clips in which nothing moves. Rallies on one court with the same moving
graphic, such as a blinking banner, may be taken for copies.

The time grows as N log N with N frames, see `nearest_codes`; the memory is some 300 bytes per frame. Frames that do not fit into their clip
and the ends of clips, which are few, are looked up by the whole picture.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracknet.data.build import Datasets
from tracknet.data.code_search import PAIRS_AT_ONCE, bits_apart, nearest_codes
from tracknet.data.dataset import WindowDataset
from tracknet.data.fingerprint import CODE_BITS, SCENE_FRAMES, beyond_noise, fingerprints, make_marks
from tracknet.data.index import Clip

SAME = 0.1  # of the difference over what moves in both frames: surely one moment, or two a blink apart
NEAR = 0.6  # the same between two scenes of which some frames are surely the same
COPIES = 0.0002  # two pictures without a background: their difference over how much they differ from a plain colour
LEAST_ENERGY = 500.0  # of what moves, else chance decides
LEAST_CONTRAST = 1e5  # of a picture without a background
TRIED = 4  # nearest codes whose thumbnails are compared
KEY_BITS = (16, 32)  # least and most; a key is as long as tells apart the frames there are
BUCKET = 8
LIMIT_BITS = CODE_BITS // 4  # codes that differ in more are of different moments: 45 degrees
WHOLE_KEY_BITS, WHOLE_BUCKET, WHOLE_TRIED = 32, 64, 8  # whole pictures of one court are all alike, so more must be looked at
END_FRAMES = 2  # at both ends of a clip: where a clip is cut in two, only they have neighbours, and the parts' backgrounds differ
MOST_STRAYS = 50_000  # of one side, so many are sorted into scenes
MOST_PAIRS = 1 << 25  # of frames of two scenes; in longer scenes neighbours are not searched further
BESIDE = 25  # frames, about a second: who stands so near to a frame that was found shows the same moment, though another picture
SEVERAL = 5  # frames; fewer that are found say nothing about those around them
LINES_LOGGED = 10

log = logging.getLogger("tracknet")

Rows = NDArray[np.int64]


class _StoppedError(Exception):
    """The user wants no more of it."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class _Side:
    """All frames of one side of the split, clip after clip, N rows."""

    dataset: WindowDataset
    clip: NDArray[np.int32]  # (N,)
    scene: NDArray[np.int64]  # (N,) number among all scenes of the side, -1: a stray picture
    strange: NDArray[np.bool_]  # (N,) does not fit into its clip
    energy: NDArray[np.float32]  # (N,)
    moving: NDArray[np.uint8]  # (N, CODE_BITS / 8)
    whole: NDArray[np.uint8]  # (N, CODE_BITS / 8)
    stop_requested: Callable[[], bool]  # asked before each clip

    @property
    def movers(self) -> Rows:
        """Rows of frames in which something moves."""
        return np.flatnonzero(self.energy >= LEAST_ENERGY)

    @property
    def strays(self) -> Rows:
        """Rows of frames that belong to no scene."""
        return np.flatnonzero(self.scene < 0)

    @property
    def ends(self) -> Rows:
        """Rows of the first and last frames of clips."""
        clips = self.dataset.index.clips
        near = [np.r_[0 : min(END_FRAMES, clip.length), max(clip.length - END_FRAMES, 0) : clip.length] + clip.first_row for clip in clips]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *near]))

    def thumbnails(self, rows: Rows) -> NDArray[np.uint8]:
        """(n, 36, 64) of rows of one clip."""
        if self.stop_requested():
            raise _StoppedError
        clip = self.dataset.index.clips[self.clip[rows[0]]]
        picked: NDArray[np.uint8] = fingerprints(self.dataset.store, clip).thumbnails[rows - clip.first_row]
        return picked


@dataclass(frozen=True)
class _Leak:
    """What was found of one clip of the validation games in training."""

    clip: Clip
    rows: Rows  # of `val`, those found
    twins: Rows  # the row of `train` most like each
    beside: int  # other frames of the clip that stand within `BESIDE` of those, of a scene of which several were found


def log_leaks(datasets: Datasets, stop_requested: Callable[[], bool] = _never) -> int:
    """Warns, in the log, of validation footage that is in training too. For the main rank, once the clips are prepared.

    Args:
        datasets: the two sides.
        stop_requested: asked from clip to clip; where it says yes, the search ends with nothing found.

    Returns:
        The number of validation clips that were warned of.

    Raises:
        DataError: the cache has lost frames.
    """
    start = time.monotonic()
    train, val = datasets.train, datasets.val
    log.info("comparing %d validation frames with %d training frames", len(val.index), len(train.index))
    try:
        lines = find_leaks(train, val, stop_requested)
    except _StoppedError:
        return 0
    for line in lines[:LINES_LOGGED]:
        log.warning("%s", line)
    if lines:
        log.warning(
            "data.split: %d of %d validation clips hold footage that is in training too%s: scores on them are too good;"
            " split by whole games, each filmed match on one side only",
            len(lines),
            len(val.index.clips),
            f" ({LINES_LOGGED} are listed)" if len(lines) > LINES_LOGGED else "",
        )
    else:
        spent_s = time.monotonic() - start
        log.info("no copies found (%.1f s)", spent_s)
    return len(lines)


def find_leaks(train: WindowDataset, val: WindowDataset, stop_requested: Callable[[], bool] = _never) -> list[str]:
    """Looks for the frames of `val` among those of `train`: the same pictures, or close neighbours in time.

    Returns:
        One line per clip of `val` that has any: how many frames, of which clip they are, and which games to move.

    Raises:
        DataError: the cache has lost frames.
    """
    return [_line(leak, train) for leak in _search(_read_side(train, stop_requested), _read_side(val, stop_requested))]


def _read_side(dataset: WindowDataset, stop_requested: Callable[[], bool] = _never) -> _Side:
    """The marks of all frames; fingerprints that the cache lacks are made."""
    index, scenes = dataset.index, 0
    count, width = len(index), CODE_BITS // 8
    codes = np.empty((2, count, width), np.uint8)
    scene, strange, energy = np.empty(count, np.int64), np.empty(count, np.bool_), np.empty(count, np.float32)
    side = _Side(dataset, index.clip_of_row, scene, strange, energy, codes[0], codes[1], stop_requested)
    for clip in index.clips:
        if stop_requested():
            raise _StoppedError
        rows, marks = index.rows(clip), fingerprints(dataset.store, clip).marks
        side.scene[rows] = np.where(marks["scene"] < 0, -1, marks["scene"] + scenes)
        side.strange[rows], side.energy[rows] = marks["strange"], marks["energy"]
        side.moving[rows], side.whole[rows] = marks["moving"], marks["whole"]
        scenes += int(marks["scene"].max(initial=-1)) + 1
    _sort_strays(side, scenes)
    return side


def _sort_strays(side: _Side, scenes: int) -> None:
    """Strays of several clips may be of one scene: of a few shuffled frames, say, or of short clips."""
    strays = side.strays[:MOST_STRAYS]
    if len(strays) < SCENE_FRAMES:
        return
    marks = make_marks(np.concatenate([side.thumbnails(rows) for rows in _grouped(strays, side.clip[strays])]))
    side.scene[strays] = np.where(marks["scene"] < 0, -1, marks["scene"] + scenes)
    side.energy[strays], side.moving[strays] = marks["energy"], marks["moving"]


def _search(train: _Side, val: _Side) -> list[_Leak]:
    twin = np.full(len(val.clip), -1, np.int64)  # of each row of `val`: the row of `train` that shows the same

    def note(rows: Rows, twins: Rows, limit: float) -> None:
        still_open = twin[rows] < 0
        rows, twins = rows[still_open], twins[still_open]
        same = _difference(train, val, twins, rows) <= limit
        twin[rows[same]] = twins[same]

    proposals = list(_proposals(train, val))
    for rows, twins in proposals:
        note(rows, twins, SAME)
    for rows, twins in proposals:
        chosen = _of_shared_games(rows, twins, twin, train, val)
        note(rows[chosen], twins[chosen], NEAR)
    for rows, twins in _neighbours(train, val, twin):
        note(rows, twins, NEAR)
    leaking = np.flatnonzero(twin >= 0)
    clips = val.dataset.index.clips
    return [_Leak(clips[val.clip[rows[0]]], rows, twin[rows], _beside(rows, val)) for rows in _grouped(leaking, val.clip[leaking])]


def _beside(found: Rows, val: _Side) -> int:
    """How many frames of a clip stand beside those found; see `_Leak`."""
    clip = val.dataset.index.clips[val.clip[found[0]]]
    rows = np.arange(clip.first_row, clip.first_row + clip.length)
    count = 0
    for scene in np.unique(val.scene[found]):
        sources = found[val.scene[found] == scene]
        if scene >= 0 and len(sources) >= SEVERAL:
            members = np.setdiff1d(rows[val.scene[rows] == scene], sources)
            after = np.searchsorted(sources, members)
            gap = np.minimum(
                np.abs(sources[np.minimum(after, len(sources) - 1)] - members), np.abs(members - sources[np.maximum(after - 1, 0)])
            )
            count += int((gap <= BESIDE).sum())
    return count


def _proposals(train: _Side, val: _Side) -> Iterator[tuple[Rows, Rows]]:
    """Rows of `val`, each with a row of `train` that may show the same; the likeliest first."""
    moving = val.movers, train.movers
    key_bits = int(np.clip(np.ceil(np.log2(max(len(moving[1]), 1))), *KEY_BITS))
    found = nearest_codes(
        val.moving[moving[0]], train.moving[moving[1]], count=TRIED, key_bits=key_bits, bucket=BUCKET, limit_bits=LIMIT_BITS
    )
    for numbers in found.T:
        yield moving[0][numbers >= 0], moving[1][numbers[numbers >= 0]]
    for asking, known, rows in (
        (val, train, np.union1d(np.flatnonzero(val.strange), val.ends)),
        (train, val, np.flatnonzero(train.strange)),
    ):
        keys = {"key_bits": WHOLE_KEY_BITS, "bucket": WHOLE_BUCKET, "limit_bits": CODE_BITS}
        for numbers in nearest_codes(asking.whole[rows], known.whole, count=WHOLE_TRIED, **keys).T:
            pair = rows[numbers >= 0], numbers[numbers >= 0]
            yield pair if asking is val else pair[::-1]


def _of_shared_games(rows: Rows, twins: Rows, twin: Rows, train: _Side, val: _Side) -> NDArray[np.bool_]:
    """(n,) whether a pair is of two games that are already known to share several frames."""
    found = np.flatnonzero(twin >= 0)
    shared, count = np.unique(_games(val, found) * len(train.dataset.index.games) + _games(train, twin[found]), return_counts=True)
    return np.isin(_games(val, rows) * len(train.dataset.index.games) + _games(train, twins), shared[count >= SEVERAL])


def _games(side: _Side, rows: Rows) -> Rows:
    """(n,) the number of the game of each row."""
    number = {game: number for number, game in enumerate(side.dataset.index.games)}
    return np.array([number[clip.game] for clip in side.dataset.index.clips], np.int64)[side.clip[rows]]


def _neighbours(train: _Side, val: _Side, twin: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Proposes, where two scenes are known to share footage, the likeliest twins of the frames that have none yet."""
    sure = np.flatnonzero(twin >= 0)
    sure = sure[(val.scene[sure] >= 0) & (train.scene[twin[sure]] >= 0)]
    sure = sure[_of_shared_games(sure, twin[sure], twin, train, val)]
    of_val, of_train = _rows_of_scenes(val.scene), _rows_of_scenes(train.scene)
    for val_scene, train_scene in np.unique(np.stack([val.scene[sure], train.scene[twin[sure]]], axis=1), axis=0):
        rows, others = of_val(val_scene), of_train(train_scene)
        rows = rows[twin[rows] < 0]
        if not len(rows) or len(rows) * len(others) > MOST_PAIRS:
            continue
        for part in np.array_split(rows, min(len(rows), len(rows) * len(others) // PAIRS_AT_ONCE + 1)):
            apart = bits_apart(val.moving[part][:, None], train.moving[others][None])
            nearest = np.argsort(apart, axis=1, kind="stable")[:, :TRIED]
            for numbers in nearest.T:
                yield part, others[numbers]


def _difference(train: _Side, val: _Side, train_rows: Rows, val_rows: Rows) -> NDArray[np.float64]:
    """(n,) the difference of two frames over what moves in both: 0 for copies, about 1 for other moments, more for other places."""
    ratio = np.full(len(val_rows), np.inf)
    clips = val.clip[val_rows].astype(np.int64) * len(train.dataset.index.clips) + train.clip[train_rows]
    for chosen in _grouped(np.arange(len(val_rows)), clips):
        for part in np.array_split(chosen, len(chosen) // 1024 + 1):
            one, other = val_rows[part], train_rows[part]
            here = val.thumbnails(one)
            apart = (beyond_noise(here, train.thumbnails(other)) ** 2).sum(axis=1)
            moving = _movement(val, one, train, other, here)
            np.divide(apart, moving, out=apart, where=moving > 0)
            ratio[part] = np.where(moving > 0, apart, np.inf)
    return ratio


def _movement(val: _Side, val_rows: Rows, train: _Side, train_rows: Rows, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n,) what moves in both frames of each pair; 0 where that is too little to tell frames apart by.

    It is twice the lesser, for a foreign picture seems to move too much. A stray has no background, so it is taken to move as much as the
    other frame; and where one is strange in its clip, a difference of a tiny share of the picture's own contrast makes it a copy.
    """
    strays = val.scene[val_rows] < 0, train.scene[train_rows] < 0
    one, other = val.energy[val_rows].astype(np.float64), train.energy[train_rows].astype(np.float64)
    moving = 2 * np.minimum(np.where(strays[0], other, one), np.where(strays[1], one, other))
    moving[moving < 2 * LEAST_ENERGY] = 0.0
    contrast = (beyond_noise(pictures, np.zeros(1, np.uint8)) ** 2).sum(axis=1)
    contrast[contrast < LEAST_CONTRAST] = 0.0
    return np.where(val.strange[val_rows] | train.strange[train_rows], np.maximum(moving, contrast * COPIES / SAME), moving)


def _rows_of_scenes(scene: NDArray[np.int64]) -> Callable[[int], Rows]:
    """The rows of a scene, found without a pass over all."""
    order = np.argsort(scene, kind="stable")
    ordered = scene[order]
    return lambda number: order[np.searchsorted(ordered, number, "left") : np.searchsorted(ordered, number, "right")]


def _grouped(values: Rows, groups: NDArray[np.integer]) -> list[Rows]:
    """The values of each group, group after group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part for part in np.split(values[order], starts) if len(part)]


def _line(leak: _Leak, train: WindowDataset) -> str:
    """What the user reads."""
    owners, counts = np.unique(train.index.clip_of_row[leak.twins], return_counts=True)
    main = train.index.clips[owners[counts.argmax()]]
    games = sorted({train.index.clips[number].game for number in owners})
    first = np.flatnonzero(train.index.clip_of_row[leak.twins] == owners[counts.argmax()])[0]
    frame, twin = leak.rows[first] - leak.clip.first_row, leak.twins[first] - main.first_row
    more = f" and {len(owners) - 1} other clips" if len(owners) > 1 else ""
    beside = f"; {leak.beside} more stand beside these" if leak.beside else ""
    remedy = f"move {leak.clip.game} to train_games, or {', '.join(games)} to val_games"
    if len(leak.rows) < SEVERAL < leak.clip.length:
        remedy = "a few pictures, such as a title, are on both sides"
    return (
        f"data.split: {len(leak.rows)} of {leak.clip.length} frames of {leak.clip.id} (val_games) are copies or close neighbours of frames"
        f" of {main.id}{more} (train_games), such as frame {frame}, which is its frame {twin}{beside}; {remedy}"
    )

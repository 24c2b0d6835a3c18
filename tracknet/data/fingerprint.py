"""What a frame looks like in a few bytes, so that the same picture is known again in other footage.

Frames of one court look alike as a whole whatever is played on it. What tells them apart is what moves: the difference to the background of
the scene. It is kept as a code whose bits are signs of random projections (SimHash: Charikar, STOC 2002, section 3), so that the share of
bits in which two codes differ is the angle between the two differences, over 180 degrees.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from tracknet.data.background import FRAMES_USED
from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip

VERSION = 1  # to be raised whenever a frame would get other thumbnails or marks
THUMBNAIL_WH = (64, 36)
CODE_BITS = 512
NOISE = 5  # grey levels: what another encoder changes in a thumbnail stays below
SCENE_FRAMES = 10  # a scene of fewer frames has no background to speak of
SCENE_CELL = 4  # px of the thumbnail; scenes are told apart on cells of this size
SCENE_CHANGE = 16  # grey levels by which a cell changes where another scene is shown
SCENE_SHARE = 0.3  # of the cells; more of them change than players and a crowd change
SCENES_PER_CLIP = 1000  # bounds the time for a clip in which nothing is like anything else
FRAMES_AT_ONCE = 512  # keeps the working memory small

JUMP = 6.0  # times as far from both its neighbours as frames of the clip usually are: a foreign picture
LEAST_JUMP = 500.0  # squared grey levels; where nothing moves, a flicker is no jump
MARK = np.dtype(
    [("scene", "<i4"), ("strange", "?"), ("energy", "<f4"), ("moving", "u1", (CODE_BITS // 8,)), ("whole", "u1", (CODE_BITS // 8,))]
)


@dataclass(frozen=True)
class Fingerprints:
    """Of the frames of one clip.

    Attributes:
        thumbnails: (n, 36, 64) uint8, grey; a memory map.
        marks: (n,) of `MARK`: `scene` counts the scenes of the clip from 0, -1 for a frame of none (of fewer than `SCENE_FRAMES`);
            `strange` tells a frame of no scene, or one that does not fit between its neighbours; `energy` is how much differs from the
            background of its scene, 0 without a scene; `moving` the code of that difference; `whole` the code of the whole thumbnail.
    """

    thumbnails: NDArray[np.uint8]
    marks: NDArray[np.void]


def fingerprints(store: FrameStore, clip: Clip) -> Fingerprints:
    """Those of a prepared clip; made once, then kept in the cache beside its frames.

    Raises:
        DataError: the cache has lost the frames.
    """
    thumbnails = store.derived(
        clip, f"thumbnails{VERSION}", np.dtype(np.uint8), lambda: make_thumbnails(store.each_frame(clip), clip.length)
    )
    marks = store.derived(clip, f"marks{VERSION}", MARK, lambda: make_marks(thumbnails))
    return Fingerprints(thumbnails, marks)


def make_thumbnails(frames: Iterable[NDArray[np.uint8]], count: int) -> NDArray[np.uint8]:
    """(n, 36, 64) grey pictures of `count` RGB frames, each (H, W, 3)."""
    made = np.empty((count, THUMBNAIL_WH[1], THUMBNAIL_WH[0]), np.uint8)
    for number, frame in enumerate(frames):
        shrinks = frame.shape[1] >= THUMBNAIL_WH[0] and frame.shape[0] >= THUMBNAIL_WH[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        made[number] = cv2.cvtColor(cv2.resize(frame, THUMBNAIL_WH, interpolation=interpolation), cv2.COLOR_RGB2GRAY)
    return made


def make_marks(thumbnails: NDArray[np.uint8]) -> NDArray[np.void]:
    """The marks of a clip, (n,) of `MARK`, see `Fingerprints`."""
    marks = np.zeros(len(thumbnails), MARK)
    marks["scene"] = _scenes(thumbnails)
    marks["strange"] = (marks["scene"] < 0) | _jumps(thumbnails)
    projection = _projection()
    for part in _parts(len(thumbnails)):
        grey = thumbnails[part].reshape(len(thumbnails[part]), -1).astype(np.float32)
        marks["whole"][part] = _codes(grey - grey.mean(axis=1, keepdims=True), projection)
    for scene in range(marks["scene"].max(initial=-1) + 1):
        members = np.flatnonzero(marks["scene"] == scene)
        spread = members[np.linspace(0, len(members) - 1, min(FRAMES_USED, len(members))).round().astype(int)]
        background = np.median(thumbnails[spread], axis=0).astype(np.float32)
        for part in _parts(len(members)):
            rows = members[part]
            moving = beyond_noise(thumbnails[rows], background)
            marks["energy"][rows] = (moving**2).sum(axis=1)
            marks["moving"][rows] = _codes(moving, projection)
    return marks


def beyond_noise(one: NDArray[np.uint8], other: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 2304): the difference of thumbnails, less what an encoder or another brightness of the whole changes; signed, in grey levels."""
    difference: NDArray[np.float32] = one.astype(np.float32) - other
    difference = difference.reshape(len(one), -1)
    difference -= np.median(difference, axis=1, keepdims=True)
    beyond: NDArray[np.float32] = np.sign(difference) * np.maximum(np.abs(difference) - NOISE, 0)
    return beyond


def _jumps(thumbnails: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,) whether a frame is far from the one before and the one after."""
    if len(thumbnails) < SCENE_FRAMES:
        return np.ones(len(thumbnails), np.bool_)
    steps = np.concatenate(
        [(beyond_noise(thumbnails[part][1:], thumbnails[part][:-1]) ** 2).sum(axis=1) for part in _parts(len(thumbnails), 1)]
    )
    nearer = np.minimum(np.append(steps[0], steps), np.append(steps, steps[-1]))
    jumps: NDArray[np.bool_] = nearer > max(JUMP * float(np.median(steps)), LEAST_JUMP)
    return jumps


def _scenes(thumbnails: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(n,) the scene of each frame, whatever its place in the clip: frames may have been shuffled, and a clip may hold a foreign one."""
    height, width = (size // SCENE_CELL for size in thumbnails.shape[1:])
    cells = thumbnails.reshape(-1, height, SCENE_CELL, width, SCENE_CELL).mean(axis=(2, 4), dtype=np.float32)
    cells = cells.reshape(len(thumbnails), -1)
    scenes = np.full(len(cells), -1, np.int32)
    left, found = np.arange(len(cells)), 0
    for _ in range(SCENES_PER_CLIP):
        if not len(left):
            break
        same = (np.abs(cells[left] - cells[left[0]]) > SCENE_CHANGE).mean(axis=1) <= SCENE_SHARE
        if same.sum() >= SCENE_FRAMES:
            scenes[left[same]] = found
            found += 1
        left = left[~same]
    return scenes


@cache
def _projection() -> NDArray[np.float32]:
    """(2304, CODE_BITS), the same for ever: NumPy has frozen what `RandomState` draws."""
    drawn: NDArray[np.float64] = np.random.RandomState(0).standard_normal((THUMBNAIL_WH[0] * THUMBNAIL_WH[1], CODE_BITS))
    return drawn.astype(np.float32)


def _codes(values: NDArray[np.float32], projection: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(n, CODE_BITS / 8) packed signs."""
    return np.packbits(values @ projection > 0, axis=1)


def _parts(count: int, overlap: int = 0) -> list[slice]:
    return [slice(start, start + FRAMES_AT_ONCE + overlap) for start in range(0, count, FRAMES_AT_ONCE)]

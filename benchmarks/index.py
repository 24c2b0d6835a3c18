"""The index of a large data set: to make it, to load it, its memory, and what loader workers copy of it.

The data set is generated: clips of 200 frames, as TrackNet's mostly are, 100 clips a game. The first picture of a clip is a real JPEG, for
its size is read; the others are links to an empty file, which nothing opens. All files are in the page cache; cold means that no index has
been saved. The other side is one bare pass of the csv module over the same label files.
"""

import csv
import io
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ratios import Row, alternate, seconds, significant, spread_of, time_ratio

from tracknet.data.formats import read_clips
from tracknet.data.index import Clip
from tracknet.data.saved_index import TOO_YOUNG_S

SIZE_WH, CLIP_FRAMES, GAME_CLIPS = (1280, 720), 200, 100
SIZES = (10_000, 100_000, 1_000_000)
PAIRS, MEMORY_TIMES = 11, 3
LINKS = 50_000  # of one file; ext4 allows 65,000
SMALL_WH, BATCH = (16, 9), 256  # of the frames that workers hand over, so that labels are most of their work


def generate(root: Path, frames: int) -> None:
    """A data set of so many labelled frames."""
    first = io.BytesIO()
    Image.new("RGB", SIZE_WH).save(first, "JPEG")
    rows = [f"{n:04}.jpg,0,,,\n" if n % 13 == 0 else f"{n:04}.jpg,1,{7 * n % 1280},{3 * n % 720},0\n" for n in range(CLIP_FRAMES)]
    labels = "".join(["file name,visibility,x-coordinate,y-coordinate,status\n", *rows])
    for number in range(frames // CLIP_FRAMES):
        empty = root / f"empty{number * CLIP_FRAMES // LINKS}"
        empty.touch()
        clip = root / f"game{number // GAME_CLIPS + 1}" / f"Clip{number % GAME_CLIPS + 1}"
        clip.mkdir(parents=True)
        (clip / "Label.csv").write_text(labels)
        (clip / "0000.jpg").write_bytes(first.getvalue())
        for frame in range(1, CLIP_FRAMES):
            os.link(empty, f"{clip}/{frame:04}.jpg")


def games_of(root: Path) -> list[str]:
    """The names of its games."""
    return [f"game{number + 1}" for number in range(sum(path.is_dir() for path in root.iterdir()))]


def csv_pass(root: Path) -> Callable[[], object]:
    """Reads all rows of all label files, and does nothing with them."""
    tables = [str(path) for path in sorted(root.glob("game*/*/Label.csv"))]

    def run() -> None:
        for table in tables:
            with open(table, newline="") as file:
                for _ in csv.reader(file):
                    pass

    return run


def read(root: Path, cache: Path | None = None) -> Callable[[], object]:
    """Makes the index; with a cache folder, from the saved one."""
    games = games_of(root)
    return lambda: read_clips(root, games, "stop", cache)


def peak_gb(root: Path) -> float:
    """Of this process, once it has the index."""
    read(root)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def worker_memory(root: Path, workers: int) -> list[float]:
    """MB that each of so many loader workers has for itself alone, after they have read the labels and names of all frames."""
    from tracknet.data.augment import TrainingTransform
    from tracknet.data.dataset import WindowDataset
    from tracknet.data.frames import FrameStore
    from tracknet.data.loader import EpochLoader
    from tracknet.data.sampler import EpochBatchSampler
    from tracknet.schema.data import SequenceConfig
    from tracknet.schema.training import DataLoaderConfig

    class BlankFrames(FrameStore):
        """Frames without a cache; takes their names, as decoding would."""

        def window(self, clip: Clip, first: int, count: int) -> NDArray[np.uint8]:
            assert clip.frame_names is not None
            assert len(clip.frame_names[first : first + count]) == count
            return np.zeros((count, SMALL_WH[1], SMALL_WH[0], 3), np.uint8)

    index = read_clips(root, games_of(root), "stop")[0]
    plain = TrainingTransform(flip_prob=0.0, scale=(1.0, 1.0), brightness=0.0, reverse_prob=0.0, crop_wh=None, crop_ball_prob=0.0)
    store, sequence = BlankFrames(root, SMALL_WH), SequenceConfig(length=4, stride=4)
    dataset = WindowDataset(index, store, sequence, background=False, seed=0, training=plain)
    sampler = EpochBatchSampler(len(dataset), BATCH, 0, 1, seed=0, shuffle=True, drop_last=False)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # it finds 4 workers too many for few cores
    loader = EpochLoader(dataset, sampler, DataLoaderConfig(num_workers=workers, persistent_workers=True))
    rounds = max(1, SIZES[-1] // len(index) // 4)  # so that a worker of a small index does not work far less
    for epoch in range(rounds):
        for _ in loader.epoch(epoch):
            pass
    return [_private_mb(child.pid) for child in multiprocessing.active_children()]


def _private_mb(pid: int | None) -> float:
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:")) / 1e3


def _in_its_own_process(work: Callable[..., Any], *arguments: object) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _time_rows(root: Path, cache: Path) -> list[Row]:
    """Cold and warm against the csv module."""
    rows = []
    for what, target, kept in (("cold", "<= 5", None), ("warm (saved index)", "<= 0.5", cache)):
        mine, other = alternate(read(root, kept), csv_pass(root), pairs=PAIRS)
        remark = f"{significant(median(mine))} s against {significant(median(other))} s"
        what = f"index of {SIZES[-1]:,} labelled frames, {what}"
        rows.append(Row(what, "one pass of `csv.reader` over the same label files", target, time_ratio(mine, other), remark))
    return rows


def _linearity_row(roots: list[Path]) -> Row:
    """Time per frame at the largest size through that at the smallest; the middle one in the remark."""
    times: list[list[float]] = [[] for _ in roots]
    for _ in range(PAIRS):
        for taken, root, frames in zip(times, roots, SIZES, strict=True):
            action, repeats = read(root), max(1, SIZES[1] // frames)
            action()
            taken.append(seconds(lambda action=action, repeats=repeats: [action() for _ in range(repeats)]) / repeats / frames * 1e6)  # type: ignore[misc]
    remark = ", ".join(f"{frames:,}: {significant(median(taken))} us a frame" for frames, taken in zip(SIZES, times, strict=True))
    against = f"a frame of {SIZES[0]:,}"
    return Row(f"cold index, time per frame of {SIZES[-1]:,}", against, "linear, about 1", time_ratio(times[-1], times[0]), remark)


def _worker_row(small: Path, large: Path) -> Row:
    """What four workers have for themselves through what one has; how much of it the index is, by a small one."""
    index = read_clips(large, games_of(large), "stop")[0]
    names = sum(clip.frame_names.encoded.nbytes for clip in index.clips if clip.frame_names is not None)
    index_mb = (index.xy_px.nbytes + index.visibility.nbytes + names) / 1e6
    of_four, of_one, of_small = [], [], []
    for _ in range(MEMORY_TIMES):
        of_four.append(float(np.mean(_in_its_own_process(worker_memory, large, 4))))
        of_one.append(float(np.mean(_in_its_own_process(worker_memory, large, 1))))
        of_small.append(float(np.mean(_in_its_own_process(worker_memory, small, 4))))
    four, one, few = median(of_four), median(of_one), median(of_small)
    remark = (
        f"{four:.1f} MB against {one:.1f} MB; over {SIZES[0]:,} frames {few:.1f} MB, so the larger index costs a worker "
        f"{four - few:.1f} MB, of {index_mb:.0f} MB of labels and names"
    )
    what = f"memory that each of 4 loader workers has for itself (USS), after an epoch over {SIZES[-1]:,} frames"
    return Row(what, "the same with 1 worker", "no copy per worker", time_ratio(of_four, of_one), remark)


def rows() -> list[Row]:
    """All rows of this group."""
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(frames) for frames in SIZES]
        for root, frames in zip(roots, SIZES, strict=True):
            root.mkdir()
            taken = seconds(lambda root=root, frames=frames: generate(root, frames))  # type: ignore[misc]
        print(f"generated {SIZES[-1]:,} frames in {taken:.0f} s", flush=True)
        time.sleep(TOO_YOUNG_S + 1)
        found = _time_rows(roots[-1], Path(folder) / "cache")
        peaks = [_in_its_own_process(peak_gb, roots[-1]) for _ in range(MEMORY_TIMES)]
        found.append(Row(f"peak memory of a process that makes the index of {SIZES[-1]:,} frames, GB", "", "< 1", spread_of(peaks)))
        found += [_linearity_row(roots), _worker_row(roots[0], roots[-1])]
    return found


if __name__ == "__main__":
    for row in rows():
        print(f"{row.what} | {row.against} | {row.target} | {row.measured} | {row.remark}", flush=True)

"""From the disk to batches that the network takes: the first pass over clips, later passes, and what a plain copy takes.

Both sides of a row are processes of their own on the same cores, and take turns; the files that they read are in the page cache. A first
pass of ours finds an empty cache folder, and holds all that it takes to fill it: decoding, writing to the disk, background pictures,
checks, and then the batches.
"""

import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from footage import h264_clips, jpeg_clips
from numpy.typing import NDArray
from PIL import Image
from ratios import Action, Row, alternate, speed_up, spread_of
from sides import Side
from torch.utils.data import DataLoader, Dataset

from tracknet.data.augment import TrainingTransform
from tracknet.data.dataset import WindowDataset
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore
from tracknet.data.index import ClipIndex
from tracknet.data.loader import EpochLoader
from tracknet.data.prepare import prepare_clips
from tracknet.data.sampler import EpochBatchSampler
from tracknet.schema.data import SequenceConfig
from tracknet.schema.training import DataLoaderConfig

SIZE_WH, FRAMES, BATCH = (512, 288), 3, 8  # input px, frames of a window, windows of a batch
GAME = "game2"  # three clips, 280 frames of 1280x720
PLAIN = TrainingTransform(flip_prob=0.0, scale=(1.0, 1.0), brightness=0.0, reverse_prob=0.0, crop_wh=None, crop_ball_prob=0.0)
PEER = (
    "qaz812345/TrackNetV3 dataset.py, `Shuttlecock_Trajectory_Dataset.__getitem__`: PIL decode and resize of each frame of each window "
    "(without its float64 arithmetic and its heatmaps)"
)
PEER_VIDEO = (
    "OpenCV: `VideoCapture.read` from the first frame to the last, each once, `cv2.resize`, RGB; sliding windows as in "
    "qaz812345/TrackNetV3 dataset.py, `Video_IterableDataset`, in batches"
)


# ------------------------------------------------------------ ours


def first_pass(root: Path, workers: int) -> Action:
    """Everything into an empty cache, then one epoch of batches."""
    index = read_clips(root, [GAME], "stop")[0]

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            for _ in loader_of(prepared(index, Path(folder)), workers).epoch(0):
                pass

    return run


def later_pass(root: Path, cache: Path, workers: int) -> Action:
    """One epoch of batches, each in another order."""
    dataset, epoch = prepared(read_clips(root, [GAME], "stop")[0], cache), 0
    loader = loader_of(dataset, workers)

    def run() -> None:
        nonlocal epoch
        epoch += 1
        for _ in loader.epoch(epoch):
            pass

    return run


def prepared(index: ClipIndex, cache: Path) -> WindowDataset:
    """The windows of training, T = 3, stride 1, nothing drawn."""
    store = FrameStore(cache, SIZE_WH)
    prepare_clips(index.clips, store, "stop", (0, 1), lambda items: items)
    return WindowDataset(index, store, SequenceConfig(length=FRAMES), background=False, seed=0, training=PLAIN)


def loader_of(dataset: WindowDataset, workers: int) -> EpochLoader:
    """As in training: shuffled, whole epochs."""
    sampler = EpochBatchSampler(len(dataset), BATCH, 0, 1, seed=0, shuffle=True, drop_last=False)
    return EpochLoader(dataset, sampler, DataLoaderConfig(num_workers=workers))


# ------------------------------------------------------------ the others


class PeerWindows(Dataset[NDArray[np.uint8]]):
    """Reads as the peer does: every frame of a window from its file."""

    def __init__(self, root: Path) -> None:
        clips = [sorted(folder.glob("*.jpg")) for folder in sorted((root / GAME).iterdir())]
        self.windows = [clip[first : first + FRAMES] for clip in clips for first in range(len(clip) - FRAMES + 1)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        return np.concatenate([np.moveaxis(np.array(Image.open(path).resize(size=SIZE_WH)), -1, 0) for path in self.windows[number]])


def peer_pass(root: Path, workers: int) -> Action:
    """One epoch of the peer's batches."""
    loader = DataLoader(PeerWindows(root), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        for _ in loader:
            pass

    return run


def opencv_pass(root: Path) -> Action:
    """Batches of the sliding windows of every video."""
    videos = sorted((root / GAME).glob("*/*.mp4"))

    def run() -> None:
        for video in videos:
            frames = opencv_frames(video)
            windows = list(zip(*(frames[first:] for first in range(FRAMES)), strict=False))
            for first in range(0, len(windows), BATCH):
                np.array(windows[first : first + BATCH])

    return run


def opencv_frames(video: Path) -> list[NDArray[np.uint8]]:
    """Every frame of a video, resized, RGB."""
    capture, frames = cv2.VideoCapture(str(video)), []
    while (read := capture.read())[0]:
        frames.append(np.asarray(cv2.resize(read[1], SIZE_WH)[..., ::-1], dtype=np.uint8))
    capture.release()
    return frames


class PlainCopies(Dataset[torch.Tensor]):
    """Copies the bytes of as many windows, in random order, out of maps of the same files into fresh memory, and does nothing else."""

    def __init__(self, cache: Path, workers: int) -> None:
        width, height = SIZE_WH
        files = [path for path in sorted((cache / "frames").glob("*.npy")) if path.name.count(".") == 1]
        self.maps = [np.load(path, mmap_mode="r") for path in files]
        self.windows = [(number, first) for number, frames in enumerate(self.maps) for first in range(len(frames) - FRAMES + 1)]
        self.shape, self.shared = (FRAMES, height, width, 3), workers > 0

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        shape = (len(numbers), *self.shape)
        size = int(np.prod(shape))
        batch = torch.empty(0 if self.shared else shape, dtype=torch.uint8)
        if self.shared:
            batch = batch.set_(torch.UntypedStorage._new_shared(size)).view(shape)  # type: ignore[no-untyped-call]
        for place, number in zip(batch.numpy(), numbers, strict=True):
            clip, first = self.windows[number]
            place[:] = self.maps[clip][first : first + FRAMES]
        return batch


def plain_pass(cache: Path, workers: int) -> Action:
    """One epoch of plain copies."""
    copies, rng = PlainCopies(cache, workers), np.random.default_rng(0)
    order: list[list[int]] = []
    loader = DataLoader(copies, batch_size=None, sampler=order, collate_fn=_same, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        shuffled = rng.permutation(len(copies.windows))
        order[:] = [shuffled[first : first + BATCH].tolist() for first in range(0, len(shuffled), BATCH)]
        for _ in loader:
            pass

    return run


def _same(batch: Any) -> Any:
    return batch


# ------------------------------------------------------------ rows


def compared(what: str, against: str, target: str, pairs: int, mine: Side, other: Side, remark: str) -> Row:
    """A row: how many times as fast."""
    with mine, other:
        ours, theirs = alternate(mine, other, pairs=pairs)
    times = f"a pass {spread_of(ours).middle * 1e3:.0f} ms against {spread_of(theirs).middle * 1e3:.0f} ms"
    return Row(what, against, target, speed_up(ours, theirs), f"{times}; {remark}")


def rows() -> list[Row]:
    """All rows of this group; about four minutes."""
    with tempfile.TemporaryDirectory() as folder:
        root, videos, cache = Path(folder) / "jpeg", Path(folder) / "h264", Path(folder) / "cache"
        jpeg_clips(root, [GAME])
        h264_clips(videos, [GAME])
        index = read_clips(root, [GAME], "stop")[0]
        prepared(index, cache)
        size = f"{len(index)} frames of 1280x720 to {SIZE_WH[0]}x{SIZE_WH[1]}, T = {FRAMES}, stride 1, batches of {BATCH}"
        return [*_first_passes(root, size), *_later_passes(root, cache, size), *_videos(videos, size)]


def _first_passes(root: Path, size: str) -> list[Row]:
    cold = f"{size}; the cache folder is empty, the pictures are in the page cache; a frame is decoded once here, {FRAMES} times there"
    return [
        compared(
            f"first pass over JPEG clips to batches, {cores} core{'s' * (cores > 1)}",
            PEER,
            ">= 4x",
            5,
            Side(first_pass, cores, root, workers),
            Side(peer_pass, cores, root, workers),
            f"{cold}; {doing}",
        )
        for cores, workers, doing in (
            (1, 0, "one process and one thread each"),
            (2, 2, "two loader processes each; decoding here is two threads before them"),
        )
    ]


def _later_passes(root: Path, cache: Path, size: str) -> list[Row]:
    peer = compared(
        "later pass, page cache warm, 1 core",
        PEER,
        ">= 40x",
        5,
        Side(later_pass, 1, root, cache, 0),
        Side(peer_pass, 1, root, 0),
        f"{size}; shuffled; one process and one thread each",
    )
    alone = compared(
        "the same",
        "plain copies of the same bytes out of the same mapped files, in random order, into fresh memory",
        ">= 0.5x",
        31,
        Side(later_pass, 1, root, cache, 0),
        Side(plain_pass, 1, cache, 0),
        "one process and one thread each",
    )
    workers = compared(
        "the same through 2 loader processes, 2 cores",
        "the same copies in 2 processes of PyTorch's DataLoader, straight into fresh shared memory",
        ">= 0.5x",
        15,
        Side(later_pass, 2, root, cache, 2),
        Side(plain_pass, 2, cache, 2),
        "both pay for new pages of shared memory, which take longer than the copy",
    )
    return [peer, alone, workers]


def _videos(root: Path, size: str) -> list[Row]:
    return [
        compared(
            f"first pass over H.264 clips to batches, {cores} core{'s' * (cores > 1)}",
            PEER_VIDEO,
            ">= 1.8x",
            7,
            Side(first_pass, cores, root, 0),
            Side(opencv_pass, cores, root),
            f"{size}; the cache folder is empty; OpenCV's and FFmpeg's own choice of threads for these cores",
        )
        for cores in (1, 2)
    ]


if __name__ == "__main__":
    for row in rows():
        print(f"{row.what} | {row.against} | {row.target} | {row.measured} | {row.remark}", flush=True)

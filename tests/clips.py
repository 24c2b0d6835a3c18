"""Writes tiny clips in the layouts that are read, and finds the real footage."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HEADER = "file name,visibility,x-coordinate,y-coordinate,status"


def real(path: str) -> Path:
    """A file or folder of the real footage; skips the test where it is not on this machine."""
    found = SHARED_DATA / path
    if not found.exists():
        pytest.skip(f"real footage is not here: {found}")
    return found


def blob_picture(size_wh: tuple[int, int], xy: Sequence[float], sigma: float = 2.0) -> NDArray[np.uint8]:
    """(H, W, 3): a bright ball at `xy` on dark grey."""
    columns, rows = np.arange(size_wh[0]), np.arange(size_wh[1])[:, None]
    ball = np.exp(-((columns - xy[0]) ** 2 + (rows - xy[1]) ** 2) / (2 * sigma**2))
    return np.repeat(np.rint(30 + 200 * ball).astype(np.uint8)[..., None], 3, axis=-1)


def blob_centroid(picture: NDArray[np.uint8], dark: float = 30.0) -> NDArray[np.float64]:
    """Where the ball of a `blob_picture` is, (2,) x and y."""
    weight = np.clip(picture.astype(float).mean(axis=-1) - dark - 8, 0, None)
    rows, columns = np.indices(weight.shape)
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def path_of_ball(count: int, size_wh: tuple[int, int]) -> NDArray[np.float64]:
    """(count, 2): a ball that crosses the picture, away from its border."""
    along = (np.arange(count) + 1) / (count + 1)
    return np.stack([12 + along * (size_wh[0] - 24), 12 + (1 - along) * (size_wh[1] - 24)], axis=1)


def write_labels(path: Path, rows: Sequence[str], header: str = HEADER, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(end.join([header, *rows, ""]).encode())


def label_rows(xy: NDArray[np.float64], visibility: Sequence[int], suffix: str = ".png") -> list[str]:
    """Rows of Label.csv."""
    return [
        f"{number:04d}{suffix},{seen},{x:.3f},{y:.3f},0" if seen else f"{number:04d}{suffix},0,,,"
        for number, ((x, y), seen) in enumerate(zip(xy, visibility, strict=True))
    ]


def write_clip(folder: Path, count: int = 8, size_wh: tuple[int, int] = (64, 48), suffix: str = ".png") -> NDArray[np.float64]:
    """A clip in the TrackNet layout whose every frame shows the ball; returns where, (count, 2)."""
    xy = path_of_ball(count, size_wh)
    write_labels(folder / "Label.csv", label_rows(xy, [1] * count, suffix))
    for number, position in enumerate(xy):
        Image.fromarray(blob_picture(size_wh, position)).save(folder / f"{number:04d}{suffix}", quality=95)
    return xy


def write_video(path: Path, pictures: Sequence[NDArray[np.uint8]]) -> None:
    """H.264, nearly lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_games(root: Path, games: Sequence[str], clips: int = 1, count: int = 8, size_wh: tuple[int, int] = (64, 48)) -> None:
    """Games of clips in the TrackNet layout."""
    for game in games:
        for clip in range(1, clips + 1):
            write_clip(root / game / f"Clip{clip}", count, size_wh)


def first_frames_of_real_clip(root: Path, count: int = 12) -> Path:
    """`game1/Clip1` under `root`: the first frames of a real tennis clip, as links, with their labels."""
    source = real("tennis_jpeg/game1/Clip1")
    clip = root / "game1" / "Clip1"
    clip.mkdir(parents=True)
    for number in range(count):
        (clip / f"{number:04d}.jpg").symlink_to(source / f"{number:04d}.jpg")
    lines = (source / "Label.csv").read_text().splitlines(keepends=True)
    (clip / "Label.csv").write_text("".join(lines[: count + 1]))
    return clip


def real_video_clip(root: Path, name: str = "game1_Clip2") -> Path:
    """`game1/Clip2` under `root`: a real tennis clip as one video with its labels."""
    video = real(f"tennis/clips/{name}.mp4")
    game, clip_name = name.split("_")
    clip = root / game / clip_name
    clip.mkdir(parents=True)
    (clip / "clip.mp4").symlink_to(video)
    shutil.copy(real(f"tennis/labels/{game}/{clip_name}/Label.csv"), clip / "Label.csv")
    return clip

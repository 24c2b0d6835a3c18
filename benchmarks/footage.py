"""Real rallies for the benchmarks, where they are on this machine.

Looked for in `$TRACKNET_FOOTAGE`, else in `../shared/data/tennis` beside the checkout: `clips/gameX_ClipY.mp4` with
`labels/gameX/ClipY/Label.csv`.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av

JPEG_QUALITY = 90
FRAME_RATE = 30


class NoFootageError(Exception):
    """There is no footage, so a row is left out; says where it was looked for."""


def tennis_videos(games: Sequence[str] = ()) -> list[Path]:
    """The videos, 1280x720, of some games; of all where none is named.

    Raises:
        NoFootageError: there are none.
    """
    folder = Path(os.environ.get("TRACKNET_FOOTAGE") or Path(__file__).resolve().parents[2] / "shared" / "data" / "tennis")
    videos = sorted(folder.glob("clips/game*_Clip*.mp4"))
    chosen = [video for video in videos if not games or video.stem.split("_")[0] in games]
    if not chosen:
        raise NoFootageError(f"no {folder}/clips/game*_Clip*.mp4 of {', '.join(games) or 'any game'}; give the folder as TRACKNET_FOOTAGE")
    return chosen


def video_clips(root: Path, games: Sequence[str] = ()) -> Path:
    """The clips in the TrackNet layout with a video each (links): `root/game1/Clip1/clip.mp4` and `Label.csv`."""
    for video in tennis_videos(games):
        folder = _labelled_folder(video, root)
        (folder / "clip.mp4").symlink_to(video)
    return root


def h264_clips(root: Path, games: Sequence[str] = ()) -> Path:
    """As `video_clips`, each video encoded anew as H.264 with x264's own settings; those of the data are MPEG-4 Part 2."""
    for video in tennis_videos(games):
        with av.open(str(video)) as container:
            write_h264(_labelled_folder(video, root) / "clip.mp4", container.decode(video=0))
    return root


def write_h264(path: Path, frames: Iterable[av.VideoFrame]) -> None:
    """Frames of 1280x720 as a video of 30 frames per second."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number, frame in enumerate(frames):
            picture = frame.reformat(format="yuv420p")
            picture.pts, picture.time_base = number, Fraction(1, FRAME_RATE)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())


def jpeg_clips(root: Path, games: Sequence[str] = ()) -> Path:
    """The clips as the data set ships them: `root/game1/Clip1/0000.jpg ...` and `Label.csv`, JPEG at quality 90."""
    for video in tennis_videos(games):
        folder = _labelled_folder(video, root)
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                frame.to_image().save(folder / f"{number:04}.jpg", quality=JPEG_QUALITY)
    return root


def _labelled_folder(video: Path, root: Path) -> Path:
    game, clip = video.stem.split("_")
    folder = root / game / clip
    folder.mkdir(parents=True)
    shutil.copy(video.parents[1] / "labels" / game / clip / "Label.csv", folder)
    return folder


if __name__ == "__main__":
    jpeg_clips(Path(sys.argv[1]), sys.argv[2:])

"""Draws games into the cache, each of them once."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tracknet.data.synthetic.clip import Label, make_clip
from tracknet.data.synthetic.venue import make_venue
from tracknet.errors import ConfigError, DataError
from tracknet.schema.data import SyntheticConfig

_HEADER = "file name,visibility,x-coordinate,y-coordinate,status"
_JPEG_QUALITY = 92


def make_rallies(config: SyntheticConfig, games: Sequence[str], cache_dir: Path) -> Path:
    """Makes sure that the named games are drawn, as `<root>/<game>/Clip1/0000.jpg ... Label.csv`.

    A game depends on the configuration and on its own name alone. It is made beside its place and renamed, so that a reader never sees a
    half-written one and several processes may ask for the same game at once.

    Args:
        config: seed, size in px, number and length of the clips.
        games: names of the games; each gets a court and a camera of its own.
        cache_dir: the drawn games stay here, in a folder for each configuration and version of this package.

    Returns:
        The root: the folder that holds the games.

    Raises:
        ConfigError: a game's name cannot be the name of a folder.
        DataError: the cache cannot be written.
    """
    for game in games:
        if not game or game.startswith(".") or Path(game).name != game:
            raise ConfigError(f"data.split: {game!r} cannot be the name of a game; give the name of a folder, such as 'court1'")
    root = cache_dir / "synthetic" / _key(config)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for game in games:
            if not (root / game).is_dir():
                _make_game(config, game, root)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write the synthetic rallies to {root}: {reason}; set data.cache_dir to a folder with room") from error
    return root


def _key(config: SyntheticConfig) -> str:
    """A name for the pictures that this configuration and this very code give."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]


def _generator(config: SyntheticConfig, game: str, clip: int) -> np.random.Generator:
    """Chance that depends on nothing but the seed, the game's name and the clip's number (0 is the venue)."""
    return np.random.default_rng([config.seed, int.from_bytes(hashlib.sha256(game.encode()).digest()[:8]), clip])


def _make_game(config: SyntheticConfig, game: str, root: Path) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{game}.", dir=root))
    try:
        width, height = config.size
        venue = make_venue(_generator(config, game, 0), (width, height))
        for number in range(1, config.clips_per_game + 1):
            folder = beside / game / f"Clip{number}"
            folder.mkdir(parents=True)
            clip = make_clip(_generator(config, game, number), venue, config.frames_per_clip)
            rows = [_HEADER]
            for frame in range(config.frames_per_clip):
                picture, label = clip.draw(frame)
                name = f"{frame:04d}.jpg"
                (folder / name).write_bytes(_jpeg(picture))
                rows.append(_row(name, label))
            (folder / "Label.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        _move(beside / game, root / game)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _move(made: Path, place: Path) -> None:
    try:
        os.rename(made, place)
    except OSError:
        if not place.is_dir():  # else another process was quicker; its pictures are the same
            raise


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done
    return data.tobytes()


def _row(name: str, label: Label) -> str:
    if label.xy_px is None:
        return f"{name},{label.visibility},,,"
    x, y = label.xy_px
    return f"{name},{label.visibility},{x:.2f},{y:.2f},{label.status}"

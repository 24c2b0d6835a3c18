"""Names of a prediction's files."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracknet.errors import UserError, shown
from tracknet.inference.summary import read_summary
from tracknet.inference.track import COLUMNS


@dataclass(frozen=True)
class Outputs:
    """The files of one prediction."""

    folder: Path
    name: str

    @property
    def csv(self) -> Path:
        """The table."""
        return self.folder / f"{self.name}.csv"

    @property
    def part(self) -> Path:
        """The peaks found so far; gone when the table stands."""
        return self.folder / f"{self.name}.csv.part"

    @property
    def summary(self) -> Path:
        """The JSON beside the table."""
        return self.folder / f"{self.name}.json"

    @property
    def overlay(self) -> Path:
        """The video with the ball."""
        return self.folder / f"{self.name}.overlay.mp4"

    def check_theirs(self, source: Path, about: Mapping[str, str], overlay: bool) -> None:
        """Nothing but an earlier prediction of the same footage is written over.

        Args:
            source: the footage.
            about: its `path` and `fingerprint`, as in the summary; one of them must be that of before.
            overlay: whether one will be written.

        Raises:
            UserError: names the file that is something else.
        """
        remedy = "choose another --output"
        summary = read_summary(self.summary)
        if os.path.lexists(self.summary) and summary is None:
            raise UserError(f"{self.summary}: is there and no prediction; {remedy}")
        if os.path.lexists(self.csv) and not _starts_as_track(self.csv):
            raise UserError(f"{self.csv}: is there and no prediction; {remedy}")
        if summary is not None and not any(summary["source"].get(key) == value for key, value in about.items()):
            raise UserError(f"{self.csv}: is the prediction of {shown(summary['source'].get('path'))}; delete it, or {remedy}")
        if os.path.realpath(self.overlay) == os.path.realpath(source):
            raise UserError(f"{self.overlay}: is the video itself; {remedy}")
        if overlay and os.path.lexists(self.overlay) and not (_owns_overlay(summary) and self.overlay.is_file()):
            raise UserError(f"{self.overlay}: is there and no overlay of this program; move it, or {remedy}")

    def drop_overlay(self) -> None:
        """Removes the overlay of an earlier prediction, for it does not show what a new table says. Raises OSError."""
        if _owns_overlay(read_summary(self.summary)):
            self.overlay.unlink(missing_ok=True)


def _owns_overlay(summary: Mapping[str, Any] | None) -> bool:
    return summary is not None and bool(summary.get("overlay"))


def _starts_as_track(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline(1000).strip() == ",".join(COLUMNS).encode()
    except OSError:
        return False


def name_outputs(sources: Sequence[Path], folder: Path) -> list[Outputs]:
    """One name per source: its own without its ending, and with its folders' names in front, or with the ending, where two would be alike.

    Raises:
        UserError: two are alike all the same.
    """
    places = [Path(os.path.abspath(source)) for source in sources]  # without `..`, which is no name
    names = [_own_name(place) for place in places]
    for number in range(1, max((len(place.parts) for place in places), default=0)):
        alike = {name for name, count in Counter(names).items() if count > 1}
        names = [_with_folders(place, number) if name in alike else name for place, name in zip(places, names, strict=True)]
    names = [place.name if names.count(name) > 1 else name for place, name in zip(places, names, strict=True)]
    if len(set(names)) < len(names):
        alike = {name for name, count in Counter(names).items() if count > 1}
        raise UserError(f"two videos would both be written as {min(alike)}; give each its own --output")
    return [Outputs(folder, name) for name in names]


def _with_folders(place: Path, number: int) -> str:
    return "_".join([*place.parent.parts[1:][-number:], _own_name(place)])


def _own_name(place: Path) -> str:
    return place.name if os.path.isdir(place) else place.stem  # not Path.is_dir, which raises OSError for a name that is too long

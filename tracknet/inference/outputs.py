"""Names of a prediction's files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracknet.errors import UserError
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

    def check_theirs(self, source: Path, about: Mapping[str, str]) -> None:
        """Nothing but an earlier prediction of the same footage is written over.

        Args:
            source: the footage.
            about: its `path` and `fingerprint`, as in the summary; one of them must be that of before.

        Raises:
            UserError: names the file that is something else.
        """
        remedy = "choose another --output"
        summary = read_summary(self.summary)
        if self.summary.exists() and summary is None:
            raise UserError(f"{self.summary}: is there and no prediction; {remedy}")
        if self.csv.exists() and not _starts_as_track(self.csv):
            raise UserError(f"{self.csv}: is there and no prediction; {remedy}")
        if summary is not None and not summary["source"].items() & about.items():
            raise UserError(f"{self.csv}: is the prediction of {summary['source']['path']}; delete it, or {remedy}")
        if self.overlay.resolve() == source.resolve():
            raise UserError(f"{self.overlay}: is the video itself; {remedy}")


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
    places = [source.absolute() for source in sources]
    names = [place.name if place.is_dir() else place.stem for place in places]
    for number in range(1, max((len(place.parts) for place in places), default=0)):
        alike = {name for name, count in Counter(names).items() if count > 1}
        names = [_with_folders(place, number) if name in alike else name for place, name in zip(places, names, strict=True)]
    names = [place.name if names.count(name) > 1 else name for place, name in zip(places, names, strict=True)]
    if len(set(names)) < len(names):
        alike = {name for name, count in Counter(names).items() if count > 1}
        raise UserError(f"two videos would both be written as {min(alike)}; give each its own --output")
    return [Outputs(folder, name) for name in names]


def _with_folders(place: Path, number: int) -> str:
    own = place.name if place.is_dir() else place.stem
    return "_".join([*place.parent.parts[1:][-number:], own])

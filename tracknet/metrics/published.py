"""Rows of results that others published together with their counts, and whether a row agrees with its own counts."""

from dataclasses import dataclass
from decimal import Decimal

from tracknet.metrics.outcomes import Counts

ROUNDING_OF_FLOATS = 1e-9
"""Percent; a score that lies exactly between two stated values may have been rounded either way."""


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table of results.

    Attributes:
        name: of the model and the test, as the table has it.
        source: where the table stands.
        frames: the stated number of test frames; None where none is stated.
        counts: the stated outcomes.
        stated: the stated scores in percent, by the names of the properties of `Counts`, as text since the digits say how it was rounded.
    """

    name: str
    source: str
    frames: int | None
    counts: Counts
    stated: dict[str, str]


def contradictions(row: PublishedRow) -> list[str]:
    """What a row states that its counts do not give, one line each; empty for a row that agrees.

    A stated score may differ from the one of the counts by half a unit of its last digit, which is what rounding can do. Recall is
    TP / (TP + FN) and F1 comes from the counts, not from a precision and recall that were rounded before.
    """
    lines = []
    counts = row.counts
    total = counts.tp + counts.fp1 + counts.fp2 + counts.tn + counts.fn
    if row.frames is not None and total != row.frames:
        lines.append(f"the counts add up to {total} frames, not {row.frames}")
    for score, text in row.stated.items():
        percent = 100 * getattr(counts, score)
        if abs(percent - float(text)) > _half_unit(text) + ROUNDING_OF_FLOATS:
            lines.append(f"{score} is {percent:.2f} by the counts, not {text}")
    return lines


def _half_unit(text: str) -> float:
    exponent = Decimal(text).as_tuple().exponent
    return 0.5 * 10.0 ** int(exponent)


def _row(name: str, source: str, frames: int | None, counts: tuple[int, int, int, int, int], percents: str) -> PublishedRow:
    """A row with its columns in the order of these tables: TP TN FP1 FP2 FN, then accuracy, precision, recall and F1 where stated."""
    tp, tn, fp1, fp2, fn = counts
    stated = dict(zip(("accuracy", "precision", "recall", "f1"), percents.split(), strict=False))
    return PublishedRow(name, source, frames, Counts(tp=tp, fp1=fp1, fp2=fp2, tn=tn, fn=fn), stated)


_PAPER = "TrackNetV2 (Sun et al., ICPAI 2020)"
_V4 = "TrackNetV4/TrackNetV4 docs/RESULT.md"
_FORK = "asigatchov/TrackNetV4 docs/RESULT.md"

PUBLISHED = (
    _row("TrackNetV2 (3 in 1 out), badminton", _PAPER, None, (29129, 4264, 468, 358, 4973), "85.2 97.2 85.4"),
    _row("TrackNetV2, tennis by game", _V4, 17193, (15863, 396, 142, 17, 775), "94.6 99.0 95.7 97.3"),
    _row("TrackNetV2 (+Motion), tennis by game", _V4, 17193, (15973, 389, 167, 24, 640), "95.2 98.8 96.1 97.5"),
    _row("TrackNetV2, tennis by clip", _V4, 17760, (16195, 393, 163, 25, 993), "93.4 98.9 94.2 96.4"),
    _row("TrackNetV2 (+Motion), tennis by clip", _V4, 17760, (16243, 399, 199, 19, 778), "94.4 98.7 95.5 97.0"),
    _row("YOLOv7, badminton", _V4, 13064, (9447, 1514, 751, 218, 1134), "72.3 78.5 60.0 68.0"),
    _row("TrackNetV2 (3 in 1 out), badminton", _V4, 39192, (29129, 4264, 468, 358, 4973), "85.2 92.2 85.4 88.6"),
    _row("TrackNetV2 (3 in 3 out), badminton", _V4, 37794, (26324, 6013, 438, 393, 4526), "85.6 92.0 85.3 88.5"),
    _row("TrackNetV2, badminton", _V4, 37794, (26529, 5993, 523, 511, 4731), "84.6 90.8 84.8 87.7"),
    _row("TrackNetV2 (+Motion), badminton", _V4, 37794, (26878, 5834, 565, 672, 4845), "86.6 90.7 85.1 87.8"),
    _row("TrackNetV3 (3 in 3 out), badminton", _V4, 10836, (8869, 1378, 55, 66, 468), "94.6 99.2 95.0 96.8"),
    _row("TrackNetV3 (+Motion), badminton", _V4, 10836, (8919, 1387, 55, 16, 459), "95.1 99.2 95.1 97.1"),
    _row("TrackNetV2, new tennis", _FORK, 8472, (6137, 425, 417, 175, 1318), "77.46 91.20 82.32 86.53"),
    _row("TrackNetV4 Type A, new tennis", _FORK, 8472, (6344, 406, 331, 194, 1197), "79.67 92.36 84.13 88.05"),
    _row("TrackNetV4 Type B, new tennis", _FORK, 8472, (6317, 453, 265, 147, 1290), "79.91 93.88 83.04 88.13"),
)
"""Every row with counts that the peers' papers and result pages were found to have."""

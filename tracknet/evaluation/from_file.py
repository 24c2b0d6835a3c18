"""Scores from a file of predictions and the labels alone: no network, no torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracknet.data.index import ClipIndex
from tracknet.evaluation.files import write_together
from tracknet.evaluation.predictions import fit_to_labels, parse_predictions, read_bytes
from tracknet.evaluation.scores import score
from tracknet.metrics.protocols import Protocol

PREDICTIONS = "predictions.csv"
SCORES = "scores.json"


def score_file(
    path: Path,
    index: ClipIndex,
    protocols: Sequence[Protocol],
    seed: int,
    output: Path,
    *,
    record: Mapping[str, Any],
    notes: Sequence[str] = (),
    diagnosis: str | None = None,
) -> dict[str, Any]:
    """Scores a file of predictions and writes scores.json.

    Args:
        path: the file.
        index: the labels.
        protocols: the rules.
        seed: of the bootstrap.
        output: folder of scores.json.
        record: what was evaluated on what, for JSON; it comes first in the file.
        notes: lines that belong beside the scores.
        diagnosis: what is wrong with the model as a whole.

    Returns:
        What scores.json holds.

    Raises:
        ConfigError: the file is not there.
        DataError: it is broken, or does not answer for the split.
        UserError: scores.json cannot be written.
    """
    content = read_bytes(path)
    predictions, left_out = fit_to_labels(parse_predictions(content, path), index, path)
    scores = {
        **record,
        "predictions": {"file": str(path), "sha256": hashlib.sha256(content).hexdigest()},
        "notes": [*notes, *left_out],
        "diagnosis": diagnosis,
        **score(predictions, index, protocols, seed),
    }
    write_together({output / SCORES: json.dumps(scores, indent=2, allow_nan=False) + "\n"})
    return scores

"""Preview pictures of an evaluation: frame, prediction and truth side by side."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from tracknet.data.index import NO_LABEL, ClipIndex
from tracknet.evaluation.detection import Preview
from tracknet.geometry import resize_points
from tracknet.metrics.outcomes import count_outcomes
from tracknet.metrics.protocols import TRACKNETV2
from tracknet.visualize import draw_preview


def draw_previews(previews: Sequence[Preview], index: ClipIndex, threshold: float) -> dict[str, NDArray[np.uint8]]:
    """Draws each preview with its outcome by the TrackNetV2 rule.

    Args:
        previews: of frames of the index.
        index: their labels.
        threshold: a peak at or above it is a detection.

    Returns:
        RGB (H', W', 3) pictures by name, such as `game8-Clip1-0012`.
    """
    return {_name(preview, index): _draw(preview, index, threshold) for preview in previews}


def _name(preview: Preview, index: ClipIndex) -> str:
    clip = index.clips[index.clip_of_row[preview.row]]
    return f"{clip.game}-{clip.name}-{preview.row - clip.first_row:04}"


def _draw(preview: Preview, index: ClipIndex, threshold: float) -> NDArray[np.uint8]:
    clip = index.clips[index.clip_of_row[preview.row]]
    input_wh = (preview.frame.shape[1], preview.frame.shape[0])
    truth_px, visibility = index.xy_px[preview.row].astype(np.float64), index.visibility[preview.row]
    detected = preview.score >= threshold
    outcome = ""
    if visibility != NO_LABEL:
        found_px = resize_points(preview.xy_input, input_wh, clip.size_wh)
        counts = count_outcomes(TRACKNETV2, found_px[None], np.array([detected]), truth_px[None], visibility[None], clip.size_wh)
        outcome = next(name.upper() for name, count in asdict(counts).items() if count)
    return draw_preview(
        preview.frame,
        preview.probability,
        predicted_xy_input=preview.xy_input if detected else None,
        score=preview.score,
        truth_xy_input=resize_points(truth_px, clip.size_wh, input_wh) if visibility >= 1 else None,
        outcome=outcome,
        title=f"{clip.id} frame {preview.row - clip.first_row}",
    )

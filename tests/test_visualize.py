"""Preview pictures: the marks stand where the points are, at every size of frame, and the caption is drawn."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tracknet.visualize import BACKDROP, CAPTION_HEIGHT, FRAME_BOX_WH, GREEN, RED, ZOOM, draw_preview

REAL_FRAME = Path(__file__).parents[2] / "shared/data/tennis_jpeg/game1/Clip1/0003.jpg"
FRAME = np.full((288, 512, 3), 90, np.uint8)
NOTHING = {"predicted_xy_input": None, "score": None, "truth_xy_input": None, "outcome": "", "title": ""}


def middle_of(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Middle (x, y) of the box around all pixels near to a colour."""
    rows, columns = np.nonzero(np.abs(picture.astype(int) - colour).max(axis=2) < 40)
    assert len(rows), "the mark is not there"
    return np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / 2


def large_panel(picture: np.ndarray) -> np.ndarray:
    return picture[CAPTION_HEIGHT:, : FRAME_BOX_WH[0]]


@settings(max_examples=25, deadline=None)
@given(st.floats(30, 480), st.floats(30, 250), st.floats(30, 480), st.floats(30, 250))
def test_marks_stand_on_the_points(x: float, y: float, other_x: float, other_y: float) -> None:
    truth, predicted = np.array([x, y]), np.array([other_x, other_y])
    for key, colour, point in (("truth_xy_input", GREEN, truth), ("predicted_xy_input", RED, predicted)):
        picture = draw_preview(FRAME, None, **(NOTHING | {key: point}))
        assert np.abs(middle_of(large_panel(picture), colour) - ((point + 0.5) * 1.5 - 0.5)).max() <= 1.0


@given(st.integers(20, 900), st.integers(20, 900))
@example(20, 786)  # panels of five columns
@settings(max_examples=25, deadline=None)
def test_any_frame_size_gives_the_same_size_with_and_without_content(width: int, height: int) -> None:
    frame = np.zeros((height, width, 3), np.uint8)
    empty = draw_preview(frame, None, **NOTHING)
    marks = {"predicted_xy_input": (0, 0), "truth_xy_input": (width - 1, height - 1)}
    full = draw_preview(frame, np.ones((9, 16)), **marks, score=1.0, outcome="FP1", title="x" * 300)
    assert empty.shape == full.shape
    assert empty.dtype == full.dtype == np.uint8


def test_the_ball_is_enlarged_about_the_truth() -> None:
    frame = FRAME.copy()
    frame[100, 200] = (255, 255, 0)  # one pixel
    picture = draw_preview(frame, None, **(NOTHING | {"truth_xy_input": (200, 100)}))
    zoom = picture[-214:, -384:]
    yellow = np.abs(zoom.astype(int) - (255, 255, 0)).max(axis=2) < 120
    assert yellow.sum() > 0.4 * ZOOM**2
    assert np.abs(middle_of(zoom, GREEN) - (np.array([384, 214]) - 1) / 2).max() <= 1.0


def test_a_far_prediction_and_the_truth_are_both_enlarged() -> None:
    picture = draw_preview(FRAME, None, **(NOTHING | {"truth_xy_input": (50, 50), "predicted_xy_input": (400, 200)}))
    zoom = picture[-214:, -384:]
    assert abs(middle_of(zoom[:, :190], GREEN)[0] - 94.5) <= 1.5
    assert abs(middle_of(zoom[:, 194:], RED)[0] - 94.5) <= 1.5


def test_the_heatmap_shines_where_it_is_high() -> None:
    probability = np.zeros((72, 128), np.float32)
    probability[50:54, 100:104] = 1.0
    heat = draw_preview(FRAME, probability, **NOTHING)[CAPTION_HEIGHT:, -384:][:214]
    red_less_blue = heat[..., 0].astype(int) - heat[..., 2]
    row, column = np.unravel_index(red_less_blue.argmax(), red_less_blue.shape)
    assert abs(column - 101.5 * 3) < 9
    assert abs(row - 51.5 * 214 / 72) < 9


@pytest.mark.parametrize(("outcome", "colour"), [("TP", GREEN), ("TN", GREEN), ("FP1", RED), ("FP2", RED), ("FN", RED)])
def test_the_caption_says_the_outcome_in_its_colour(outcome: str, colour: tuple[int, int, int]) -> None:
    caption = draw_preview(FRAME, None, **(NOTHING | {"outcome": outcome}))[:CAPTION_HEIGHT, :60]
    middle_of(caption, colour)
    empty = draw_preview(FRAME, None, **NOTHING)[:CAPTION_HEIGHT, :60]
    assert (empty == BACKDROP).all()


def test_a_real_frame_is_recognisable_and_unchanged() -> None:
    if not REAL_FRAME.exists():
        pytest.skip(f"{REAL_FRAME} is not there")
    frame = cv2.cvtColor(cv2.resize(cv2.imread(str(REAL_FRAME)), (512, 288), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
    before = frame.copy()
    picture = draw_preview(frame, None, **(NOTHING | {"truth_xy_input": (239.0, 148.0)}))
    assert (frame == before).all()
    shrunk = cv2.resize(large_panel(picture), (512, 288), interpolation=cv2.INTER_AREA)
    assert np.median(np.abs(shrunk.astype(int) - frame)) <= 2

"""Preview pictures: a frame with truth and prediction, the network's heatmap over it, and the ball enlarged."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from tracknet.geometry import resize_points, scaling, translation

Picture = NDArray[np.uint8]
Point = NDArray[np.float64]

FRAME_BOX_WH = (768, 432)  # the frame is scaled to fit here; the two panels beside it are half as large
COMPARISON_BOX_WH = (640, 360)
ZOOM = 8  # of the enlarged panel: a ball of 4 input px becomes 32 px
TOLERANCE_PX = 4  # radius of the truth's circle where the ball is enlarged: a prediction inside counts as found (TrackNetV2)
MARK_RADIUS = 11  # px of the large picture, where a ball to scale would be hidden by its own mark
GREEN, RED, BLACK, WHITE, BACKDROP = (60, 235, 90), (255, 60, 60), (0, 0, 0), (255, 255, 255), (24, 24, 28)
CAPTION_HEIGHT, FONT_SIZE, GAP = 34, 17, 4


def draw_preview(
    frame: Picture,
    probability: NDArray[np.floating] | None,
    *,
    predicted_xy_input: ArrayLike | None,
    score: float | None,
    truth_xy_input: ArrayLike | None,
    outcome: str,
    title: str,
) -> Picture:
    """Draws one frame's result: on the left the frame, on the right the heatmap over the frame and the ball enlarged.

    Args:
        frame: RGB (H, W, 3), as the network got it.
        probability: (h, w) heatmap, 0 to 1, of the whole frame; None leaves the panel dark.
        predicted_xy_input: (2,) position in input px, drawn as a red cross; None where the network sees no ball.
        score: probability of the highest peak, 0 to 1; also of one below the threshold.
        truth_xy_input: (2,) labelled position in input px, drawn as a green circle; None where no ball is visible.
        outcome: "TP", "FP1", "FP2", "FN" or "TN", or "" for a frame without a label.
        title: which frame this is.

    Returns:
        RGB (H', W', 3); the size depends on the frame's size alone.
    """
    truth, predicted = _point(truth_xy_input), _point(predicted_xy_input)
    large = _large_frame(frame, truth, predicted, FRAME_BOX_WH)
    large_wh = (large.shape[1], large.shape[0])
    panel_wh = (large_wh[0] // 2, (large_wh[1] - GAP) // 2)
    heat = _heat_panel(frame, probability, panel_wh)
    zoom = _zoom_panel(frame, truth, predicted, probability, panel_wh)
    canvas = np.full((large_wh[1] + CAPTION_HEIGHT, large_wh[0] + GAP + panel_wh[0], 3), BACKDROP, np.uint8)
    body = canvas[CAPTION_HEIGHT:]
    body[:, : large_wh[0]] = large
    body[: panel_wh[1], large_wh[0] + GAP :] = heat
    body[-panel_wh[1] :, large_wh[0] + GAP :] = zoom
    heat_at, zoom_at = (large_wh[0] + GAP, CAPTION_HEIGHT), (large_wh[0] + GAP, canvas.shape[0] - panel_wh[1])
    return _with_text(canvas, outcome, score, title, {"heatmap": heat_at, f"x{ZOOM}": zoom_at})


def draw_comparison(frame: Picture, *, predicted_xy_input: ArrayLike | None, truth_xy_input: ArrayLike | None) -> Picture:
    """Draws truth and prediction in one frame, narrow enough for a telephone: the whole frame above, the ball enlarged below it.

    Args:
        frame: RGB (H, W, 3).
        predicted_xy_input: (2,) position in px of the frame, drawn as a red cross; None where there is none.
        truth_xy_input: (2,) position in px of the frame, drawn as a green circle; None where there is no ball.

    Returns:
        RGB (H', W', 3); the size depends on the frame's size alone.
    """
    truth, predicted = _point(truth_xy_input), _point(predicted_xy_input)
    large = _large_frame(frame, truth, predicted, COMPARISON_BOX_WH)
    zoom = _zoom_panel(frame, truth, predicted, None, (large.shape[1], large.shape[0] // 2))
    return np.concatenate([large, np.full((GAP, large.shape[1], 3), BACKDROP, np.uint8), zoom])


def _large_frame(frame: Picture, truth: Point | None, predicted: Point | None, box_wh: tuple[int, int]) -> Picture:
    """The whole frame, scaled to fit into the box, sides even, with the marks."""
    size_wh = (frame.shape[1], frame.shape[0])
    scale = min(box_wh[0] / size_wh[0], box_wh[1] / size_wh[1])
    large_wh = (2 * round(size_wh[0] * scale / 2), 2 * round(size_wh[1] * scale / 2))
    large = np.asarray(cv2.resize(frame, large_wh, interpolation=cv2.INTER_CUBIC), np.uint8)
    _mark(large, truth, predicted, lambda xy: np.asarray(resize_points(xy, size_wh, large_wh), np.float64), MARK_RADIUS)
    return large


def _point(xy: ArrayLike | None) -> Point | None:
    return None if xy is None else np.asarray(xy, np.float64).reshape(2)


def _mark(picture: Picture, truth: Point | None, predicted: Point | None, place: Callable[[Point], Point], radius: int) -> None:
    """Draws the marks in place: circle and cross leave the ball itself free; a dark rim keeps them visible on any court."""
    for rim, thickness in ((True, 4), (False, 2)):
        if truth is not None:
            x, y = np.rint(place(truth)).astype(int).tolist()
            cv2.circle(picture, (x, y), radius, BLACK if rim else GREEN, thickness, cv2.LINE_AA)
        if predicted is not None:
            x, y = np.rint(place(predicted)).astype(int).tolist()
            inner, outer = radius * 3 // 4, radius + 8
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                start, end = (x + dx * inner, y + dy * inner), (x + dx * outer, y + dy * outer)
                cv2.line(picture, start, end, BLACK if rim else RED, thickness, cv2.LINE_AA)


def _heat_panel(frame: Picture, probability: NDArray[np.floating] | None, panel_wh: tuple[int, int]) -> Picture:
    """The heatmap's colours over a dimmed grey frame, brighter where the probability is higher."""
    if probability is None:
        return np.full((panel_wh[1], panel_wh[0], 3), BACKDROP, np.uint8)
    grey = cv2.cvtColor(cv2.resize(frame, panel_wh, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    heat = cv2.resize(probability.astype(np.float32), panel_wh, interpolation=cv2.INTER_LINEAR).clip(0, 1)
    colours = cv2.cvtColor(cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    weight = np.sqrt(heat)[..., None]  # faint responses matter too: they are the false positives to come
    return np.asarray(grey[..., None] * 0.55 * (1 - weight) + colours * weight, np.uint8)


def _zoom_panel(
    frame: Picture,
    truth: Point | None,
    predicted: Point | None,
    probability: NDArray[np.floating] | None,
    panel_wh: tuple[int, int],
) -> Picture:
    """The surroundings of the ball, `ZOOM` times as large: of truth and prediction side by side where they lie apart and there is room."""
    width, height = panel_wh
    half = (width - GAP) // 2
    if truth is not None and predicted is not None and half > 0 and np.abs(truth - predicted).max() * ZOOM * 2 > min(panel_wh):
        panel = np.full((height, width, 3), BACKDROP, np.uint8)
        panel[:, :half] = _enlarged(frame, truth, truth, predicted, (half, height))
        panel[:, -half:] = _enlarged(frame, predicted, truth, predicted, (half, height))
        return panel
    focus = truth if truth is not None else predicted
    return _enlarged(frame, _highest(frame, probability) if focus is None else focus, truth, predicted, panel_wh)


def _highest(frame: Picture, probability: NDArray[np.floating] | None) -> Point:
    """Where the heatmap is highest, in input px; the middle of the frame without a heatmap."""
    size_wh = (frame.shape[1], frame.shape[0])
    if probability is None:
        return np.array(size_wh) / 2 - 0.5
    row, column = np.unravel_index(int(probability.argmax()), probability.shape)
    return np.asarray(resize_points(np.array([column, row], np.float64), (probability.shape[1], probability.shape[0]), size_wh), np.float64)


def _enlarged(frame: Picture, focus: Point, truth: Point | None, predicted: Point | None, size_wh: tuple[int, int]) -> Picture:
    """`size_wh` px of the enlarged frame with `focus` in their middle, and the marks; outside of the frame it is dark."""
    enlarge = scaling(ZOOM)
    to_middle = (np.array(size_wh) - 1) / 2 - enlarge(focus)
    to_cut = enlarge.then(translation(*to_middle))
    cut = cv2.warpAffine(frame, to_cut.matrix, size_wh, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT, borderValue=BACKDROP)
    picture = np.asarray(cut, np.uint8)
    _mark(picture, truth, predicted, to_cut, TOLERANCE_PX * ZOOM)
    return picture


def _with_text(canvas: Picture, outcome: str, score: float | None, title: str, panel_corners: dict[str, tuple[int, int]]) -> Picture:
    """Outcome, score and title in the strip on top, what the marks mean on its right, and the panels' names in their corners."""
    image = Image.fromarray(canvas)
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE - 4)
    middle, left, right = CAPTION_HEIGHT // 2, 8.0, float(canvas.shape[1] - 8)
    colour = {"TP": GREEN, "TN": GREEN, "": WHITE}.get(outcome, RED)
    shown_score = "" if score is None else f"score {score:.2f}"
    for text, text_colour in ((outcome, colour), (shown_score, WHITE), (title, WHITE)):
        draw.text((left, middle), text, fill=text_colour, font=font, anchor="lm")
        left += draw.textlength(text, font=font) + 14 if text else 0
    for text, text_colour in (("+ prediction", RED), ("o truth", GREEN)):
        length = draw.textlength(text, font=font)
        if right - length > left:  # a narrow picture keeps its title instead
            draw.text((right, middle), text, fill=text_colour, font=font, anchor="rm")
        right -= length + 16
    for text, (x, y) in panel_corners.items():
        draw.text((x + 6, y + 4), text, fill=WHITE, font=small, anchor="la", stroke_width=2, stroke_fill=BLACK)
    return np.array(image)

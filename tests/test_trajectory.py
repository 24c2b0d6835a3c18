"""The trajectory: what it drops, takes up and fills, and what it never does."""

import csv
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from clips import real
from hypothesis import given, settings
from hypothesis import strategies as st

from tracknet.inference.track import COLUMNS, BallTrack
from tracknet.inference.trajectory import TUNED, TrajectorySettings, refine

THRESHOLD = 0.85
SETTINGS = TrajectorySettings(max_speed=0.05, max_gap_frames=3, min_support=3.0, raise_score=0.7)  # 50 px per frame of 1000
SIZE_WH = (1000, 500)


def track_of_peaks(xy_px, score, fps=30.0, size_wh=SIZE_WH, visible=None) -> BallTrack:
    """One row per peak; NaN is none."""
    xy_px, score = np.asarray(xy_px, np.float64).reshape(-1, 2), np.asarray(score, np.float64)
    visible = score >= THRESHOLD if visible is None else visible
    count = len(score)
    return BallTrack(
        frame=np.arange(count),
        time_s=np.arange(count) / 30,
        visible=visible,
        x=xy_px[:, 0],
        y=xy_px[:, 1],
        score=score,
        source=np.where(visible, "detected", "").astype("U12"),
        fps=fps,
        size_wh=size_wh,
    )


def rows(track: BallTrack, order=slice(None)) -> dict[str, list]:
    """What the trajectory decides, NaN as None."""
    columns = {name: getattr(track, name)[order].tolist() for name in ("visible", "x", "y", "score", "source")}
    return {name: [None if value != value else value for value in values] for name, values in columns.items()}


def moving_ball(count: int, score: float = 0.99) -> tuple[np.ndarray, np.ndarray]:
    """A ball that flies 20 px per frame to the right."""
    return np.stack([100 + 20.0 * np.arange(count), np.full(count, 200.0)], axis=1), np.full(count, score)


@st.composite
def peaks(draw: st.DrawFn) -> BallTrack:
    """A ball that is often lost, under jumps to other places; coordinates and scores are decimals as detections are, hardly ever equal."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(0, 60))
    xy_px = np.cumsum(random.normal(0, draw(st.sampled_from([5.0, 20.0, 40.0])), (count, 2)), axis=0) + 300
    score = random.uniform(0.8, 1, count)
    elsewhere = random.random(count) < draw(st.floats(0, 0.6))
    xy_px[elsewhere] = random.uniform(0, 500, (elsewhere.sum(), 2))
    score[elsewhere] = random.uniform(0, 1, elsewhere.sum())
    none = random.random(count) < draw(st.floats(0, 0.5))
    xy_px[none], score[none] = np.nan, np.nan
    return track_of_peaks(xy_px.round(3), score.round(6))


@st.composite
def any_settings(draw: st.DrawFn) -> TrajectorySettings:
    return TrajectorySettings(
        draw(st.floats(0.005, 0.5)), draw(st.integers(0, 6)), draw(st.floats(0, 6)), draw(st.sampled_from([0.0, 0.5, 0.7, 2.0]))
    )


def test_isolated_jump_is_dropped_and_its_gap_filled():
    xy_px, score = moving_ball(12)
    xy_px[5] = (900, 400)
    result = refine(track_of_peaks(xy_px, score), SETTINGS)
    assert result.source.tolist() == ["detected"] * 5 + ["interpolated"] + ["detected"] * 6
    assert (result.x[5], result.y[5]) == (200, 200)
    assert np.isnan(result.score[5])
    assert result.visible.all()


def test_short_run_elsewhere_is_dropped_and_a_supported_one_stays():
    xy_px, score = moving_ball(30)
    xy_px[10:13] = (900, 400)
    assert refine(track_of_peaks(xy_px, score), SETTINGS).source[10:13].tolist() == ["interpolated"] * 3
    xy_px[10:15] = (900, 400)
    assert refine(track_of_peaks(xy_px, score), SETTINGS).source[10:15].tolist() == ["detected"] * 5


def test_gap_beyond_the_limit_stays_empty():
    xy_px, score = moving_ball(20)
    for missing in range(1, 8):
        xy, lost = xy_px.copy(), score.copy()
        xy[8 : 8 + missing], lost[8 : 8 + missing] = np.nan, np.nan
        expected = "interpolated" if missing <= 3 else ""
        assert refine(track_of_peaks(xy, lost), SETTINGS).source[8 : 8 + missing].tolist() == [expected] * missing


def test_gap_that_no_ball_crosses_in_time_stays_empty():
    xy_px, score = moving_ball(20)
    xy_px[10:, 0] += 200  # a cut to another ball: 220 px in one frame
    score[9] = np.nan
    assert refine(track_of_peaks(xy_px, score), SETTINGS).source.tolist() == ["detected"] * 9 + [""] + ["detected"] * 10


def test_faint_peak_on_the_path_is_taken_up_as_the_network_gave_it():
    xy_px, score = moving_ball(12)
    score[5], score[7] = 0.75, 0.4  # the second is too faint
    xy_px[5] += (3, -7)
    result = refine(track_of_peaks(xy_px, score), SETTINGS)
    assert (result.source[5], result.x[5], result.y[5], result.score[5]) == ("detected", 203, 193, 0.75)
    assert result.source[7] == "interpolated"


def test_faint_peaks_raise_nothing_beyond_the_ends_and_no_path_alone():
    xy_px, score = moving_ball(20, 0.75)
    assert not refine(track_of_peaks(xy_px, score), SETTINGS).visible.any()
    score[6:12] = 0.99
    assert np.flatnonzero(refine(track_of_peaks(xy_px, score), SETTINGS).visible).tolist() == list(range(6, 12))


def test_bounce_keeps_every_frame():
    xy_px, score = moving_ball(20)
    xy_px[:, 0] = 300 + 40 * np.abs(np.arange(20) - 10)  # turns round within a frame at 40 px per frame
    assert refine(track_of_peaks(xy_px, score), SETTINGS).source.tolist() == ["detected"] * 20


@pytest.mark.parametrize(("fps", "passes"), [(30, True), (None, True), (float("nan"), True), (60, False), (15, True)])
def test_speed_is_per_second_where_the_rate_is_known(fps, passes):
    xy_px, score = moving_ball(20)
    xy_px[:, 0] = 2 * np.arange(20) + 45 * (np.arange(20) > 9)  # 47 px within one frame
    score[8:10] = np.nan
    xy_px[8:10] = np.nan
    xy_px[10:, 0] += 70  # three frames for 121 px
    assert refine(track_of_peaks(xy_px, score, fps), SETTINGS).visible[8:10].all() == passes


def test_no_frame_and_no_peak():
    assert len(refine(track_of_peaks([], []), SETTINGS)) == 0
    assert not refine(track_of_peaks(np.full((5, 2), np.nan), np.full(5, np.nan)), SETTINGS).visible.any()


@pytest.mark.parametrize("changed", [{"max_speed": 0.0}, {"max_gap_frames": -1}, {"min_support": -1.0}, {"max_speed": float("nan")}])
def test_senseless_settings_are_refused(changed):
    with pytest.raises(ValueError, match="max_speed"):
        replace(SETTINGS, **changed)


@given(peaks(), any_settings())
def test_detected_rows_keep_their_peak(track, chosen):
    result = refine(track, chosen)
    stays = result.source == "detected"
    for name in ("x", "y", "score"):
        assert getattr(result, name)[stays].tobytes() == getattr(track, name)[stays].tobytes()
    raised = stays & ~track.visible
    assert (track.score[raised] >= chosen.raise_score).all()
    for name in set(COLUMNS) - {"visible", "x", "y", "score", "source"}:
        assert getattr(result, name) is getattr(track, name)


@given(peaks(), any_settings())
def test_source_says_what_a_row_is(track, chosen):
    result = refine(track, chosen)
    assert ((result.source == "") == ~result.visible).all()
    filled = result.source == "interpolated"
    assert np.isnan(result.score[filled]).all()
    assert np.isfinite(result.x[result.visible]).all()
    assert np.isfinite(result.score[result.source == "detected"]).all()


@given(peaks(), any_settings())
def test_filled_rows_lie_between_the_ends_of_a_short_gap(track, chosen):
    result = refine(track, chosen)
    detected = np.flatnonzero(result.source == "detected")
    filled = np.flatnonzero(result.source == "interpolated")
    if len(filled):
        assert detected[0] < filled[0]
        assert filled[-1] < detected[-1]
    for start, end in pairwise(detected):
        inner = result.source[start + 1 : end]
        assert len(set(inner.tolist())) <= 1
        if "interpolated" in inner:
            assert len(inner) <= chosen.max_gap_frames
            for values in (result.x, result.y):
                low, high = sorted(values[[start, end]])
                assert ((low <= values[start:end]) & (values[start:end] <= high)).all()
                steps = np.diff(values[start : end + 1])
                assert np.ptp(steps) <= 0.0021  # a straight line at even speed, to 3 decimals


@given(peaks(), any_settings())
def test_refining_again_changes_nothing(track, chosen):
    once = refine(track, chosen)
    assert rows(refine(once, chosen)) == rows(once)


@given(peaks(), any_settings())
def test_backwards_in_time_gives_the_mirrored_result(track, chosen):
    mirrored = replace(track, **{name: getattr(track, name)[::-1] for name in ("visible", "x", "y", "score", "source")})
    there, back = refine(track, chosen), refine(mirrored, chosen)
    assert there.source.tolist() == back.source[::-1].tolist()
    for name in ("x", "y", "score"):
        np.testing.assert_allclose(getattr(there, name), getattr(back, name)[::-1], rtol=0, atol=0.0011)


@given(peaks(), any_settings())
def test_picture_of_twice_the_size_gives_twice_the_result(track, chosen):
    large = replace(track, x=2 * track.x, y=2 * track.y, size_wh=(2 * SIZE_WH[0], 2 * SIZE_WH[1]))
    small, large = refine(track, chosen), refine(large, chosen)
    assert small.source.tolist() == large.source.tolist()
    np.testing.assert_allclose(large.x, 2 * small.x, rtol=0, atol=0.0021)
    np.testing.assert_allclose(large.y, 2 * small.y, rtol=0, atol=0.0021)


@given(peaks(), peaks(), any_settings())
def test_parts_apart_are_refined_each_by_itself(left, right, chosen):
    empty = chosen.max_gap_frames + 1  # frames without a peak, one more than a path bridges

    def joined(name, nothing):
        return np.concatenate([getattr(left, name), np.full(empty, nothing), getattr(right, name)])

    whole = refine(
        track_of_peaks(
            np.stack([joined("x", np.nan), joined("y", np.nan)], axis=1), joined("score", np.nan), visible=joined("visible", False)
        ),
        chosen,
    )
    assert rows(whole, slice(0, len(left))) == rows(refine(left, chosen))
    assert rows(whole, slice(len(left) + empty, None)) == rows(refine(right, chosen))
    assert not whole.visible[len(left) : len(left) + empty].any()


@given(peaks(), st.floats(0, 5))
@settings(max_examples=50)
def test_result_is_the_best_of_all_choices(track, min_support):
    """Against brute force over every way to keep a subset of the peaks; all of them visible, so that no path is cut."""
    head = slice(0, 9)
    track = track_of_peaks(np.stack([track.x, track.y], axis=1)[head], track.score[head], visible=np.isfinite(track.score[head]))
    chosen = TrajectorySettings(0.05, 2, min_support, 2.0)
    row = np.flatnonzero(track.visible)

    def value(kept) -> float:
        paths = min(len(kept), 1) + sum(
            b - a > 3 or np.hypot(track.x[a] - track.x[b], track.y[a] - track.y[b]) > 50 * (b - a) for a, b in pairwise(kept)
        )
        return track.score[kept].sum() - min_support * paths

    subsets = [row[[bool(bits >> n & 1) for n in range(len(row))]] for bits in range(1 << len(row))]
    found = np.flatnonzero(refine(track, chosen).source == "detected")
    assert value(found) == pytest.approx(max(value(kept) for kept in subsets), abs=1e-9)


def test_labelled_balls_of_real_rallies_pass():
    """The gate lets a real ball through, bounces, hits and serves included."""
    balls = kept = 0
    for labels in sorted(real("tennis/labels").glob("*/*/Label.csv")):
        with labels.open(newline="") as file:
            label = [(row["visibility"] not in ("", "0"), row["x-coordinate"], row["y-coordinate"]) for row in csv.DictReader(file)]
        xy_px = [(float(x), float(y)) if there else (np.nan, np.nan) for there, x, y in label]
        there = np.array([one[0] for one in label])
        result = refine(track_of_peaks(xy_px, np.where(there, 1.0, np.nan), 30.0, (1280, 720)), TUNED)
        balls, kept = balls + there.sum(), kept + (result.source == "detected").sum()
    assert balls > 1000
    assert kept >= 0.985 * balls

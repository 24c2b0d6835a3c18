"""Coordinates agree with what OpenCV and torch do to pixels."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tracknet.geometry import Affine, horizontal_flip, resize_points, scaling, translation

sizes = st.tuples(st.integers(8, 2000), st.integers(8, 2000))
points = st.tuples(st.floats(-10, 2000), st.floats(-10, 2000))


def blob(width: int, height: int, x: float, y: float, sigma: float) -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)).astype(np.float32)


def centroid(picture: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(picture.shape)
    return np.array([(picture * columns).sum(), (picture * rows).sum()]) / picture.sum()


@given(sizes, sizes, points)
def test_resizing_there_and_back_is_the_identity(before, after, point):
    xy = np.array(point)
    assert resize_points(resize_points(xy, before, after), after, before) == pytest.approx(xy, abs=1e-6)


@given(sizes, sizes)
def test_corners_of_the_picture_stay_corners(before, after):
    corners = np.array([[-0.5, -0.5], [before[0] - 0.5, before[1] - 0.5]])
    assert resize_points(corners, before, after) == pytest.approx(np.array([[-0.5, -0.5], [after[0] - 0.5, after[1] - 0.5]]), abs=1e-6)


@pytest.mark.parametrize(("x", "y"), [(40.0, 30.0), (71.25, 22.5)])
def test_points_follow_the_pixels_of_opencv_and_torch(x, y):
    picture = blob(120, 80, x, y, sigma=6)
    expected = resize_points(np.array([x, y]), (120, 80), (48, 32))
    by_opencv = cv2.resize(picture, (48, 32), interpolation=cv2.INTER_AREA)
    by_torch = F.interpolate(torch.from_numpy(picture)[None, None], (32, 48), mode="bilinear", align_corners=False, antialias=True)[0, 0]
    assert centroid(by_opencv) == pytest.approx(expected, abs=0.05)
    assert centroid(by_torch.numpy()) == pytest.approx(expected, abs=0.05)


def test_tensors_and_arrays_give_the_same_points_in_their_own_type():
    xy = np.array([[3.0, 4.0], [100.0, 7.5]], np.float32)
    from_tensor = resize_points(torch.from_numpy(xy), (640, 360), (512, 288))
    assert from_tensor.dtype == torch.float32
    np.testing.assert_allclose(from_tensor.numpy(), resize_points(xy, (640, 360), (512, 288)), rtol=1e-6)


@pytest.mark.parametrize("transform", [horizontal_flip(120), translation(7.5, -3.0), scaling(0.8), scaling(1.25).then(translation(-9, 4))])
def test_maps_move_points_as_warpaffine_moves_pixels(transform: Affine):
    warped = cv2.warpAffine(blob(120, 80, 60, 40, sigma=4), transform.matrix, (120, 80))
    assert centroid(warped) == pytest.approx(transform(np.array([60.0, 40.0])), abs=0.02)


@given(points, st.floats(0.1, 10), st.floats(-50, 50), st.floats(-50, 50))
def test_inverse_undoes(point, factor, dx, dy):
    transform = scaling(factor).then(translation(dx, dy)).then(horizontal_flip(64))
    assert transform.inverse()(transform(np.array(point))) == pytest.approx(np.array(point), abs=1e-6)

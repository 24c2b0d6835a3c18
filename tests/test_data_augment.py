from dataclasses import replace

import cv2
import numpy as np
import pytest
from clips import blob_centroid, blob_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from tracknet.data.augment import Augmentation, TrainingTransform, apply_gain, draw_augmentation, training_transform, warp
from tracknet.geometry import Affine, horizontal_flip, inside, scaling, translation
from tracknet.schema.data import AugmentConfig, DataConfig, PreprocessConfig

INPUT = (128, 96)

transforms = st.builds(
    TrainingTransform,
    flip_prob=st.sampled_from([0.0, 0.5, 1.0]),
    scale=st.sampled_from([(1.0, 1.0), (0.7, 1.4), (0.3, 0.5), (2.0, 2.5)]),
    brightness=st.just(0.0),
    reverse_prob=st.just(0.0),
    crop_wh=st.sampled_from([None, (64, 48), (128, 96), (40, 90)]),
    crop_ball_prob=st.sampled_from([0.0, 0.75, 1.0]),
)
positions = st.tuples(st.floats(0, INPUT[0] - 1), st.floats(0, INPUT[1] - 1))


def warped(picture: np.ndarray, affine: Affine, size_wh: tuple[int, int]) -> np.ndarray:
    """One picture, into memory of its own."""
    place = np.empty((size_wh[1], size_wh[0], 3), np.uint8)
    warp([picture], affine, [place])
    return place


def draw(transform: TrainingTransform, xy: object, seed: int = 0, input_wh: tuple[int, int] = INPUT) -> Augmentation:
    points = np.atleast_2d(np.array(xy, dtype=float))
    return draw_augmentation(np.random.default_rng(seed), transform, input_wh, points, np.ones(len(points), bool))


@given(transform=transforms, xy=positions, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_the_ball_in_the_picture_moves_with_its_coordinates(transform: TrainingTransform, xy: tuple[float, float], seed: int) -> None:
    drawn = draw(transform, xy, seed)
    scale = abs(drawn.affine.matrix[0, 0])
    picture = warped(blob_picture(INPUT, xy, sigma=2.5), drawn.affine, drawn.size_wh)
    assert picture.shape == (drawn.size_wh[1], drawn.size_wh[0], 3)
    after = drawn.affine(np.array(xy))
    room, room_before = 3.5 * 2.5 * scale + 1, 3.5 * 2.5
    whole_after = np.all((after > room) & (after < np.array(drawn.size_wh) - 1 - room))
    whole_before = np.all((np.array(xy) > room_before) & (np.array(xy) < np.array(INPUT) - 1 - room_before))
    if whole_after and whole_before:
        np.testing.assert_allclose(blob_centroid(picture), after, atol=0.3 * max(1.0, scale / 2))


@given(
    scale=st.floats(0.3, 3),
    left=st.floats(-200, 300),
    top=st.floats(-200, 300),
    flip=st.booleans(),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_warping_the_part_is_warping_the_whole(scale: float, left: float, top: float, flip: bool, size: tuple[int, int], seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    affine = (horizontal_flip(128) if flip else translation(0, 0)).then(scaling(scale)).then(translation(-left, -top))
    whole = cv2.warpAffine(picture, affine.matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    difference = np.abs(warped(picture, affine, size).astype(int) - whole)
    # OpenCV rounds source positions to 1/32 px or to float32, which may fall one step apart between the two
    assert difference.max() <= 255 / 32 + 1
    assert (difference > 1).mean() < 0.05


@given(left=st.integers(-30, 120), top=st.integers(-30, 90), flip=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_crop_without_scaling_copies_pixels(left: int, top: int, flip: bool) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    affine = (horizontal_flip(128) if flip else translation(0, 0)).then(translation(-left, -top))
    source = picture[:, ::-1] if flip else picture
    rows, columns = np.arange(top, top + 48).clip(0, 95), np.arange(left, left + 64).clip(0, 127)
    np.testing.assert_array_equal(warped(picture, affine, (64, 48)), source[rows][:, columns])


@given(
    scale=st.floats(0.4, 2.5),
    crop=st.tuples(st.integers(8, 128), st.integers(8, 96)),
    xy=positions,
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_a_crop_asked_to_hold_the_ball_holds_it(
    scale: float, crop: tuple[int, int], xy: tuple[float, float], flip: bool, seed: int
) -> None:
    drawn = draw(TrainingTransform(float(flip), (scale, scale), 0, 0, crop, 1.0), xy, seed)
    assert inside(drawn.affine(np.array(xy)), crop)


@given(scale=st.floats(0.4, 2.5), crop=st.tuples(st.integers(8, 128), st.integers(8, 96)), seed=st.integers(0, 999), ball=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_crop_stays_on_the_picture_or_holds_all_of_it(scale: float, crop: tuple[int, int], seed: int, ball: bool) -> None:
    drawn = draw(TrainingTransform(0, (scale, scale), 0, 0, crop, float(ball)), (5.0, 90.0), seed)
    first, last = drawn.affine(np.array([[-0.5, -0.5], [127.5, 95.5]])) + 0.5  # the picture's edges, in px from the crop's edge
    for axis in (0, 1):
        if scale * INPUT[axis] >= crop[axis]:
            assert first[axis] <= 1e-9
            assert last[axis] > crop[axis] - 1
        else:
            assert first[axis] >= -1e-9
            assert last[axis] < crop[axis] + 1


def test_the_ball_lies_anywhere_in_its_crops() -> None:
    transform = TrainingTransform(0, (1.0, 1.0), 0, 0, (32, 16), 1.0)
    places = np.array([draw(transform, (64.0, 48.0), seed).affine(np.array([64.0, 48.0])) for seed in range(2000)])
    for axis, size in ((0, 32), (1, 16)):
        counts = np.bincount(places[:, axis].astype(int), minlength=size)
        assert len(counts) == size
        assert counts.min() > 0.5 * 2000 / size
        assert counts.max() < 1.6 * 2000 / size


def test_the_share_of_crops_with_the_ball_is_as_asked() -> None:
    transform = TrainingTransform(0, (1.0, 1.0), 0, 0, (16, 16), 0.75)
    holds = [inside(draw(transform, (64.0, 48.0), seed).affine(np.array([64.0, 48.0])), (16, 16)) for seed in range(1000)]
    uniform = 16 * 16 / (113 * 81)
    assert 0.70 < np.mean(holds) - 0.25 * uniform < 0.80


def test_any_visible_frame_can_be_the_one_in_the_crop_and_no_other() -> None:
    xy, visible = np.array([[10.0, 10], [64, 48], [118, 86]]), np.array([True, False, True])
    transform = TrainingTransform(0, (1.0, 1.0), 0, 0, (16, 16), 1.0)
    held = np.array(
        [inside(draw_augmentation(np.random.default_rng(s), transform, INPUT, xy, visible).affine(xy), (16, 16)) for s in range(300)]
    )
    assert (held[:, [0, 2]].sum(axis=1) == 1).all()
    assert 100 < held[:, 0].sum() < 200
    assert not held[:, 1].any()


def test_a_window_without_a_ball_is_cropped_anywhere() -> None:
    transform = TrainingTransform(0, (1.0, 1.0), 0, 0, (16, 16), 1.0)
    none = np.zeros(1, bool)
    lefts = {-draw_augmentation(np.random.default_rng(s), transform, INPUT, np.zeros((1, 2)), none).affine.matrix[0, 2] for s in range(500)}
    assert (min(lefts), max(lefts)) == (0, 112)


def test_without_a_crop_the_zoom_keeps_the_centre_and_the_size() -> None:
    drawn = draw(TrainingTransform(0, (1.3, 1.3), 0, 0, None, 0), (0.0, 0.0))
    centre = np.array([63.5, 47.5])
    np.testing.assert_allclose(drawn.affine(centre), centre)
    assert drawn.size_wh == INPUT
    assert drawn.affine.matrix[0, 0] == pytest.approx(1.3)


def test_what_is_off_changes_nothing() -> None:
    drawn = draw(training_transform(DataConfig()), (3.0, 4.0))
    np.testing.assert_array_equal(drawn.affine.matrix, translation(0, 0).matrix)
    assert (drawn.reverse, drawn.gain.tolist()) == (False, [1, 1, 1])
    picture = blob_picture(INPUT, (20, 30))
    np.testing.assert_array_equal(warped(picture, drawn.affine, drawn.size_wh), picture)


def test_every_key_reaches_the_transform() -> None:
    config = DataConfig(
        preprocess=PreprocessConfig(flip_prob=0.1),
        augment=AugmentConfig(scale=[0.5, 2.0], brightness=0.3, reverse_prob=0.4, crop=[32, 16], crop_ball_prob=0.6),
    )
    assert training_transform(config) == TrainingTransform(0.1, (0.5, 2.0), 0.3, 0.4, (32, 16), 0.6)


def test_draws_stay_in_their_ranges_and_use_them() -> None:
    transform = TrainingTransform(0.5, (0.7, 1.4), 0.2, 0.5, None, 0)
    drawn = [draw(transform, (3.0, 4.0), seed) for seed in range(500)]
    scales = np.array([abs(one.affine.matrix[0, 0]) for one in drawn])
    assert 0.7 <= scales.min() < 0.75
    assert 1.35 < scales.max() <= 1.4
    gains = np.array([one.gain for one in drawn])
    assert 0.8 * 0.95 <= gains.min() < 0.82
    assert 1.18 < gains.max() <= 1.2 * 1.05
    ratio = gains[:, 0] / gains[:, 1]
    assert 1.05 < ratio.max() <= 1.05 / 0.95
    assert 200 < sum(one.reverse for one in drawn) < 300
    assert 200 < sum(one.affine.matrix[0, 0] < 0 for one in drawn) < 300


def test_the_gain_multiplies_each_colour_and_is_cut_off_at_white() -> None:
    picture = np.array([[[100, 100, 100], [250, 250, 250], [0, 1, 255]]], np.uint8)
    expected = [[[50, 120, 100], [125, 255, 250], [0, 1, 255]]]
    apply_gain([picture], np.array([0.5, 1.2, 1.0]))
    np.testing.assert_array_equal(picture, expected)


@given(gain=st.lists(st.floats(0, 3), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_the_gain_of_every_value_is_rounded(gain: list[float]) -> None:
    picture = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    expected = np.clip(np.rint(picture * np.array(gain)), 0, 255)
    apply_gain([picture], np.array(gain))
    np.testing.assert_array_equal(picture, expected)


def test_several_pictures_are_changed_alike_and_each_in_its_place() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 96, 128, 3), dtype=np.uint8)
    drawn = draw(TrainingTransform(1, (0.7, 1.4), 0.2, 0, (40, 30), 0.5), (3.0, 4.0))
    together = np.zeros((4, 30, 40, 3), np.uint8)
    drawn.change(list(pictures), list(together))
    for picture, got in zip(pictures, together, strict=True):
        alone = warped(picture, drawn.affine, drawn.size_wh)
        apply_gain([alone], drawn.gain)
        np.testing.assert_array_equal(got, alone)
    assert together.any()


@pytest.mark.parametrize(
    "changed", [{"flip_prob": 0.5}, {"scale": (0.9, 1.0)}, {"brightness": 0.1}, {"reverse_prob": 0.1}, {"crop_wh": (8, 8)}]
)
def test_a_transform_tells_whether_it_can_change_anything(changed: dict[str, object]) -> None:
    nothing = TrainingTransform(0, (1.0, 1.0), 0, 0, None, 0.75)
    assert nothing.changes_nothing
    assert not replace(nothing, **changed).changes_nothing  # type: ignore[arg-type]

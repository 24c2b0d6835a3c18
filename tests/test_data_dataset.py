import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import blob_centroid, blob_picture, first_frames_of_real_clip, label_rows, path_of_ball, write_clip, write_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tracknet.data.augment import TrainingTransform
from tracknet.data.batch import Batch, as_stored
from tracknet.data.dataset import WindowDataset
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore
from tracknet.data.index import Clip, ClipIndex, LabelledClip, join_clips
from tracknet.schema.data import SequenceConfig

PLAIN = TrainingTransform(0, (1.0, 1.0), 0, 0, None, 0)
ALL = TrainingTransform(0.5, (0.7, 1.4), 0.2, 0.5, (40, 32), 0.75)


def index_of(lengths: list[int]) -> ClipIndex:
    """Clips of these lengths, without pictures."""
    parts = []
    for number, length in enumerate(lengths):
        clip = Clip("game1", f"Clip{number}", Path(), None, (64, 48), 0, length)
        parts.append(LabelledClip(clip, np.full((length, 2), 9, np.float32), np.ones(length, np.int8)))
    return join_clips(parts)


@dataclass
class Window:
    frames: np.ndarray  # (T, H, W, 3)
    background: np.ndarray | None  # (H, W, 3)
    xy_input: np.ndarray
    visible: np.ndarray
    labeled: np.ndarray
    frame_row: np.ndarray
    counted: np.ndarray


class BlankStore(FrameStore):
    """Black frames."""

    def __init__(self) -> None:
        super().__init__(Path(), (16, 12))

    def window(self, clip: Clip, first: int, count: int) -> np.ndarray:
        assert 0 <= first < first + count <= clip.length
        return np.zeros((count, 12, 16, 3), np.uint8)


def dataset_of(
    root: Path,
    games: list[str],
    training: TrainingTransform | None,
    length: int = 3,
    background: bool = True,
    input_wh: tuple[int, int] | None = None,
) -> WindowDataset:
    index, _ = read_clips(root, games, "stop")
    store = FrameStore(root / "cache", input_wh)
    for clip in index.clips:
        store.prepare(clip)
    return WindowDataset(index, store, SequenceConfig(length=length), background=background, seed=7, training=training)


def batch_of(dataset: WindowDataset, epoch: int = 0) -> Batch:
    return dataset.batch([(epoch, window) for window in range(len(dataset))])


def one_window(dataset: WindowDataset, window: int, epoch: int = 0) -> Window:
    """A batch of it alone, as arrays without the first dimension."""
    batch = dataset.batch([(epoch, window)])
    background = None if batch.background is None else as_stored(batch.background)[0].numpy()
    labels = {name: getattr(batch, name)[0].numpy() for name in ("xy_input", "visible", "labeled", "frame_row", "counted")}
    return Window(frames=as_stored(batch.frames)[0].numpy(), background=background, **labels)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) if a is not None else b is None for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), length=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_evaluation_counts_each_frame_once_and_never_leaves_a_clip(lengths: list[int], length: int) -> None:
    index = index_of(lengths)
    dataset = WindowDataset(index, BlankStore(), SequenceConfig(length=length, stride=2), background=False, seed=0, training=None)
    clip_of_row, counted = index.clip_of_row, []
    for window in range(len(dataset)):
        sample = one_window(dataset, window)
        assert len(set(clip_of_row[sample.frame_row])) == 1
        steps = np.diff(sample.frame_row)
        assert set(steps) <= {0, 1}
        assert not sample.labeled[1:][steps == 0].any()
        counted += sample.frame_row[sample.counted].tolist()
    assert counted == list(range(len(index)))


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), length=st.integers(1, 6), stride=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_training_windows_start_every_stride_inside_a_clip(lengths: list[int], length: int, stride: int) -> None:
    index = index_of(lengths)
    sequence = SequenceConfig(length=length, stride=stride)
    dataset = WindowDataset(index, BlankStore(), sequence, background=False, seed=0, training=PLAIN)
    starts = [
        clip.first_row + start
        for clip in index.clips
        for start in range(0, clip.length, stride)
        if start + length <= clip.length or start == 0
    ]
    samples = [one_window(dataset, window) for window in range(len(dataset))]
    assert [int(sample.frame_row[0]) for sample in samples] == starts
    for sample in samples:
        clip = index.clips[index.clip_of_row[sample.frame_row[0]]]
        expected = np.minimum(sample.frame_row[0] + np.arange(length), clip.first_row + clip.length - 1)
        np.testing.assert_array_equal(sample.frame_row, expected)
        assert sample.labeled.sum() == min(length, clip.length)
        assert not sample.counted.any()


def test_without_sequences_every_frame_is_a_sample(tmp_path: Path) -> None:
    sequence = SequenceConfig(enabled=False, length=5, stride=3)
    for training in (None, PLAIN):
        dataset = WindowDataset(index_of([4, 3]), BlankStore(), sequence, background=False, seed=0, training=training)
        assert [one_window(dataset, window).frame_row.tolist() for window in range(len(dataset))] == [[row] for row in range(7)]


def test_a_frame_without_a_ball_is_labelled_and_one_without_a_label_is_not(tmp_path: Path) -> None:
    xy = write_clip(tmp_path / "game1" / "Clip1", count=3)
    write_labels(tmp_path / "game1" / "Clip1" / "Label.csv", label_rows(xy, [1, 0, 3]))
    dataset = dataset_of(tmp_path, ["game1"], None)
    batch = batch_of(dataset)
    assert batch.visible.tolist() == [[True, False, True]]
    assert batch.labeled.tolist() == [[True, True, True]]
    assert batch.xy_input[0, 1].tolist() == [0, 0]
    dataset.index.visibility[0] = -1
    batch = batch_of(dataset)
    assert (batch.visible.tolist(), batch.labeled.tolist()) == ([[False, False, True]], [[False, True, True]])


def test_an_evaluation_batch_holds_the_pictures_and_positions_in_input_px(tmp_path: Path) -> None:
    xy_px = write_clip(tmp_path / "game1" / "Clip1", count=7, size_wh=(128, 96))
    dataset = dataset_of(tmp_path, ["game1"], None, input_wh=(64, 48))
    batch = batch_of(dataset)
    assert batch.frames.shape == (3, 3, 3, 48, 64)
    assert batch.background is not None
    assert batch.background.shape == (3, 3, 48, 64)
    assert batch.frame_row.tolist() == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    assert batch.counted.tolist() == [[True] * 3, [True] * 3, [False, False, True]]
    assert batch.sample_index.tolist() == [0, 1, 2]
    np.testing.assert_allclose(batch.xy_input[0], (xy_px[:3] + 0.5) / 2 - 0.5, atol=1e-3)
    for picture, xy in zip(batch.frames.flatten(0, 1), batch.xy_input.flatten(0, 1), strict=True):
        np.testing.assert_allclose(blob_centroid(picture.permute(1, 2, 0).numpy()), xy, atol=0.2)


def test_clips_of_several_sizes_have_their_positions_in_input_px(tmp_path: Path) -> None:
    sizes = [(64, 48), (64, 48), (128, 96), (64, 48)]
    xy_px = [write_clip(tmp_path / "game1" / f"Clip{number}", count=4, size_wh=size) for number, size in enumerate(sizes)]
    dataset = dataset_of(tmp_path, ["game1"], None, length=1, input_wh=(32, 24))
    expected = np.concatenate([(xy + 0.5) * 32 / size[0] - 0.5 for xy, size in zip(xy_px, sizes, strict=True)])
    batch = batch_of(dataset)
    np.testing.assert_allclose(batch.xy_input[:, 0], expected, atol=1e-3)
    assert batch.visible.all()


@pytest.mark.parametrize("training", [None, ALL])
def test_a_batch_of_nothing_has_the_shapes_and_types_of_any_other(tmp_path: Path, training: TrainingTransform | None) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    dataset = dataset_of(tmp_path, ["game1"], training)
    empty, full = dataset.batch([]), batch_of(dataset)
    assert len(empty) == 0
    for name, value in vars(full).items():
        assert getattr(empty, name).shape[1:] == value.shape[1:], name
        assert getattr(empty, name).dtype == value.dtype, name


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("training", [None, PLAIN, ALL])
def test_a_batch_of_nothing_makes_a_blank_window_like_any_other(
    tmp_path: Path, training: TrainingTransform | None, background: bool
) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    dataset = dataset_of(tmp_path, ["game1"], training, background=background)
    blank, full = dataset.batch([]).blank_window(), dataset.batch([(0, 0)])
    for name, value in vars(full).items():
        if value is None:
            assert getattr(blank, name) is None
            continue
        assert (getattr(blank, name).shape, getattr(blank, name).stride()) == (value.shape, value.stride()), name
        assert getattr(blank, name).dtype == value.dtype
        assert not getattr(blank, name).any()


@pytest.mark.parametrize("length", [1, 3, 6])
def test_windows_without_augmentation_are_the_frames_of_their_rows(tmp_path: Path, length: int) -> None:
    for number, count in enumerate((5, 8), start=1):  # the first is shorter than the longest window
        write_clip(tmp_path / "game1" / f"Clip{number}", count=count)
    for picture in (tmp_path / "game1" / "Clip2").glob("*.png"):  # so that the clips have different backgrounds
        Image.fromarray(np.asarray(Image.open(picture)) // 2).save(picture)
    for training in (None, PLAIN):
        dataset = dataset_of(tmp_path, ["game1"], training, length=length)
        index = dataset.index
        pictures = np.concatenate([dataset.store.window(clip, 0, clip.length) for clip in index.clips])
        keys = [(3, window) for window in np.random.default_rng(0).permutation(len(dataset)).tolist()]
        batch = dataset.batch(keys)
        np.testing.assert_array_equal(batch.frames.numpy(), pictures[batch.frame_row.numpy()].transpose(0, 1, 4, 2, 3))
        clips = [index.clips[number] for number in index.clip_of_row[batch.frame_row[:, 0].numpy()]]
        assert len(set(clips)) == 2
        still = np.stack([dataset.store.background(clip) for clip in clips])
        np.testing.assert_array_equal(batch.background.numpy(), still.transpose(0, 3, 1, 2))
        assert batch.sample_index.tolist() == [window for _, window in keys]
        for number, key in enumerate(keys):
            assert same(dataset.batch([key]), next(batch_from(batch, number).split(1)))


def batch_from(batch: Batch, number: int) -> Batch:
    """The windows from `number` on."""
    return Batch(*(None if value is None else value[number:] for value in vars(batch).values()))


@given(window=st.integers(0, 5), epoch=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_ball_coordinates_and_background_move_together(blobs: WindowDataset, window: int, epoch: int) -> None:
    sample = one_window(blobs, window, epoch)
    assert sample.background is not None
    assert sample.frames.shape == (3, 32, 40, 3)
    reversed_order = bool(np.diff(sample.frame_row)[0] == -1)
    assert sample.frame_row.tolist() == list(range(window, window + 3))[:: -1 if reversed_order else 1]
    for picture, xy, visible in zip(sample.frames, sample.xy_input, sample.visible, strict=True):
        if visible and 8 < xy[0] < 31 and 8 < xy[1] < 23:
            # the marker is in every frame and in the background: their difference leaves the ball alone
            ball = np.clip(picture.astype(int) - sample.background, 0, None).astype(np.uint8)
            np.testing.assert_allclose(blob_centroid(ball, dark=8), xy, atol=0.3)
    still = np.abs(sample.frames.astype(int) - sample.background).min(axis=0)
    assert still.max() <= 4  # only the ball differs, and it moves
    np.testing.assert_array_equal(sample.xy_input.any(axis=1), sample.visible)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> WindowDataset:
    """A moving ball beside a marker that stands still."""
    root = tmp_path_factory.mktemp("blobs")
    folder, xy = root / "game1" / "Clip1", path_of_ball(8, (96, 72))
    write_labels(folder / "Label.csv", label_rows(xy, [1] * 8))
    marker = blob_picture((96, 72), (30, 20), sigma=3) // 2
    for number, position in enumerate(xy):
        Image.fromarray(np.maximum(blob_picture((96, 72), position), marker)).save(folder / f"{number:04d}.png")
    return dataset_of(root, ["game1"], ALL)


def test_a_sample_is_a_function_of_seed_epoch_and_window(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", size_wh=(96, 72))
    dataset = dataset_of(tmp_path, ["game1"], ALL)
    first = batch_of(dataset, epoch=3)
    batch_of(dataset, epoch=1)
    np.random.default_rng().random()
    assert same(batch_of(dataset, epoch=3), first)
    assert not same(batch_of(dataset, epoch=4), first)
    dataset.seed = 8
    assert not same(batch_of(dataset, epoch=3), first)


def test_a_ball_outside_of_the_crop_is_not_visible_but_labelled(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", size_wh=(256, 144))
    dataset = dataset_of(tmp_path, ["game1"], TrainingTransform(0, (1.0, 1.0), 0, 0, (24, 24), 0.5))
    batch = batch_of(dataset)
    assert 0 < int(batch.visible.sum()) < batch.visible.numel()
    assert batch.labeled.all()
    assert (batch.xy_input[~batch.visible] == 0).all()
    assert ((batch.xy_input >= -0.5) & (batch.xy_input < 23.5)).all()


def test_a_window_played_backwards_takes_everything_along(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", count=4)
    dataset = dataset_of(tmp_path, ["game1"], TrainingTransform(0, (1.0, 1.0), 0, 1.0, None, 0))
    dataset.index.visibility[:] = [-1, 1, 0, 1]
    sample = one_window(dataset, 0)
    assert sample.frame_row.tolist() == [2, 1, 0]
    assert sample.labeled.tolist() == [True, True, False]
    assert sample.visible.tolist() == [False, True, False]
    np.testing.assert_array_equal(sample.frames, dataset.store.window(dataset.index.clips[0], 0, 3)[::-1])


def test_the_data_set_pickles_small_and_reads_on(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1", count=40, size_wh=(128, 96))
    dataset = dataset_of(tmp_path, ["game1"], ALL)
    expected = batch_of(dataset)
    text = pickle.dumps(dataset)
    assert len(text) < 10_000
    assert same(batch_of(pickle.loads(text)), expected)


def test_a_batch_moves_and_splits_whole(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1" / "Clip1")
    batch = batch_of(dataset_of(tmp_path, ["game1"], PLAIN))
    parts = list(batch.split(4))
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.sample_index for part in parts]), batch.sample_index)
    assert torch.equal(torch.cat([part.frames for part in parts]), batch.frames)
    assert same(batch.to("cpu"), batch)


def test_real_frames_come_with_their_labels(tmp_path: Path) -> None:
    first_frames_of_real_clip(tmp_path)
    dataset = dataset_of(tmp_path, ["game1"], None, input_wh=(512, 288))
    batch = batch_of(dataset)
    assert batch.frames.shape == (4, 3, 3, 288, 512)
    np.testing.assert_allclose(batch.xy_input[0, 0], [599.5 * 0.4 - 0.5, 423.5 * 0.4 - 0.5], atol=1e-4)

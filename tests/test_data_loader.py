import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import blob_picture, first_frames_of_real_clip, label_rows, write_clip, write_games, write_labels, write_video

from tracknet.data import loader as loader_module
from tracknet.data.batch import Batch, as_stored
from tracknet.data.build import Datasets, build_datasets
from tracknet.data.dataset import WindowDataset
from tracknet.data.loader import EpochLoader
from tracknet.data.sampler import EpochBatchSampler
from tracknet.errors import ConfigError, DataError, UserError
from tracknet.schema.data import AugmentConfig, DataConfig, PreprocessConfig, SequenceConfig, SplitConfig, SyntheticConfig
from tracknet.schema.training import DataLoaderConfig


def config_for(place: Path, **changes: Any) -> DataConfig:
    """Training on game1, validation on game2, everything drawn that can be."""
    values: dict[str, Any] = {
        "root": str(place),
        "split": SplitConfig(["game1"], ["game2"]),
        "preprocess": PreprocessConfig(flip_prob=0.5),
        "sequence": SequenceConfig(length=3),
        "augment": AugmentConfig(scale=[0.7, 1.4], brightness=0.2, reverse_prob=0.5, crop=[40, 32]),
        "background": "median",
        "cache_dir": str(place.parent / "cache"),
    }
    return DataConfig(**{**values, **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_games(tmp_path / "data", ["game1", "game2"], clips=2, size_wh=(64, 48))
    return tmp_path / "data"


def loader_for(datasets: Datasets, workers: int, persistent: bool = True) -> EpochLoader:
    sampler = EpochBatchSampler(len(datasets.train), 3, 0, 1, seed=5, shuffle=True, drop_last=False)
    return EpochLoader(datasets.train, sampler, DataLoaderConfig(num_workers=workers, persistent_workers=persistent))


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(
        x is y is None or (torch.equal(x, y) and x.stride() == y.stride())
        for a, b in zip(one, other, strict=True)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("augment", [True, False])
def test_the_number_of_workers_changes_nothing(root: Path, augment: bool) -> None:
    changes = {} if augment else {"augment": AugmentConfig(), "preprocess": PreprocessConfig(), "background": "none"}
    datasets = build_datasets(config_for(root, **changes), seed=1)
    alone, one, two, anew = (
        loader_for(datasets, 0),
        loader_for(datasets, 1),
        loader_for(datasets, 2),
        loader_for(datasets, 2, persistent=False),
    )
    for epoch in (0, 1):
        expected = list(alone.epoch(epoch))
        assert len(expected) == len(alone) == 4
        assert same(list(one.epoch(epoch)), expected)
        assert same(list(two.epoch(epoch)), expected)
        assert same(list(anew.epoch(epoch)), expected)
    assert not same(list(alone.epoch(0)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumed_is_the_tail_of_the_epoch(root: Path, workers: int) -> None:
    datasets = build_datasets(config_for(root), seed=1)
    loader = loader_for(datasets, workers)
    whole = list(loader.epoch(3))
    left_early = loader.epoch(1)
    next(left_early)
    for first in range(len(whole) + 1):
        seen = sum(len(batch) for batch in whole[:first])
        assert same(list(loader.epoch(3, windows_seen=seen)), whole[first:])


def test_loading_draws_nothing_from_the_global_generators(root: Path) -> None:
    loader = loader_for(build_datasets(config_for(root), seed=1), 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def worker_ids() -> set[int]:
    """Process ids of our children."""
    return {int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_outlive_a_signal_that_others_send_and_leave_with_their_loader(root: Path) -> None:
    others = worker_ids()
    loader = loader_for(build_datasets(config_for(root), seed=1), 2)
    batches = loader.epoch(0)
    first = next(batches)
    workers = [process_id for process_id in worker_ids() - others if is_running(process_id)]
    assert len(workers) >= 2
    killer = " ".join(f"kill -TERM {worker}; kill -INT {worker};" for worker in workers)
    assert os.system(killer) == 0
    time.sleep(0.2)
    assert len([first, *batches]) == 4
    loaders = [worker for worker in workers if is_running(worker)]
    del batches, loader
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in loaders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in loaders)


def test_workers_obey_the_main_process(root: Path) -> None:
    others = worker_ids()
    loader = loader_for(build_datasets(config_for(root), seed=1), 1)
    next(loader.epoch(0))
    (worker,) = [process_id for process_id in worker_ids() - others if is_running(process_id)]
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)


def fork_that_hangs(children: set[int], calls_before: int) -> Callable[[], int]:
    """As `os.fork`, but from some call on the child gets stuck in it and hears no signal; `children` takes the ids of those."""
    fork = os.fork
    calls = 0

    def hanging() -> int:
        nonlocal calls
        calls += 1
        hangs = calls > calls_before
        process_id = fork()
        if process_id == 0 and hangs:
            signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.Signals))
            time.sleep(120)
            os._exit(0)
        if hangs:
            children.add(process_id)
        return process_id

    return hanging


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("healthy", [0, 1])
def test_a_worker_that_hangs_in_its_start_is_ended_and_comes_as_a_line(root: Path, monkeypatch, persistent: bool, healthy: int) -> None:
    loader = loader_for(build_datasets(config_for(root), seed=1), 2, persistent)
    monkeypatch.setattr(loader_module, "START_S", 0.5)
    stuck: set[int] = set()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fork_that_hangs(stuck, healthy))
        batches = loader.epoch(0)
    before = signal.getsignal(signal.SIGCHLD)
    (got,) = batches
    assert type(got) is UserError
    assert str(got).startswith("a data worker did not start within ")
    assert str(got).endswith("s; start again with --resume auto, or set training.data_loader.num_workers=0")
    assert len(stuck) == 2 - healthy
    assert not any(is_running(process_id) for process_id in stuck)
    time.sleep(0.2)  # where PyTorch's handler heard of it, it raises here
    assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_an_epoch_that_is_left_before_its_first_batch_hides_no_worker_that_hangs(root: Path, monkeypatch) -> None:
    loader = loader_for(build_datasets(config_for(root), seed=1), 1)
    monkeypatch.setattr(loader_module, "START_S", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fork_that_hangs(set(), 0))
        loader.epoch(0)
    assert [type(batch) for batch in loader.epoch(0)] == [UserError]


def test_a_worker_that_is_slow_to_start_is_waited_for(root: Path, monkeypatch) -> None:
    datasets = build_datasets(config_for(root), seed=1)
    start = loader_module._start_worker

    def slowly() -> None:
        time.sleep(1)
        start()

    monkeypatch.setattr(loader_module, "_start_worker", slowly)
    assert same(list(loader_for(datasets, 2).epoch(0)), list(loader_for(datasets, 0).epoch(0)))


def test_an_error_in_the_start_of_a_worker_keeps_its_traceback(root: Path, monkeypatch) -> None:
    def fails() -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(loader_module, "_start_worker", fails)
    with pytest.raises(KeyError, match="a mistake"):
        next(loader_for(build_datasets(config_for(root), seed=1), 1).epoch(0))


# The main process is killed before its worker can ask the kernel to be told of that.
LEAVES_AN_ORPHAN = """
import multiprocessing, os, signal, time
from tracknet.data import loader

def until_the_main_process_has_gone(_):
    while os.getppid() == main:
        time.sleep(0.01)

def work():
    loader._start_worker()
    time.sleep(120)

main = os.getpid()
loader.cv2.setNumThreads = until_the_main_process_has_gone
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
print(worker.pid, flush=True)
os.kill(main, signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_worker_whose_main_process_has_gone_before_it_could_notice_leaves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("w") as file:
        subprocess.run([sys.executable, "-c", LEAVES_AN_ORPHAN], stdout=file, check=False)
    worker = int(out.read_text())
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_vanishes_changes_nothing_and_a_source_that_vanishes_too_is_one_line(root: Path, workers: int) -> None:
    expected = list(loader_for(build_datasets(config_for(root), seed=1), 0).epoch(0))
    datasets = build_datasets(config_for(root), seed=1)
    shutil.rmtree(root.parent / "cache")
    assert same(list(loader_for(datasets, workers).epoch(0)), expected)
    shutil.rmtree(root)
    for error in loader_for(datasets, workers).epoch(0):
        assert isinstance(error, DataError)
        assert "\n" not in str(error)
        assert str(error).startswith(str(root))


def test_both_sides_are_built_as_configured(root: Path) -> None:
    datasets = build_datasets(config_for(root, preprocess=PreprocessConfig(resize=[48, 36])), seed=1)
    assert datasets.input_wh == (48, 36)
    assert datasets.dropped == []
    assert (datasets.train.index.games, datasets.val.index.games) == (("game1",), ("game2",))
    assert datasets.train.batch([(0, 0)]).frames.shape == (1, 3, 3, 32, 40)
    assert datasets.val.batch([(0, 0)]).frames.shape == (1, 3, 3, 36, 48)
    plain = build_datasets(config_for(root, background="none", augment=AugmentConfig(), sequence=SequenceConfig(enabled=False)), seed=1)
    batch = plain.train.batch([(0, 0)])
    assert batch.frames.shape == (1, 1, 3, 48, 64)
    assert batch.background is None
    assert plain.input_wh == (64, 48)


def test_real_frames_train_in_crops_and_evaluate_whole(tmp_path: Path) -> None:
    first_frames_of_real_clip(tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "game1", tmp_path / "data" / "game2", symlinks=True)
    config = config_for(tmp_path / "data", preprocess=PreprocessConfig(resize=[512, 288]), augment=AugmentConfig(crop=[160, 160]))
    datasets = build_datasets(config, seed=1)
    train, val = next(loader_for(datasets, 0).epoch(0)), datasets.val.batch([(0, 0)])
    assert train.frames.shape[2:] == (3, 160, 160)
    assert val.frames.shape[2:] == (3, 288, 512)


def break_picture(root: Path) -> str:
    picture = root / "game1" / "Clip1" / "0004.png"
    picture.write_bytes(picture.read_bytes()[:200])
    return str(picture)


def break_label(root: Path) -> str:
    labels = root / "game1" / "Clip1" / "Label.csv"
    labels.write_text(labels.read_text().replace("0004.png,1", "0004.png,9"))
    return f"{labels}:6"


def break_video(root: Path) -> str:
    clip = root / "game1" / "Clip1"
    shutil.rmtree(clip)
    write_labels(clip / "Label.csv", label_rows(torch.full((5, 2), 20.0).numpy(), [1] * 5))
    write_video(clip / "a.mp4", [blob_picture((64, 48), (20, 20))] * 4)
    return "a.mp4: has 4 frames, but its labels are for 5"


@pytest.mark.parametrize("break_clip", [break_picture, break_label, break_video])
def test_a_broken_clip_stops_the_run_or_is_dropped_and_counted(
    root: Path, break_clip: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    named = break_clip(root)
    with pytest.raises(DataError) as caught:
        build_datasets(config_for(root), seed=1)
    assert named in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="tracknet"):
        datasets = build_datasets(config_for(root, on_error="skip"), seed=1)
    assert [clip.name for clip in datasets.train.index.clips] == ["Clip2"]
    assert len(datasets.train) == 6
    assert len(datasets.dropped) == 1
    assert named in datasets.dropped[0]
    one, total = caplog.messages
    assert named in one
    assert total == "1 of 4 clips skipped (data.on_error=skip)"


def test_clips_shorter_than_a_window_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(root / "game2" / "Clip3", count=2)
    with caplog.at_level(logging.INFO, logger="tracknet"):
        build_datasets(config_for(root), seed=1)
        build_datasets(config_for(root, sequence=SequenceConfig(length=2)), seed=1)
    assert [message for message in caplog.messages if "fewer" in message] == [
        "1 of 5 clips have fewer than data.sequence.length=3 frames; their last is repeated"
    ]


def test_a_split_that_skipping_emptied_is_an_error(root: Path) -> None:
    break_picture(root)
    shutil.rmtree(root / "game1" / "Clip2")
    with pytest.raises(DataError, match=r"data\.split\.train_games: no usable clip is left in game1"):
        build_datasets(config_for(root, on_error="skip"), seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": SplitConfig(["game1"], ["game1/"])}, r"'game1/', which is not the plain name of a folder"),
        ({"root": None, "synthetic": SyntheticConfig(), "split": SplitConfig(["../game1"], ["game2"])}, r"'\.\./game1', which is not"),
        ({"split": SplitConfig(["game1"], ["again"])}, r"game1/Clip1 of train_games and again/Clip1 of val_games are the same footage"),
        ({"split": SplitConfig(["game3"], ["game2"])}, r"'game3'.*games there: again, game1, game2"),
        ({"root": "/nowhere"}, r"data\.root: no folder /nowhere.*--data demo"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_named(root: Path, changes: dict[str, Any], message: str) -> None:
    (root / "again").symlink_to(root / "game1")
    with pytest.raises(ConfigError, match=message) as caught:
        build_datasets(config_for(root, **changes), seed=1)
    assert "\n" not in str(caught.value)


def test_clips_of_several_sizes_need_a_resize(root: Path) -> None:
    write_clip(root / "game2" / "Clip3", size_wh=(80, 60))
    with pytest.raises(ConfigError, match=r"data\.preprocess\.resize: .*game1/Clip1 64x48 and game2/Clip3 80x60"):
        build_datasets(config_for(root), seed=1)
    datasets = build_datasets(config_for(root, preprocess=PreprocessConfig(resize=[48, 36])), seed=1)
    assert datasets.val.batch([(0, 7)]).frames.shape == (1, 3, 3, 36, 48)


class Ranks:
    """Threads that stand for processes: `gather` joins their lists and waits for all, as a collective does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.lists: list[list[Any]] = [[] for _ in range(size)]

    def gather(self, rank: int) -> Callable[[list[Any]], list[Any]]:
        def join(items: list[Any]) -> list[Any]:
            self.lists[rank] = items
            self.barrier.wait()
            together = [item for one in self.lists for item in one]
            self.barrier.wait()
            return together

        return join

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank returns or raises."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def build_on_two_ranks(configs: Sequence[DataConfig]) -> list[Any]:
    ranks = Ranks(2)
    return ranks.run(lambda rank: build_datasets(configs[rank], seed=1, share=(rank, 2), gather=ranks.gather(rank)))


def test_two_ranks_decode_half_each_and_end_with_the_same_clips(root: Path) -> None:
    break_picture(root)
    one, other = build_on_two_ranks([config_for(root, on_error="skip")] * 2)
    assert [clip.id for clip in one.train.index.clips] == [clip.id for clip in other.train.index.clips] == ["game1/Clip2"]
    assert one.dropped == other.dropped
    assert len(one.dropped) == 1
    assert len(list((root.parent / "cache" / "frames").iterdir())) == 6


@pytest.mark.parametrize("clip", ["Clip1", "Clip2"])
def test_all_ranks_raise_the_error_of_the_one_that_met_it(root: Path, clip: str) -> None:
    picture = root / "game1" / clip / "0004.png"
    picture.write_bytes(picture.read_bytes()[:200])
    one, other = build_on_two_ranks([config_for(root)] * 2)
    assert isinstance(one, DataError)
    assert isinstance(other, DataError)
    assert str(one) == str(other)
    assert str(picture) in str(one)


def test_machines_with_different_data_stop_with_one_error(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "game1" / "Clip2")
    one, other = build_on_two_ranks([config_for(root), config_for(tmp_path / "elsewhere", cache_dir=str(tmp_path / "c2"))])
    assert isinstance(one, DataError)
    assert str(one) == str(other)
    assert "game1/Clip2 (8 frames) is not on all of them" in str(one)


def test_a_root_missing_on_one_machine_stops_all(root: Path) -> None:
    one, other = build_on_two_ranks([config_for(root), config_for(root, root="/nowhere")])
    assert isinstance(one, UserError)
    assert str(one) == str(other)
    assert "no folder /nowhere" in str(one)


def test_the_demo_is_drawn_once_for_all_ranks(tmp_path: Path) -> None:
    synthetic = SyntheticConfig(size=[128, 72], clips_per_game=1, frames_per_clip=4)
    config = config_for(tmp_path, root=None, synthetic=synthetic, cache_dir=str(tmp_path), augment=AugmentConfig())
    one, other = build_on_two_ranks([config] * 2)
    assert not isinstance(one, Exception), one
    assert one.input_wh == other.input_wh == (128, 72)
    assert (len(one.train.index), len(one.val.index)) == (4, 4)
    assert same([one.train.batch([(0, 0)])], [other.train.batch([(0, 0)])])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(errno.ENOMEM, "no"), MemoryError()])
def test_memory_that_runs_out_while_loading_comes_as_a_line(root: Path, workers: int, error: Exception, monkeypatch) -> None:
    def fails(*_):
        raise error

    monkeypatch.setattr(WindowDataset, "block", fails)
    loader = loader_for(build_datasets(config_for(root), seed=1), workers)
    got = next(loader.epoch(0))
    assert isinstance(got, UserError)
    assert ("num_workers" in str(got)) == (workers > 0)


def test_a_batch_that_a_worker_cannot_hand_over_comes_as_a_line(root: Path, monkeypatch) -> None:
    def fails(byte_count):
        raise RuntimeError("unable to mmap 98304 bytes from file </torch_1>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", fails)
    assert isinstance(next(loader_for(build_datasets(config_for(root), seed=1), 1).epoch(0)), UserError)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere shared memory is a file of another kind")
def test_shared_memory_that_is_full_comes_as_a_line_before_anything_is_written(root: Path, monkeypatch) -> None:
    def is_full(file: int, start: int, count: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    got = next(loader_for(build_datasets(config_for(root), seed=1), 1).epoch(0))
    assert type(got) is UserError
    assert "/dev/shm" in str(got)
    assert "training.data_loader.num_workers=0" in str(got)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_one_piece_of_memory_in_the_order_of_the_files(root: Path, workers: int) -> None:
    for batch in loader_for(build_datasets(config_for(root), seed=1), workers).epoch(0):
        assert as_stored(batch.frames).is_contiguous()
        assert as_stored(batch.background).is_contiguous()
        assert len({value.untyped_storage().data_ptr() for value in vars(batch).values()}) == 1
        assert all(value.is_shared() == (workers > 0) for value in vars(batch).values())


def test_memory_that_runs_out_in_receiving_a_batch_comes_as_a_line(root: Path, monkeypatch) -> None:
    loader = loader_for(build_datasets(config_for(root), seed=1), 0)

    def fails(self, index):
        raise RuntimeError("unable to mmap 98304 bytes: Cannot allocate memory (12)")

    batches = loader.epoch(0)
    monkeypatch.setattr(type(loader._loader.dataset), "__getitem__", fails)
    assert isinstance(next(batches), UserError)

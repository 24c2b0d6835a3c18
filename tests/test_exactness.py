"""The update's gradient is that of the whole batch of all ranks, to rounding, however the batch is cut and spread."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exactness_probe import TOLERANCE, Case, cases, gradient_of_step, plain_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from tracknet.data.batch import Batch
from tracknet.losses import frame_losses
from tracknet.models import build_model
from tracknet.schema.training import LossConfig
from tracknet.training.gradient import Gradients, SummedLoss, squared_norm
from tracknet.utils.config import build_cfg, typed

PROBE = Path(__file__).with_name("exactness_probe.py")


def relative_error(gradient: torch.Tensor, of: torch.Tensor) -> float:
    """Of the norm; where that is 0, so must the gradient be."""
    difference, norm = (gradient.double() - of.double()).norm(), of.double().norm()
    return float(difference / norm) if norm else float("inf") if difference else 0.0


@st.composite
def cases_of_one_rank(draw, dtype: str) -> Case:
    size = draw(st.integers(1, 33))
    share = st.floats(0, 0.9)
    case = Case(
        seed=draw(st.integers(0, 2**31)),
        size=size,
        first_share=size,
        micro_batch_size=size,
        loss=draw(st.sampled_from(["mse", "focal"])),
        invisible_share=draw(share),
        unlabelled_share=draw(share),
        clip_norm=0.0,
        scaled=draw(st.booleans()),
        dtype=dtype,
    )
    clips_at = draw(st.sampled_from([0.0, 0.1, 10.0]))  # of the gradient's norm
    return replace(case, clip_norm=clips_at * plain_gradient(case)[1])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_micro_batch_size_changes_the_gradient(dtype):
    @settings(max_examples=60, deadline=None)
    @given(cases_of_one_rank(dtype))
    def holds(case: Case) -> None:
        expected, expected_norm = plain_gradient(case)
        assert torch.isfinite(expected).all()
        for micro_batch_size in range(1, case.size + 1):
            gradient, norm = gradient_of_step(replace(case, micro_batch_size=micro_batch_size), case.batch())
            assert relative_error(gradient, expected) <= TOLERANCE[dtype], micro_batch_size
            assert norm == pytest.approx(expected_norm, rel=TOLERANCE[dtype])

    holds()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory) -> list[np.lib.npyio.NpzFile]:
    folder = tmp_path_factory.mktemp("exactness")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(PROBE.parents[1])}
    done = subprocess.run([*launcher, str(PROBE), str(folder)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"rank{rank}.npz") for rank in (0, 1)]


def test_two_ranks_of_unequal_content_make_the_gradient_of_one_process(of_two_ranks):
    first, second = of_two_ranks
    assert first["world_size"] == second["world_size"] == 2
    for case in cases():
        gradient, norm = torch.from_numpy(first[str(case.seed)][:-1]), first[str(case.seed)][-1]
        assert np.array_equal(first[str(case.seed)], second[str(case.seed)])
        expected, expected_norm = plain_gradient(case)
        assert relative_error(gradient, expected) <= TOLERANCE[case.dtype], case
        assert norm == pytest.approx(expected_norm, rel=TOLERANCE[case.dtype]), case


def test_the_steps_of_two_ranks_are_of_every_kind():
    drawn = cases()
    empty = [case for case in drawn if case.first_share in (0, case.size)]
    nothing_labelled = Counter(case.unlabelled_ranks for case in drawn)
    clipped = [case for case in drawn if 0 < case.clip_norm < plain_gradient(replace(case, clip_norm=0.0))[1]]
    assert min(len(empty), len(clipped), *nothing_labelled.values()) >= 10
    assert set(nothing_labelled) == {(), (0,), (1,), (0, 1)}
    assert {(case.loss, case.scaled, case.dtype) for case in clipped} == {
        (loss, scaled, dtype) for loss in ("mse", "focal") for scaled in (False, True) for dtype in TOLERANCE
    }


@pytest.mark.parametrize("loss", ["mse", "focal"])
def test_the_demos_network_keeps_within_float32s_tolerance(loss):
    config = typed(build_cfg("demo", "demo", "demo", dry_run=True))
    size, frames, (width, height) = 8, config.data.sequence.length, config.data.augment.crop
    torch.manual_seed(0)
    model = build_model(config.model, config.data, tuple(config.data.preprocess.resize)).train()
    model.to(memory_format=torch.channels_last)
    scene = F.interpolate(torch.rand(size, 3, 10, 10), size=(height, width), mode="bicubic").clamp(0, 1) * 255
    batch = Batch(
        frames=(scene[:, None] + 4 * torch.randn(size, frames, 3, height, width)).clamp(0, 255).to(torch.uint8),
        background=scene.to(torch.uint8),
        xy_input=torch.rand(size, frames, 2) * torch.tensor([width, height]),
        visible=torch.rand(size, frames) < 0.75,
        labeled=torch.ones(size, frames, dtype=torch.bool),
        sample_index=torch.arange(size),
        frame_row=torch.zeros(size, frames, dtype=torch.int64),
        counted=torch.ones(size, frames, dtype=torch.bool),
    )
    summed_loss = SummedLoss(
        model,
        lambda logits, target: frame_losses(logits, target, LossConfig(loss)),
        nominal_frames=size * frames,
        sigma=config.model.heatmap.sigma,
        seed=0,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
    )
    gradients = Gradients(model.parameters(), flat=True)

    def gradient(micro_batch_size: int) -> torch.Tensor:
        gradients.clear()
        for part in batch.split(micro_batch_size):
            summed_loss.backward(part, step=0)
        return gradients.tensors()[0].clone()

    whole = gradient(size)
    assert max(relative_error(gradient(cut), whole) for cut in (4, 2, 1)) <= TOLERANCE["float32"]


def test_the_norm_of_many_numbers_is_right_in_float32():
    numbers = torch.randn(4, 1024, 1024, generator=torch.Generator().manual_seed(0))
    parts = [numbers[0], numbers[1].t(), numbers[2:].flatten()[1:]]
    expected = sum(float(part.double().square().sum()) for part in parts)
    assert float(squared_norm(parts)) == pytest.approx(expected, rel=1e-6)
    assert float(squared_norm([torch.zeros(0), torch.full((3,), 2.0)])) == pytest.approx(12.0, rel=1e-6)

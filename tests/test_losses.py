"""Losses against the papers' formulas, written out cell by cell."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracknet.heatmap import render_heatmaps
from tracknet.losses import focal_frame_losses, frame_losses
from tracknet.schema.training import LossConfig


def cornernet(logits: torch.Tensor, target: torch.Tensor, alpha: float, beta: float) -> float:
    """Equation 1 of arXiv 1808.01244 for one frame with one object, in a loop; y = 1 at the cell nearest to it."""
    total = 0.0
    ball = int(target.argmax()) if target.max() > 0 else None
    for i, (x, y) in enumerate(zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True)):
        p = 1 / (1 + math.exp(-x))
        total -= (1 - p) ** alpha * math.log(p) if i == ball else (1 - y) ** beta * p**alpha * math.log(1 - p)
    return total


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([(2.0, 4.0), (0.0, 0.0), (1.5, 2.5)]))
def test_focal_is_equation_1_of_cornernet(seed, visible, constants):
    logits = torch.randn(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    target = render_heatmaps(torch.tensor([4.3, 2.8], dtype=torch.float64), torch.tensor(visible), (7, 9), 1.5)
    assert float(focal_frame_losses(logits, target, *constants)) == pytest.approx(cornernet(logits, target, *constants), rel=1e-9)


def test_mse_is_the_mean_squared_difference_of_probabilities():
    logits, target = torch.randn(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    expected = torch.nn.functional.mse_loss(torch.sigmoid(logits), target, reduction="none").flatten(2).mean(2)
    torch.testing.assert_close(frame_losses(logits, target, LossConfig(name="mse")), expected)


@pytest.mark.parametrize("config", [LossConfig("mse"), LossConfig("focal"), LossConfig("focal", alpha=0.5, beta=0.5)])
@pytest.mark.parametrize("extreme", [-200.0, 200.0])
def test_extreme_logits_give_finite_losses_and_gradients_in_half_precision(config, extreme):
    logits = torch.full((1, 2, 4, 4), extreme, dtype=torch.float16, requires_grad=True)
    target = render_heatmaps(torch.full((1, 2, 2), 1.6), torch.tensor([[True, False]]), (4, 4), 1.0)
    losses = frame_losses(logits, target, config)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["mse", "focal"])
def test_a_frame_without_a_ball_is_learned_as_empty(name):
    logits = torch.zeros(1, 1, 6, 6, requires_grad=True)
    frame_losses(logits, torch.zeros(1, 1, 6, 6), LossConfig(name=name)).sum().backward()
    assert (logits.grad > 0).all()

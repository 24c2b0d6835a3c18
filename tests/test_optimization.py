"""Optimizers and schedules do what their configuration says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tracknet.schema.training import OPTIMIZERS, SCHEDULERS, ConstantConfig, CosineConfig, LinearConfig, SgdConfig, StepConfig
from tracknet.training.optimization import LearningRate, build_optimizer, lr_factor, state_tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_its_own_arguments_and_lowers_a_loss(name):
    model = nn.Linear(4, 1)
    optimizer = build_optimizer(OPTIMIZERS[name](), model.parameters())
    x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.ones(64, 1)
    losses = []
    for _ in range(50):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    kept = {name: value for name, value in optimizer.state[model.weight].items() if torch.is_tensor(value)}
    assert {name: value.shape == model.weight.shape for name, value in kept.items()} == {n: n != "step" for n in state_tensors(optimizer)}
    assert type(optimizer).__name__.lower() == name


def test_biases_and_norms_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4))
    optimizer = build_optimizer(SgdConfig(lr=1.0, weight_decay=0.5, momentum=0.0), model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.5 if name == "0.weight" else 1.0))


schedules = st.one_of(
    st.builds(CosineConfig, warmup_epochs=st.floats(0, 2), min_lr_ratio=st.floats(0, 1)),
    st.builds(LinearConfig, warmup_epochs=st.floats(0, 2), min_lr_ratio=st.floats(0, 1)),
    st.builds(ConstantConfig, warmup_epochs=st.floats(0, 2)),
    st.builds(StepConfig, warmup_epochs=st.floats(0, 2), step_epochs=st.floats(0.5, 3), gamma=st.floats(0.1, 1)),
)


@given(schedules, st.integers(1, 300), st.integers(1, 50))
def test_every_schedule_rises_in_the_warm_up_and_never_afterwards(config, total_steps, steps_per_epoch):
    factors = [lr_factor(config, step, total_steps, steps_per_epoch) for step in range(total_steps)]
    warmup = round(config.warmup_epochs * steps_per_epoch)
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_known_points_of_the_schedules():
    assert lr_factor(CosineConfig(min_lr_ratio=0.01), 0, 101, 10) == 1
    assert lr_factor(CosineConfig(min_lr_ratio=0.01), 50, 101, 10) == pytest.approx(0.505)
    assert lr_factor(CosineConfig(min_lr_ratio=0.01), 100, 101, 10) == pytest.approx(0.01)
    assert lr_factor(LinearConfig(min_lr_ratio=0.0), 25, 101, 10) == pytest.approx(0.75)
    assert lr_factor(StepConfig(step_epochs=2, gamma=0.1), 39, 101, 10) == pytest.approx(0.1)
    assert lr_factor(ConstantConfig(warmup_epochs=1), 4, 101, 10) == pytest.approx(5 / 11)


def test_every_schedule_of_the_schema_has_its_rule():
    for config in SCHEDULERS.values():
        assert isinstance(lr_factor(config(), 3, 10, 5), float)


def test_the_learning_rate_reaches_every_group_of_the_optimizer():
    optimizer = build_optimizer(SgdConfig(lr=0.2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).parameters())
    learning_rate = LearningRate(LinearConfig(), optimizer, base=0.2, total_steps=11, steps_per_epoch=11)
    assert learning_rate.apply(5) == pytest.approx(0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1])

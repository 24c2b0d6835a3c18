"""The moving average of the weights."""

import copy

import pytest
import torch
from torch import nn

from tracknet.errors import UserError
from tracknet.training.ema import Ema


class Net(nn.Module):
    """A linear layer, a frozen one, a buffer that changes and a parameter that is not floating."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2, dtype=dtype)
        self.frozen = nn.Linear(2, 2, dtype=dtype).requires_grad_(False)
        self.count = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(()))


def shake(model: Net, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.a.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    model.seen += 1


def test_the_average_follows_its_formula() -> None:
    model, decay = Net(), 0.5
    ema = Ema(model, decay)
    expected = model.a.weight.detach().double()
    for n in range(20):
        shake(model, n)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.a.weight.detach().double()
    torch.testing.assert_close(ema.state_tensors()["a.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert decay < (1 + 19) / (10 + 19), "the warm-up must be over"


def test_frozen_weights_stay_as_they_are_and_follow_once_they_train() -> None:
    model = Net()
    ema = Ema(model, 0.9)
    for n in range(30):
        shake(model, n)
        ema.update()
    assert torch.equal(ema.state_tensors()["frozen.weight"], model.frozen.weight)
    with torch.no_grad():
        model.frozen.weight += 1
    ema.update()
    assert not torch.equal(ema.state_tensors()["frozen.weight"], model.frozen.weight - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_model_has_its_own_weights_again_bit_for_bit(dtype: torch.dtype) -> None:
    model = Net(dtype)
    ema = Ema(model, 0.99)
    for n in range(5):
        shake(model, n)
        ema.update()
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    averages = {name: t.clone() for name, t in ema.state_tensors().items()}
    with pytest.raises(ZeroDivisionError), ema.averaged():  # noqa: PT012
        assert not torch.equal(model.a.weight, before["a.weight"])
        assert torch.equal(model.a.weight, averages["a.weight"].to(dtype))
        assert torch.equal(model.seen, before["seen"])
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(torch.equal(value, averages[name]) and value.dtype == torch.float32 for name, value in ema.state_tensors().items())


@pytest.mark.parametrize("updates_before", [0, 1, 4, 50])
def test_a_restored_average_goes_on_as_if_nothing_had_happened(updates_before: int) -> None:
    model = Net()
    ema = Ema(model, 0.8)
    for n in range(updates_before):
        shake(model, n)
        ema.update()
    other = copy.deepcopy(model)
    again = Ema(other, 0.8)
    with ema.averaged():  # from a model file, whose buffers are of no concern
        again.load(copy.deepcopy(model.state_dict()), ema.updates)
    for n in range(100, 105):
        shake(model, n)
        shake(other, n)
        ema.update()
        again.update()
    assert all(torch.equal(value, ema.state_tensors()[name]) for name, value in again.state_tensors().items())


def test_averages_of_another_model_are_refused_and_change_nothing() -> None:
    model = Net()
    ema = Ema(model, 0.9)
    good = {name: t.clone() + 1 for name, t in ema.state_tensors().items()}
    before = {name: t.clone() for name, t in ema.state_tensors().items()}
    with pytest.raises(UserError, match=r"lack frozen\.bias"):
        ema.load({name: t for name, t in good.items() if name != "frozen.bias"}, 3)
    with pytest.raises(UserError, match=r"frozen\.bias has shape \[5\], the model's has \[2\]"):
        ema.load(good | {"frozen.bias": torch.zeros(5)}, 3)
    assert all(torch.equal(t, before[name]) for name, t in ema.state_tensors().items())
    assert ema.updates == 0
    ema.load(good, 3)
    assert all(torch.equal(t, good[name]) for name, t in ema.state_tensors().items())

"""How a run is computed: threads, the order in memory, fused updates, seeds. None of it changes what is computed."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tracknet.data.build import Datasets
from tracknet.schema.training import OPTIMIZERS
from tracknet.training import build, run
from tracknet.training.gradient import Gradients, _seed_generators
from tracknet.training.optimization import OPTIMIZER_CLASSES, build_optimizer
from tracknet.training.ranks import Ranks
from tracknet.utils.config import build_cfg, typed

SMALL = ["model.backbone.channels=[4,8]"]


@pytest.mark.parametrize(("asked", "threads"), [(0, 2), (1, 1), (3, 3)])
def test_the_run_has_the_threads_that_were_asked_for(asked: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(run, "_train", lambda *_: torch.get_num_threads())
    cfg = build_cfg("demo", "demo", "demo", overrides=[f"training.num_threads={asked}"], output_dir=tmp_path, dry_run=True)
    try:
        torch.set_num_threads(2)
        assert run.train(cfg, None) == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_features_lie_in_memory_as_asked(channels_last: bool) -> None:
    overrides = [*SMALL, f"training.channels_last={str(channels_last).lower()}"]
    config = typed(build_cfg("demo", "demo", "demo", overrides=overrides, dry_run=True))
    datasets = Datasets(None, None, tuple(config.data.preprocess.resize), [])  # type: ignore[arg-type]
    model = build.build_network(config, datasets, Ranks(Accelerator(cpu=True)), None)
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    seen: list[bool] = []
    layer.register_forward_hook(lambda _, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last)))
    background = torch.zeros(2, 3, 32, 32, dtype=torch.uint8) if config.data.background == "median" else None
    model(torch.zeros(2, config.data.sequence.window_frames, 3, 32, 32, dtype=torch.uint8), background)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert layer.weight.is_contiguous() != channels_last
    assert seen == [channels_last]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_fused_updates_are_those_of_the_plain_optimizer_in_any_order_in_memory(name: str) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(4, 7, 1, 1), torch.randn(9)]
    mine, plain = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    config = OPTIMIZERS[name](weight_decay=0.1)
    fused = build_optimizer(config, mine)
    reference = build_optimizer(config, plain)
    for group in reference.param_groups:
        group["fused"] = False
    assert all(bool(group.get("fused")) == name.startswith("adam") for group in fused.param_groups)
    gradients = Gradients(mine, flat=True)
    for _ in range(3):
        gradients.clear()
        for one, other in zip(mine, plain, strict=True):
            factor = torch.randn_like(one)
            torch.autograd.backward((one * factor).sum())
            other.grad = factor.clone()
        gradients.tensors()
        fused.step()
        reference.step()
    assert type(fused) is OPTIMIZER_CLASSES[name]
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_of_micro_batches_add_up_in_one_buffer_and_what_has_none_is_zero() -> None:
    used, unused = nn.Parameter(torch.randn(3, 2).t()), nn.Parameter(torch.randn(4))
    gradients = Gradients([used, unused], flat=True)
    for factors in ((1.0, 2.0), (5.0,)):
        gradients.clear()
        for factor in factors:
            torch.autograd.backward((used * factor).sum())
        (buffer,) = gradients.tensors()
        assert used.grad is not None
        assert torch.equal(used.grad, torch.full_like(used, sum(factors)))
        assert used.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert buffer.tolist() == [sum(factors)] * 6 + [0.0] * 4
        buffer.fill_(7.0)  # what an update leaves there
    gradients.close()
    used.grad = None
    torch.autograd.backward(used.sum())
    assert buffer.tolist() == [7.0] * 10


def test_parameters_that_nobody_needs_are_not_kept_by_their_gradients() -> None:
    parameter = nn.Parameter(torch.randn(3))
    gradients = Gradients([parameter], flat=True)
    torch.autograd.backward(parameter.sum())
    gone = weakref.ref(parameter), weakref.ref(gradients)
    del parameter, gradients
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_the_seed_of_a_step_is_that_of_torch_manual_seed() -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    _seed_generators(torch.device("cpu"), 123)
    assert torch.equal(torch.rand(3), expected)

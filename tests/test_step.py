"""One update is that of the whole batch, however it is cut."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tracknet.data.batch import Batch
from tracknet.errors import ConfigError, UserError
from tracknet.losses import frame_losses
from tracknet.schema.training import LossConfig, TrainingConfig
from tracknet.training.gradient import SummedLoss, dropout_keys
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.ranks import Ranks
from tracknet.training.step import TrainingStep


class TinyNetwork(nn.Module):
    """Two convolutions over the channels of a window; fails on purpose where `fail` says so."""

    def __init__(self, frames: int = 2, fail=lambda size: None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3 * frames, 4, 3, stride=2, padding=1), nn.Conv2d(4, frames, 3, padding=1)
        self.fail = fail

    def forward(self, frames, background, dropout_keys):
        self.fail(len(frames))
        return self.second(torch.tanh(self.first(frames.flatten(1, 2).to(self.first.weight.dtype) / 255)))


def make_batch(size: int, seed: int, visible_share: float = 0.7, labeled_share: float = 0.8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(size, 2, generator=generator) < visible_share
    return Batch(
        frames=torch.randint(0, 256, (size, 2, 3, 12, 16), dtype=torch.uint8, generator=generator),
        background=None,
        xy_input=torch.rand(size, 2, 2, generator=generator) * 10,
        visible=visible,
        labeled=torch.rand(size, 2, generator=generator) < labeled_share,
        sample_index=torch.arange(size),
        frame_row=torch.zeros(size, 2, dtype=torch.int64),
        counted=torch.ones(size, 2, dtype=torch.bool),
    )


def make_step(network: nn.Module, config: TrainingConfig, loss: str = "mse", clip_norm: float = 0.0, scaled: bool = False) -> TrainingStep:
    ranks = Ranks(Accelerator(cpu=True))
    summed_loss = SummedLoss(
        network,
        lambda logits, target: frame_losses(logits, target, LossConfig(name=loss)),
        nominal_frames=2 * config.batch_size,
        sigma=1.5,
        seed=0,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=scaled),
        device=ranks.device,
    )
    return TrainingStep(
        summed_loss,
        torch.optim.SGD(network.parameters(), lr=1.0),
        ranks=ranks,
        micro_batch=MicroBatchSize(config.micro_batch_size or config.batch_size, config),
        clip_norm=clip_norm,
        describe=lambda index: f"window {index}",
    )


def weights_after(network: nn.Module, batch: Batch, config: TrainingConfig, **arguments) -> torch.Tensor:
    network = copy.deepcopy(network)
    make_step(network, config, **arguments)(batch, step=0, stop=False)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 33),
    st.integers(1, 33),
    st.sampled_from(["mse", "focal"]),
    st.floats(0.1, 1),
    st.floats(0.1, 1),
    st.sampled_from([0.0, 0.01]),
)
def test_micro_batches_change_no_update(size, micro, loss, visible_share, labeled_share, clip_norm):
    network = TinyNetwork().double()
    batch = make_batch(size, seed=size, visible_share=visible_share, labeled_share=labeled_share)
    whole = weights_after(network, batch, TrainingConfig(batch_size=size), loss=loss, clip_norm=clip_norm)
    cut = weights_after(network, batch, TrainingConfig(batch_size=size, micro_batch_size=min(micro, size)), loss=loss, clip_norm=clip_norm)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)


def test_the_update_is_that_of_plain_pytorch():
    network, batch = TinyNetwork().double(), make_batch(5, seed=1)
    ours = weights_after(network, batch, TrainingConfig(batch_size=5, micro_batch_size=2))
    plain = copy.deepcopy(network)
    from tracknet.geometry import resize_points
    from tracknet.heatmap import render_heatmaps

    target = render_heatmaps(resize_points(batch.xy_input, (16, 12), (8, 6)), batch.visible, (6, 8), 1.5)
    losses = (torch.sigmoid(plain(batch.frames, None, None)) - target).square().mean((-2, -1))
    losses[batch.labeled].mean().backward()
    with torch.no_grad():
        expected = torch.cat([(p - p.grad).flatten() for p in plain.parameters()])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_a_batch_with_nothing_labelled_leaves_the_weights_alone():
    network, batch = TinyNetwork(), make_batch(3, seed=2, labeled_share=0.0)
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert torch.equal(weights_after(network, batch, TrainingConfig(batch_size=3)), before)


def test_an_empty_batch_is_a_step_too():
    network, batch = TinyNetwork(), make_batch(0, seed=2)
    result = make_step(network, TrainingConfig(batch_size=3))(batch, step=0, stop=False)
    assert (result.loss, result.samples) == (0.0, 0)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    network, batch = TinyNetwork(), make_batch(6, seed=3)
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    after = weights_after(network, batch, TrainingConfig(batch_size=6, micro_batch_size=1), loss="focal", clip_norm=0.01)
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


class FailsAbove:
    """Raises an allocator's error for micro-batches above a size, after the forward pass of some of them."""

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error, self.failures = limit, error, 0

    def update(self) -> None:
        self(0)

    def __call__(self, size: int) -> None:
        if size > self.limit:
            self.failures += 1
            raise self.error


def test_running_out_of_memory_retries_the_step_at_a_smaller_size_with_the_same_update(caplog):
    network, batch = TinyNetwork().double(), make_batch(16, seed=4)
    undisturbed = weights_after(network, batch, TrainingConfig(batch_size=16))
    network.fail = FailsAbove(5, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"))
    with caplog.at_level("WARNING"):
        disturbed = weights_after(network, batch, TrainingConfig(batch_size=16))
    torch.testing.assert_close(disturbed, undisturbed, rtol=1e-12, atol=1e-13)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["step 1: out of memory at 16; now 4 micro-batches of 4, the update is unchanged"]


@pytest.mark.parametrize(
    ("settings_of_run", "advice"),
    [
        ({"adaptive_micro_batch": False, "micro_batch_size": 8}, "training.micro_batch_size"),
        ({"min_micro_batch_size": 8}, "training.min_micro_batch_size"),
        ({"oom_retries": 1}, "training.oom_retries"),
    ],
)
def test_when_no_attempt_is_left_one_line_says_what_to_lower(settings_of_run, advice):
    network = TinyNetwork(fail=FailsAbove(1, MemoryError()))
    with pytest.raises(UserError, match=advice) as raised:
        make_step(network, TrainingConfig(batch_size=16, **settings_of_run))(make_batch(16, seed=5), step=0, stop=False)
    assert "\n" not in str(raised.value)


def test_another_error_is_not_retried():
    network = TinyNetwork(fail=FailsAbove(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        make_step(network, TrainingConfig(batch_size=4))(make_batch(4, seed=5), step=0, stop=False)
    assert network.fail.failures == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples():
    network, batch = TinyNetwork(), make_batch(4, seed=6, labeled_share=1.0)
    batch.xy_input[2, 1] = float("nan")
    batch.visible[2, 1] = True
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(UserError, match=r"step 18: .*not finite for window 2;"):
        make_step(network, TrainingConfig(batch_size=4, micro_batch_size=1))(batch, step=17, stop=False)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_dropout_keys_depend_on_seed_step_and_sample_alone():
    keys = dropout_keys(1, 2, torch.arange(100))
    assert torch.equal(keys[30:60], dropout_keys(1, 2, torch.arange(30, 60)))
    assert len(set(keys.tolist())) == 100
    assert not set(keys.tolist()) & set(dropout_keys(1, 3, torch.arange(100)).tolist())
    assert (keys >= 0).all()
    dropout_keys(2**32 - 1, 10**7, torch.tensor([2**40]))


def test_fp16s_scaler_changes_no_update_and_skips_one_that_overflows():
    network, batch = TinyNetwork(), make_batch(6, seed=7)
    plain = weights_after(network, batch, TrainingConfig(batch_size=6), clip_norm=0.01)
    torch.testing.assert_close(weights_after(network, batch, TrainingConfig(batch_size=6), clip_norm=0.01, scaled=True), plain)

    before = [p.detach().clone() for p in network.parameters()]
    network.second.bias.register_hook(lambda gradient: gradient * float("inf"))
    result = make_step(network, TrainingConfig(batch_size=6), clip_norm=0.01, scaled=True)(batch, step=0, stop=False)
    assert result.skipped
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_fp16_that_overflows_at_every_scale_stops_the_run():
    network, batch = TinyNetwork(), make_batch(6, seed=7)
    network.second.bias.register_hook(lambda gradient: gradient * float("inf"))
    step = make_step(network, TrainingConfig(batch_size=6), scaled=True)
    results = (step(batch, step=number, stop=False) for number in range(100))
    with pytest.raises(UserError, match=r"overflow at every loss scale.*training\.precision"):
        assert all(result.skipped for result in results)


def test_running_out_of_memory_in_the_update_is_not_retried():
    network, batch = TinyNetwork(), make_batch(6, seed=7)
    step = make_step(network, TrainingConfig(batch_size=6))
    step._optimizer.step = FailsAbove(-1, MemoryError()).update
    step(batch, step=4, stop=False)  # all ranks leave together, and the others do not know yet
    for tell in (lambda: step(batch, step=5, stop=False), step.failed_update.raise_on_all):
        with pytest.raises(UserError, match="step 5: out of memory in the optimizer's update"):
            tell()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_lost():
    network, batch = TinyNetwork(), make_batch(6, seed=8)
    before = [p.detach().clone() for p in network.parameters()]
    network.second.bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="step 4: the gradient is not finite"):
        make_step(network, TrainingConfig(batch_size=6))(batch, step=3, stop=False)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


class Normalised(nn.Module):
    """A network with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny, self.norm = TinyNetwork(), nn.BatchNorm2d(2)

    def forward(self, frames, background, dropout_keys):
        return self.norm(self.tiny(frames, background, dropout_keys))


def test_batch_statistics_are_refused_unless_they_are_frozen():
    network = Normalised()
    with pytest.raises(ConfigError, match=r"BatchNorm: norm.*model\.backbone\.freeze"):
        make_step(network, TrainingConfig(batch_size=4))
    network.norm.eval()
    make_step(network, TrainingConfig(batch_size=4))


def test_a_batch_that_cannot_be_loaded_ends_the_run_with_its_reason():
    with pytest.raises(UserError, match="frame 7 is broken"):
        make_step(TinyNetwork(), TrainingConfig(batch_size=4))(UserError("frame 7 is broken"), step=0, stop=False)


def test_a_small_batch_backs_off_from_what_it_holds_and_proves_nothing_larger():
    network = TinyNetwork(fail=FailsAbove(2, MemoryError()))
    step = make_step(network, TrainingConfig(batch_size=32, oom_retries=1, mb_growth_steps=2))
    result = step(make_batch(3, seed=9), step=0, stop=False)
    assert (result.micro_batch_size, result.retries) == (2, 1)
    assert [step(make_batch(1, seed=9), step=n, stop=False).micro_batch_size for n in range(1, 9)] == [2] * 8
    assert [step(make_batch(2, seed=9), step=n, stop=False).micro_batch_size for n in range(9, 12)] == [2, 2, 4]

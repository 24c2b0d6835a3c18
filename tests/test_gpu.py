"""On a GPU: its allocator really runs out, fp16 really overflows, and the update stays that of the undisturbed step."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from clips import write_games
from small_models import small_model
from stopped_runs import arguments_of, last_state, lines_of, train
from test_step import TinyNetwork, make_batch

from tracknet.losses import frame_losses
from tracknet.out_of_memory import is_out_of_memory, peak_memory_gb
from tracknet.schema.training import LossConfig, TrainingConfig
from tracknet.training.gradient import SummedLoss
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.ranks import Ranks
from tracknet.training.step import StepResult, TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch.cuda can use")

KIND = "cuda"
DEVICE = torch.device(KIND, 0)
MIB = 2**20
HUNGER = 128 * MIB  # bytes for each sample of a micro-batch
CAP = 12 * HUNGER  # 32 and 16 samples are too many, 8 leave a third for everything else


class Hungry(torch.autograd.Function):
    """The identity, for memory that it never touches."""

    @staticmethod
    def forward(context, value, place):
        context.place = place
        if place == "forward":
            torch.empty(len(value) * HUNGER, dtype=torch.uint8, device=value.device)
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        if context.place == "backward":
            torch.empty(len(gradient) * HUNGER, dtype=torch.uint8, device=gradient.device)
        return gradient, None


class HungryNetwork(TinyNetwork):
    place = "nowhere"

    def forward(self, frames, background, dropout_keys):
        return Hungry.apply(super().forward(frames, background, dropout_keys), self.place)


def limit_memory(allowed_bytes: float) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes / total), DEVICE)


@pytest.fixture(autouse=True)
def _all_memory_again():
    yield
    limit_memory(float("inf"))


def one_step(
    network, batch, *, micro_batch_size: int = 0, clip_norm: float = 0.0, fp16: bool = False, scaler=None
) -> tuple[StepResult, torch.Tensor]:
    """One update of a copy of the network on the GPU; returns what happened and the change of the weights, in fp64."""
    network = copy.deepcopy(network).to(DEVICE)
    step = make_step(network, len(batch), micro_batch_size, clip_norm, fp16, scaler)
    before = weights_of(network)
    result = step(batch, step=0, stop=False)
    return result, weights_of(network) - before


def make_step(network, batch_size: int, micro_batch_size: int = 0, clip_norm: float = 0.0, fp16: bool = False, scaler=None) -> TrainingStep:
    config = TrainingConfig(batch_size=batch_size)
    summed_loss = SummedLoss(
        network,
        lambda logits, target: frame_losses(logits, target, LossConfig(name="focal")),
        nominal_frames=2 * batch_size,
        sigma=1.5,
        seed=0,
        autocast=(lambda: torch.autocast(KIND, dtype=torch.float16)) if fp16 else nullcontext,
        scaler=scaler or torch.amp.GradScaler(KIND, enabled=False),
        device=DEVICE,
    )
    return TrainingStep(
        summed_loss,
        torch.optim.SGD(network.parameters(), lr=1.0),
        ranks=Ranks(SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device=DEVICE)),
        micro_batch=MicroBatchSize(micro_batch_size or batch_size, config),
        clip_norm=clip_norm,
        describe=str,
    )


def weights_of(network) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in network.parameters()])


def relative_difference(change: torch.Tensor, expected: torch.Tensor) -> float:
    return float((change - expected).norm() / expected.norm())


def test_its_allocators_error_is_known_and_its_other_errors_are_not():
    with pytest.raises(torch.OutOfMemoryError) as ran_out:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    assert is_out_of_memory(ran_out.value)
    assert is_out_of_memory(RuntimeError(str(ran_out.value)))
    with pytest.raises(RuntimeError) as misshapen:
        torch.ones(2, 3, device=DEVICE) @ torch.ones(2, 3, device=DEVICE)
    assert not is_out_of_memory(misshapen.value)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_that_does_not_fit_is_retried_to_the_undisturbed_update(place):
    network, batch = HungryNetwork().double(), make_batch(32, seed=1)
    undisturbed, expected = one_step(network, batch)
    network.place = place
    limit_memory(CAP)
    disturbed, change = one_step(network, batch)
    assert (undisturbed.micro_batch_size, undisturbed.retries) == (32, 0)
    assert (disturbed.micro_batch_size, disturbed.retries) == (8, 2)
    assert relative_difference(change, expected) <= 1e-12
    assert disturbed.loss == pytest.approx(undisturbed.loss, rel=1e-12)


def test_a_network_whose_activations_do_not_fit_finds_a_size_that_does():
    network = small_model("unet", frames=2, background=False)
    batch = make_batch(16, seed=2)
    batch = replace(batch, frames=torch.randint(0, 256, (16, 2, 3, 512, 768), dtype=torch.uint8))
    peaks = {}
    for size in (16, 1):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        one_step(network, batch, micro_batch_size=size)
        peaks[size] = peak_memory_gb(DEVICE)
    assert peaks[1] < peaks[16] / 2
    limit_memory(peaks[16] * 1e9 / 2)
    result, change = one_step(network, batch)
    assert result.retries >= 1
    assert result.micro_batch_size < 16
    assert change.isfinite().all()
    assert change.norm() > 0


def test_fp16_makes_the_update_of_fp32_whatever_the_micro_batch_and_the_scale():
    network, batch = TinyNetwork(), make_batch(6, seed=3)
    _, expected = one_step(network, batch)
    for size, scale in ((6, 1024.0), (2, 1024.0), (1, 8.0)):
        result, change = one_step(network, batch, micro_batch_size=size, fp16=True, scaler=torch.amp.GradScaler(KIND, init_scale=scale))
        assert not result.skipped
        assert relative_difference(change, expected) < 0.03  # fp16 has 11 bits


def test_clipping_sees_the_gradient_without_the_scale():
    network, batch = TinyNetwork(), make_batch(6, seed=4)
    unclipped, _ = one_step(network, batch)
    assert unclipped.grad_norm > 0.01
    for scale in (8.0, 1024.0):
        scaler = torch.amp.GradScaler(KIND, init_scale=scale)
        result, change = one_step(network, batch, micro_batch_size=2, clip_norm=0.01, fp16=True, scaler=scaler)
        assert result.grad_norm == pytest.approx(unclipped.grad_norm, rel=0.03)
        assert float(change.norm()) == pytest.approx(0.01, rel=1e-3)


def test_an_update_that_overflows_is_skipped_and_a_lower_scale_ends_it():
    network, batch = TinyNetwork().to(DEVICE), make_batch(6, seed=5)
    scaler = torch.amp.GradScaler(KIND, init_scale=2.0**40)  # far above what fp16 can hold
    step = make_step(network, 6, fp16=True, scaler=scaler)
    before = weights_of(network)
    first = step(batch, step=0, stop=False)
    assert first.skipped
    assert torch.equal(weights_of(network), before)
    assert scaler.get_scale() == 2.0**39
    results = [step(batch, step=number, stop=False) for number in range(1, 40)]
    assert not results[-1].skipped
    assert not torch.equal(weights_of(network), before)
    assert weights_of(network).isfinite().all()


def test_running_out_of_memory_in_fp16_is_no_overflow():
    network, batch = HungryNetwork(), make_batch(32, seed=6)
    _, expected = one_step(network, batch, fp16=True, scaler=torch.amp.GradScaler(KIND, init_scale=1024.0))
    network.place = "backward"
    limit_memory(CAP)
    scaler = torch.amp.GradScaler(KIND, init_scale=1024.0)
    result, change = one_step(network, batch, fp16=True, scaler=scaler)
    assert (result.micro_batch_size, result.retries, result.skipped) == (8, 2, False)
    assert scaler.get_scale() == 1024.0
    assert relative_difference(change, expected) < 0.03


def test_an_fp16_run_goes_on_with_its_scale_after_a_stop(tmp_path):
    clips = tmp_path / "clips"
    write_games(clips, ["game1", "game2"], clips=2, count=10)
    settings = ["training.precision=fp16", "training.checkpoint.every_steps=2"]
    train(arguments_of("unet", clips, tmp_path / "whole", *settings))
    stopped = arguments_of("unet", clips, tmp_path / "stopped", *settings)
    train(stopped, stop_after=5)
    train([*stopped, "--resume"])
    assert last_state(tmp_path / "stopped")["scaler"] == last_state(tmp_path / "whole")["scaler"]
    lines = [[line for line in lines_of(tmp_path / name) if "train/loss" in line] for name in ("whole", "stopped")]
    for undisturbed, resumed in zip(*lines, strict=True):  # kernels of a GPU add in any order
        assert resumed["train/loss"] == pytest.approx(undisturbed["train/loss"], rel=1e-2), resumed["step"]
        assert resumed["train/lr"] == undisturbed["train/lr"]

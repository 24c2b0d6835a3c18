"""Walks the ranks of one launch through many steps of unequal content; writes their gradients into the folder of the first argument."""

import faulthandler
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from test_step import make_batch, make_step
from torch import Tensor, nn

from tracknet.data.batch import Batch
from tracknet.geometry import resize_points
from tracknet.heatmap import render_heatmaps
from tracknet.losses import frame_losses
from tracknet.models.layers import KeyedChannelDropout
from tracknet.schema.training import LossConfig, TrainingConfig
from tracknet.training.gradient import dropout_keys
from tracknet.training.ranks import Ranks

SEED, STEP = 0, 3  # the seed is that of `make_step`
MOST_SAMPLES = 66  # of a rank
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}  # of the gradient's norm


def unchanged(x: Tensor) -> Tensor:
    return x


class DropoutNetwork(nn.Module):
    """Two convolutions with dropout between them: the project's own, and torch's where that is asked for."""

    def __init__(self, internal_dropout: bool = False, between: Callable[[Tensor], Tensor] = unchanged) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.GroupNorm(2, 8)
        self.keyed = KeyedChannelDropout(0.25, stream=0)
        self.internal = nn.Dropout(0.25 if internal_dropout else 0.0)
        self.second = nn.Conv2d(8, 2, 3, padding=1)
        self._between = between

    def forward(self, frames, background, dropout_keys):
        x = torch.tanh(self.norm(self.first(frames.flatten(1, 2).to(self.second.weight.dtype) / 255)))
        return self.second(self._between(self.internal(self.keyed(x, dropout_keys))))


@dataclass(frozen=True)
class Case:
    """One step, of one rank or of two."""

    seed: int
    size: int  # samples of all ranks
    first_share: int  # samples of the first of two ranks
    micro_batch_size: int
    loss: str
    invisible_share: float
    unlabelled_share: float
    clip_norm: float  # 0 does not clip
    scaled: bool  # by fp16's scaler, by 65,536
    dtype: str
    unlabelled_ranks: tuple[int, ...] = ()

    def network(self) -> DropoutNetwork:
        torch.manual_seed(self.seed)
        return DropoutNetwork().to(DTYPES[self.dtype])

    def batch(self) -> Batch:
        """Of all ranks together."""
        batch = make_batch(self.size, self.seed, 1 - self.invisible_share, 1 - self.unlabelled_share)
        labeled = batch.labeled.clone()
        for rank in self.unlabelled_ranks:
            labeled[self._share(rank)] = False
        return replace(batch, labeled=labeled)

    def batch_of(self, rank: int) -> Batch:
        return self.batch()._map(itemgetter(self._share(rank)))

    def _share(self, rank: int) -> slice:
        return slice(self.first_share, None) if rank else slice(self.first_share)


def cases() -> list[Case]:
    draw = np.random.default_rng(0)
    drawn = []
    for seed in range(120):
        size = int(draw.integers(1, MOST_SAMPLES + 1))
        first_share = int(draw.choice([0, size, *draw.integers(0, size + 1, 4)]))
        drawn.append(
            Case(
                seed=seed,
                size=size,
                first_share=first_share,
                micro_batch_size=int(draw.integers(1, max(first_share, size - first_share) + 1)),
                loss=str(draw.choice(["mse", "focal"])),
                invisible_share=float(draw.uniform(0, 0.9)),
                unlabelled_share=float(draw.uniform(0, 0.9)),
                clip_norm=float(draw.choice([0.0, 1e-3, 1e3])),
                scaled=bool(draw.integers(2)),
                dtype=["float64", "float32"][seed % 2],
                unlabelled_ranks=[(), (), (), (0,), (1,), (0, 1)][draw.integers(6)],
            )
        )
    return drawn


def gradient_of_step(case: Case, batch: Batch) -> tuple[Tensor, float]:
    """What the optimizer of the real step sees, and the norm before clipping. All ranks call this."""
    network = case.network()
    config = TrainingConfig(batch_size=MOST_SAMPLES, micro_batch_size=case.micro_batch_size)
    step = make_step(network, config, loss=case.loss, clip_norm=case.clip_norm, scaled=case.scaled)
    result = step(batch, step=STEP, stop=False)
    return torch.cat([p.grad.flatten() for p in network.parameters()]), result.grad_norm


def plain_gradient(case: Case) -> tuple[Tensor, float]:
    """The same by one plain backward pass over all samples of all ranks."""
    network, batch = case.network(), case.batch()
    logits = network(batch.frames, None, dropout_keys(SEED, STEP, batch.sample_index))
    target = render_heatmaps(resize_points(batch.xy_input, (16, 12), (8, 6)), batch.visible, (6, 8), 1.5)
    losses = frame_losses(logits, target, LossConfig(case.loss))[batch.labeled]
    if not len(losses):
        return torch.zeros(sum(p.numel() for p in network.parameters()), dtype=DTYPES[case.dtype]), 0.0
    losses.mean().backward()
    norm = float(nn.utils.clip_grad_norm_(network.parameters(), case.clip_norm or float("inf")))
    return torch.cat([p.grad.flatten() for p in network.parameters()]), norm


def main(out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    ranks = Ranks(accelerator)
    gradients = {}
    for case in cases():
        faulthandler.dump_traceback_later(60, exit=True)
        gradient, norm = gradient_of_step(case, case.batch_of(ranks.rank))
        gradients[str(case.seed)] = np.append(gradient.numpy(), norm)
    faulthandler.cancel_dump_traceback_later()
    accelerator.end_training()
    np.savez(out / f"rank{ranks.rank}.npz", world_size=ranks.size, **gradients)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

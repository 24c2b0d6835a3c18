"""Makes one step of 32 samples under a limit of this process's memory; writes what came out into the folder of the first argument.

The limit is real: the address space may grow by 768 MiB, and the network asks the allocator for 64 MiB a sample, forward or backward.
"""

import json
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from test_step import TinyNetwork, make_batch

from tracknet.losses import frame_losses
from tracknet.schema.training import LossConfig, TrainingConfig
from tracknet.training.gradient import SummedLoss
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.ranks import Ranks
from tracknet.training.step import TrainingStep

MIB = 2**20


class Hungry(torch.autograd.Function):
    """The identity, for 64 MiB a sample that it never touches."""

    @staticmethod
    def forward(context, value, place):
        context.place, context.samples = place, len(value)
        if place == "forward":
            torch.empty(len(value) * 64 * MIB, dtype=torch.uint8)
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        if context.place == "backward":
            torch.empty(context.samples * 64 * MIB, dtype=torch.uint8)
        return gradient, None


class HungryNetwork(TinyNetwork):
    place = "nowhere"

    def forward(self, frames, background, dropout_keys):
        return Hungry.apply(super().forward(frames, background, dropout_keys), self.place)


def main(out: Path, place: str, limited_rank: int) -> None:
    accelerator = Accelerator(cpu=True)
    ranks = Ranks(accelerator)
    torch.manual_seed(0)
    network = HungryNetwork().double()
    config = TrainingConfig(batch_size=32)
    summed_loss = SummedLoss(
        network,
        lambda logits, target: frame_losses(logits, target, LossConfig("focal")),
        nominal_frames=64,
        sigma=1.5,
        seed=0,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=ranks.device,
    )
    step = TrainingStep(
        summed_loss,
        torch.optim.SGD(network.parameters(), lr=1.0),
        ranks=ranks,
        micro_batch=MicroBatchSize(32, config),
        clip_norm=0.0,
        describe=str,
    )
    step(make_batch(32, seed=100), step=0, stop=False)  # warms the shapes
    network.place = place
    if ranks.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 768 * MIB, resource.RLIM_INFINITY))
    result = step(make_batch(32, seed=200 + ranks.rank), step=1, stop=False)
    weights = torch.cat([p.detach().flatten() for p in network.parameters()]).tolist()
    accelerator.end_training()
    told = {"size": result.micro_batch_size, "retries": result.retries, "weights": weights, "world_size": ranks.size}
    told["threads"] = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

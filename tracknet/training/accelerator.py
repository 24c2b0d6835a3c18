"""Starts accelerate for a run, after checking that it was launched the way the run needs."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from tracknet.schema.training import TrainingConfig
from tracknet.training.joining import CONNECT_TIMEOUT, INIT_METHOD, finish_joining
from tracknet.training.launch import (
    MODULE,
    ancestor_command_lines,
    check_accelerate_environment,
    check_sharding,
    check_world_size,
    world_from_environment,
)
from tracknet.training.lost_peer import naming_lost_peers
from tracknet.training.precision import MIXED_PRECISION, resolve_precision, supported_precisions

# ranks wait for the slowest to decode its share of a large data set; a dead one is seen at once, a vanished machine after a minute
COLLECTIVE_TIMEOUT = timedelta(hours=2)


def start_accelerator(config: TrainingConfig, module: str = MODULE) -> tuple[Accelerator, str]:
    """Joins the other processes.

    Args:
        config: for the precision.
        module: what runs, for the command in messages.

    Returns:
        the accelerator, and the precision of the run: fp32, fp16 or bf16.

    Raises:
        ConfigError: another world size than was asked for, or a setting of the launcher or of the configuration that the run cannot honour.
        PeerLostError: another process has gone while this one joined.
    """
    _, world_size, local_rank, _ = world_from_environment(os.environ)
    check_world_size(world_size, os.environ, ancestor_command_lines(), module)
    precision = resolve_precision(config, supported_precisions(_device(local_rank)))
    check_accelerate_environment(precision, os.environ)
    check_sharding(precision, world_size, os.environ)
    # accelerate's default for FSDP; transformers would then leave pretrained weights out on all ranks of a machine but one
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    joining = InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=CONNECT_TIMEOUT)
    with naming_lost_peers():
        accelerator = Accelerator(mixed_precision=MIXED_PRECISION[precision], kwargs_handlers=[joining])
        finish_joining(accelerator.device, COLLECTIVE_TIMEOUT)
    # again: without ACCELERATE_USE_CPU, --multi_gpu on a CPU sets WORLD_SIZE and yet leaves the processes unconnected
    check_world_size(accelerator.num_processes, os.environ, ancestor_command_lines(), module)
    return accelerator, precision


def _device(local_rank: int) -> torch.device:
    """The device that accelerate will choose. Asking accelerate would settle its state before the precision is known."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")

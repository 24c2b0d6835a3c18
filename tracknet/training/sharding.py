"""Sharding: each process holds a slice of every parameter, of its gradient and of its optimizer state (torch's FSDP2)."""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tracknet.errors import ConfigError
from tracknet.models import TrackNetModel
from tracknet.training.ranks import Ranks


def shard_with_twin(model: TrackNetModel, ranks: Ranks, *, reshard_after_forward: bool) -> TrackNetModel:
    """Shards a model in place over all processes. All ranks call this.

    accelerate's own way is not taken: on a CPU its FSDP2 plugin gives plain data parallelism without a word.

    Args:
        model: the same on all ranks, on its final device.
        ranks: the processes that share it, two or more.
        reshard_after_forward: whether gathered parameters are given back between the forward and the backward pass.

    Returns:
        its unsharded twin in host memory, in evaluation mode, for what cannot be done in slices: evaluating and saving.

    Raises:
        ConfigError: the parameters are not sharded over all processes afterwards.
    """
    twin = copy.deepcopy(model)
    module: nn.Module = twin  # transformers' own `to` hides these types
    module.to("cpu")
    twin.train(False)
    _shard(model, ranks, reshard_after_forward)
    _check_sharded(model, ranks.size)
    return twin


def _shard(model: nn.Module, ranks: Ranks, reshard_after_forward: bool) -> None:
    """Each stage, layer or block of the network is gathered by itself, and what is left, with the whole model."""
    # not of our concern: no output of a unit is changed in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    module: nn.Module = model
    module.to(memory_format=torch.contiguous_format)  # slices along the first dimension know no other layout
    for unit in _units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)


def _units(module: nn.Module) -> list[nn.Module]:
    """The entries of the outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [unit for child in module.children() for unit in _units(child)]


def _check_sharded(model: nn.Module, size: int) -> None:
    """Refuses a model that is not sharded over all processes although that was asked for."""
    whole = [name for name, parameter in model.named_parameters() if not _is_sharded(parameter, size)]
    if whole:
        more = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
        raise ConfigError(
            f"sharding over {size} processes was asked for (--use_fsdp, ACCELERATE_USE_FSDP) and not obtained: {whole[0]}{more};"
            " take it out, every process then holds the whole model"
        )


def _is_sharded(parameter: Tensor, size: int) -> bool:
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.size() == size
        and all(isinstance(placement, Shard) for placement in parameter.placements)
    )


def full_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory from slices. All ranks call this with the same names in the same order.

    Args:
        tensors: sharded or not.
        keep: whether this rank wants them; the others only give their slices, and get nothing.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole


def as_sharded(full: Tensor, own: object) -> Tensor:
    """This rank's slice of a whole tensor, sharded as `own` is; the whole where `own` is not sharded. Tells the other ranks nothing."""
    if not isinstance(own, DTensor):
        return full
    return distribute_tensor(full.to(own.device), own.device_mesh, own.placements, src_data_rank=None)

"""An optimizer's state as named tensors and JSON, and back."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tracknet.errors import UserError, shown
from tracknet.training.optimization import state_tensors
from tracknet.training.sharding import as_sharded

# How an update is computed, not what it is: these belong to the machine that runs it and stay as the new process chose them.
_SIGNED = ("exp_avg", "momentum_buffer")  # all other state is a count, or a mean of squares
_LEARNING_RATES = frozenset({"lr", "initial_lr"})
_EXECUTION_OPTIONS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a torch optimizer whose state holds tensors and numbers (AdamW, Adam, SGD, Adadelta ...).

    Args:
        optimizer: torch's own, not a wrapper around it.

    Returns:
        Tensors named `<number of the parameter>.<state>` (not copied, and sharded as the parameters are), and the rest as JSON: the
        optimizer's name, the parameters' shapes, the numbers of the state and the groups with their hyper-parameters. Parameters are
        numbered through all groups.

    Raises:
        TypeError: a hyper-parameter that is neither a number, a text, null nor a list of these.
    """
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in saved["state"].items():
        numbers[str(index)] = {}  # also where all is a tensor, or nothing: the parameter has had an update
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[str(index)][name] = _json_value(name, value)
    groups = [
        {"parameters": group["params"]} | {k: _json_value(k, v) for k, v in group.items() if k not in _EXECUTION_OPTIONS}
        for group in saved["param_groups"]
    ]
    shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    return tensors, {"optimizer": type(optimizer).__name__, "shapes": shapes, "state": numbers, "groups": groups}


def _json_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_json_value(name, entry) for entry in value]
    raise TypeError(f"{name} of the optimizer is a {type(value).__name__}, which JSON does not hold")


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], json: Mapping[str, Any]) -> None:
    """Gives an optimizer the state that `pack_optimizer` took from one like it: its next update is the one that the other would have made.

    The learning rates (`lr`, `initial_lr`) become the saved ones; all other hyper-parameters must be the same. The tensors are copied.

    Args:
        optimizer: for the same model; torch's own, not a wrapper around it.
        tensors: from `pack_optimizer`, whole; where the optimizer's parameters are sharded, each rank takes its slices.
        json: from `pack_optimizer`, perhaps by way of a file.

    Raises:
        UserError: the state is of another optimizer or of a model with other parameters; the optimizer is unchanged then.
    """
    _check_same_optimizer(optimizer, json)
    states: dict[int, dict[str, Any]] = {int(index): dict(numbers) for index, numbers in json["state"].items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved_groups = [_as_saved(own, saved) for own, saved in zip(optimizer.state_dict()["param_groups"], json["groups"], strict=True)]
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if index not in json["state"] or name not in state_tensors(optimizer):
            raise UserError(f"the saved optimizer state holds {shown(key)}, which belongs to no parameter: the checkpoint is damaged")
        parameter = None if name == "step" else parameters[int(index)]  # the numbers of the state are not sharded
        _check_tensor(key, tensor, parameter)
        states[int(index)][name] = _laid_out_as(parameter, tensor)
    for number, state in states.items():
        if lacking := set(state_tensors(optimizer)) - {name for name, value in state.items() if isinstance(value, Tensor)}:
            raise UserError(f"the saved optimizer state lacks {min(lacking)} of parameter {number}: the checkpoint is damaged")
    optimizer.load_state_dict({"state": states, "param_groups": saved_groups})


def _check_tensor(key: str, tensor: Tensor, parameter: Tensor | None) -> None:
    """Refuses what an update could not be made with; `parameter` is None for a number."""
    shape = [] if parameter is None else list(parameter.shape)
    if list(tensor.shape) != shape:
        raise UserError(f"the saved optimizer state {key} has shape {list(tensor.shape)}, its parameter has {shape}")
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise UserError(f"the saved optimizer state {key} is not of finite numbers: the checkpoint is damaged")
    if not key.endswith(_SIGNED) and (tensor < 0).any():
        raise UserError(f"the saved optimizer state {key} has a number below 0, which cannot be: the checkpoint is damaged")


def _laid_out_as(parameter: Tensor | None, tensor: Tensor) -> Tensor:
    """A copy, for torch keeps what it is given; in the parameter's order in memory, without which updates take twice as long."""
    sharded = as_sharded(tensor, parameter)
    if parameter is None or sharded is not tensor:
        return sharded.clone()
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _check_same_optimizer(optimizer: Optimizer, json: Mapping[str, Any]) -> None:
    own_name = type(optimizer).__name__
    if json["optimizer"] != own_name:
        raise UserError(f"the saved optimizer state is of {json['optimizer']}, this run has {own_name} (training.optimizer.name)")
    own_shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    if len(json["shapes"]) != len(own_shapes):
        raise UserError(f"the saved optimizer state is of {len(json['shapes'])} parameters, the model has {len(own_shapes)}")
    for index, (saved, own) in enumerate(zip(json["shapes"], own_shapes, strict=True)):
        if saved != own:
            raise UserError(f"parameter {index} of the saved optimizer state has shape {saved}, the model's has {own}")
    own_groups = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group["parameters"] for group in json["groups"]] != own_groups:
        raise UserError("the saved optimizer state puts the parameters into other groups than this run does")


def _as_saved(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A group's own hyper-parameters with the saved learning rates. What only one of two versions of torch knows is left alone."""
    for name in own.keys() & saved.keys() - _EXECUTION_OPTIONS - _LEARNING_RATES:
        if _json_value(name, own[name]) != saved[name]:
            raise UserError(f"the saved optimizer state has {name}={shown(saved[name])}, this run has {own[name]} (training.optimizer)")
    rates = {name: saved[name] for name in own.keys() & saved.keys() & _LEARNING_RATES}
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 <= rate <= sys.float_info.max:
            raise UserError(f"the saved optimizer state has {name}={shown(rate)}: the checkpoint is damaged")
    return dict(own) | rates


def is_saved_optimizer(value: object) -> bool:
    """Whether a value out of a file is what `pack_optimizer` gives as JSON."""
    match value:
        case {"optimizer": str(), "shapes": list(shapes), "state": dict(state), "groups": list(groups)}:
            numbers = {str(number) for number in range(len(shapes))}
            return (
                all(isinstance(shape, list) and all(type(size) is int for size in shape) for shape in shapes)
                and all(number in numbers and _are_numbers(entries) for number, entries in state.items())
                and all(isinstance(group, dict) and isinstance(group.get("parameters"), list) for group in groups)
            )
    return False


def _are_numbers(entries: object) -> bool:
    return isinstance(entries, dict) and all(value is None or isinstance(value, int | float) for value in entries.values())

"""An optimizer's state as named tensors and JSON, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tracknet.errors import UserError
from tracknet.training.sharding import as_sharded

# How an update is computed, not what it is: these belong to the machine that runs it and stay as the new process chose them.
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

    All hyper-parameters (learning rate, `initial_lr`, weight decay, betas ...) become the saved ones. The tensors are copied.

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
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) not in states:
            raise UserError(f"the saved optimizer state holds {key}, which belongs to none of its parameters: the checkpoint is damaged")
        shape = json["shapes"][int(index)]
        if tensor.dim() > 0 and list(tensor.shape) != shape:
            raise UserError(f"the saved optimizer state {key} has shape {list(tensor.shape)}, its parameter has {shape}")
        parameter = parameters[int(index)] if tensor.dim() > 0 else None  # the numbers of the state are not sharded
        states[int(index)][name] = as_sharded(tensor.clone(), parameter)  # cloned, for torch keeps the tensors that it is given
    groups = [own | _as_types_of(own, saved) for own, saved in zip(optimizer.state_dict()["param_groups"], json["groups"], strict=True)]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


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


def _as_types_of(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyper-parameters, with JSON's lists as the tuples that they were."""
    values = {name: value for name, value in saved.items() if name != "parameters"}
    return {name: tuple(value) if isinstance(own.get(name), tuple) else value for name, value in values.items()}

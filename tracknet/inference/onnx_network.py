"""A folder that `tracknet.scripts.export` wrote with `--format onnx`: run by onnxruntime, called as the PyTorch model is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracknet.errors import ConfigError, UserError, shown
from tracknet.evaluation.forward import logits_of, out_of_memory
from tracknet.models import TrackNetConfig
from tracknet.models.folder import read_model_config

ONNX_NAME = "model.onnx"
RECORD_NAME = "export.json"
BATCH = "batch"  # name of the dimension that may have any size
NEEDS_ONNX = "pip install tracknet[onnx]"
_FATAL = 4  # onnxruntime's severity; what it would print below that is raised as an error too
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "BFCArena")

Shape = list[int | str]


def input_shapes(config: TrackNetConfig) -> dict[str, Shape]:
    """Names and shapes of a network's uint8 inputs: `frames`, and `background` where it has one."""
    width, height = config.input_size
    shapes: dict[str, Shape] = {"frames": [BATCH, config.frames, 3, height, width]}
    return shapes | ({"background": [BATCH, 3, height, width]} if config.background else {})


def output_shapes(config: TrackNetConfig) -> dict[str, Shape]:
    """Name and shape of a network's float32 output."""
    width, height = config.heatmap_size
    return {"logits": [BATCH, config.frames, height, width]}


class OnnxNetwork:
    """The network of a folder with `config.json` and `model.onnx`, on the CPU. A call is the work of one thread; several may call at once.

    Args:
        folder: that the export wrote.

    Attributes:
        config: what the network was trained for.

    Raises:
        UserError: onnxruntime is not installed.
        ConfigError: a file is missing, damaged, or belongs to another model.
    """

    def __init__(self, folder: Path) -> None:
        self.config = _read_config(folder)
        self._shapes = input_shapes(self.config)
        self._session = _open_session(folder / ONNX_NAME)
        _check_signature(self._session, self.config, folder / ONNX_NAME)
        _check_content(folder)

    def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
        """Logits of the ball's heatmap in every frame.

        Args:
            frames: uint8 (B, T, 3, H, W) in host memory, RGB, of the size in `config`.
            background: uint8 (B, 3, H, W), the clip's median picture; None where the network has none.
            dropout_keys: there for the model's sake; outside training nothing is dropped.

        Returns:
            (B, T, h, w) float32 in host memory.

        Raises:
            ValueError: another size, type or number of pictures than the network's.
            UserError: out of memory.
        """
        given = _inputs(frames, background)
        if given.keys() != self._shapes.keys():
            raise ValueError(f"the network takes {'a' if self.config.background else 'no'} background picture beside the frames")
        for name, tensor in given.items():
            if list(tensor.shape[1:]) != self._shapes[name][1:] or len(tensor) != len(frames) or tensor.dtype != torch.uint8:
                raise ValueError(f"{name} must be uint8 {self._shapes[name]}, all of one {BATCH}, got {tensor.dtype} {list(tensor.shape)}")
        return logits_of(self._logits, frames, background)

    def _logits(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None) -> Tensor:
        return torch.from_numpy(_run(self._session, _inputs(frames, background)))


def _inputs(frames: Tensor, background: Tensor | None) -> dict[str, Tensor]:
    """By their names in the file."""
    return {"frames": frames} | ({} if background is None else {"background": background})


def _run(session: Any, given: dict[str, Tensor]) -> Any:
    try:
        (logits,) = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in given.items()})
    except Exception as error:  # onnxruntime's errors share no other class, and tell of memory in words only
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise out_of_memory(len(given["frames"]), "cpu") from error
    return logits


def _read_config(folder: Path) -> TrackNetConfig:
    fields = read_model_config(folder)
    if fields["model_type"] != TrackNetConfig.model_type:
        raise ConfigError(f"{folder} holds a model of type {shown(fields['model_type'])}, not {TrackNetConfig.model_type}")
    try:
        config = TrackNetConfig.from_dict(fields)
        whole = all(int(side) > 0 for side in (config.frames, *config.input_size, *config.heatmap_size))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'} describes no network ({shown(error)}); export the checkpoint again") from error
    if not whole or len(config.input_size) != 2 or len(config.heatmap_size) != 2:
        raise ConfigError(f"{folder / 'config.json'} says no sizes of pictures and windows; export the checkpoint again")
    return config


def _open_session(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no {path.name}; python -m tracknet.scripts.export --format onnx writes one")
    try:
        import onnxruntime  # here, for it is optional
    except ImportError as error:
        raise UserError(f"onnxruntime is needed to run {path} ({error}): {NEEDS_ONNX}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = 1  # a caller's own; with more, those of several callers spin while they wait for each other
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no other class
        raise ConfigError(f"{path} is not a model that onnxruntime can run ({shown(' '.join(str(error).split()))})") from error


def _check_signature(session: Any, config: TrackNetConfig, path: Path) -> None:
    """Whether the file takes and gives what the configuration beside it says."""
    for kind, has, wanted, dtype in (
        ("inputs", session.get_inputs(), input_shapes(config), "tensor(uint8)"),
        ("outputs", session.get_outputs(), output_shapes(config), "tensor(float)"),
    ):
        found = {entry.name: (entry.type, [size if isinstance(size, int) else BATCH for size in entry.shape]) for entry in has}
        expected = {name: (dtype, shape) for name, shape in wanted.items()}
        if found != expected:
            raise ConfigError(
                f"{path} is of another model than the config.json beside it: its {kind} are {shown(found)}, not {shown(expected)};"
                " export the checkpoint again"
            )


def _check_content(folder: Path) -> None:
    """Whether the weights are those that were exported; a folder without the export's record is taken as it is."""
    record = folder / RECORD_NAME
    if not record.is_file():
        return
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        found = sha256_of(folder / ONNX_NAME)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record} cannot be read ({shown(error)}); export the checkpoint again") from error
    if found != expected:
        raise ConfigError(f"{folder / ONNX_NAME} is not the file that was exported: its SHA-256 differs from {record.name}; export again")


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A model folder as one callable: uint8 windows in, logits in host memory out, whatever runs it."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tracknet.errors import ConfigError, shown
from tracknet.evaluation.forward import logits_of, out_of_memory
from tracknet.models import TrackNetConfig, TrackNetModel
from tracknet.models.folder import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_model_config, weight_files
from tracknet.out_of_memory import is_out_of_memory, release_memory

ONNX_NAME = "model.onnx"
TORCH_EXPORT_NAME = "model.pt2"


class Network(Protocol):
    """What the stream and the evaluation run.

    Attributes:
        config: says T, the input size and whether a background picture goes in.
    """

    config: TrackNetConfig

    def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
        """Logits, float32 (B, T, h, w) in host memory, of frames uint8 (B, T, 3, H, W) and background uint8 (B, 3, H, W)."""
        ...


class TorchNetwork:
    """A folder with safetensors weights, run by PyTorch in float32.

    Args:
        folder: `config.json` and `model.safetensors`.
        device: as PyTorch names it.

    Raises:
        ConfigError: no such folder, another kind of model, weights that do not fit.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        weight_files(folder)  # names what is missing; transformers would look for it on the hub
        self.device = device
        self._model = _load(folder).to(device=device, dtype=torch.float32).eval()
        self.config: TrackNetConfig = self._model.config

    def __call__(self, frames: Tensor, background: Tensor | None, dropout_keys: Tensor | None = None) -> Tensor:
        """See `Network`. Raises UserError where memory runs out."""
        try:
            with torch.inference_mode():
                beside = None if background is None else background.to(self.device)
                return logits_of(self._model, frames.to(self.device), beside).float().cpu()
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self.device)
        raise out_of_memory(len(frames), self.device.type)


def _load(folder: Path) -> Any:
    try:
        return TrackNetModel.from_pretrained(folder)
    except ConfigError as error:
        if str(folder) in str(error):
            raise
        raise ConfigError(f"{folder}: {error}") from error
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # of whatever is built from a config.json that nobody can vouch for
        reason = f"{type(error).__name__}: {shown(error)}"
        raise ConfigError(
            f"{folder / CONFIG_NAME} describes no network of this program ({reason}); give a checkpoint of TrackNet"
        ) from error


def load_network(folder: Path, device: str | None = None) -> Network:
    """The model of a folder: of `model.safetensors` in PyTorch, else of `model.onnx` in onnxruntime.

    Args:
        folder: a checkpoint or what `save_pretrained` or the export wrote.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes the accelerator where there is one.

    Raises:
        ConfigError: no such folder, a model of another program, no weights, weights that do not fit, a device that is not there.
    """
    model_type = read_model_config(folder)["model_type"]
    if model_type != TrackNetConfig.model_type:
        raise ConfigError(
            f"{folder} holds a model of type {shown(model_type)}, not {TrackNetConfig.model_type}; give a checkpoint of TrackNet"
        )
    if runs_in_onnx(folder):
        if device not in (None, "cpu"):
            raise ConfigError(f"device {shown(device)}: {folder / ONNX_NAME} runs on the CPU; leave the device out")
        from tracknet.inference.onnx_network import OnnxNetwork  # here, for onnxruntime is optional

        return OnnxNetwork(folder)
    if (folder / TORCH_EXPORT_NAME).is_file() and not _has_weights(folder):
        raise ConfigError(f"{folder} holds {TORCH_EXPORT_NAME} of torch.export, which is not run here; export with --format onnx")
    return TorchNetwork(folder, usable_device(device))


def runs_in_onnx(folder: Path) -> bool:
    """Whether the folder's weights are `model.onnx` alone."""
    return (folder / ONNX_NAME).is_file() and not _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS_NAME).is_file() or (folder / INDEX_NAME).is_file()


def usable_device(name: str | None) -> torch.device:
    """The device of that name; of None the accelerator where there is one, else the CPU. Raises ConfigError where it is not there."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    allowed = "cpu" if accelerator is None else f"cpu or {accelerator.type}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {shown(name)}: no such device; this machine has {allowed}") from None
    here = device.type == "cpu" or (accelerator is not None and device.type == accelerator.type)
    if not here or (device.index or 0) >= (1 if device.type == "cpu" else torch.accelerator.device_count()):
        raise ConfigError(f"device {shown(name)}: this machine has {allowed}")
    return device


def device_of(network: Network) -> str:
    """The kind of device that a loaded network runs on: `cpu`, `cuda`, `mps`."""
    return network.device.type if isinstance(network, TorchNetwork) else "cpu"


def model_hash(folder: Path) -> str:
    """What changes whenever the network does: a SHA-256 of its configuration and weights. Raises ConfigError where a file lacks."""
    files = [folder / ONNX_NAME] if runs_in_onnx(folder) else weight_files(folder)
    digest = hashlib.sha256()
    try:
        for path in [folder / CONFIG_NAME, *files]:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()

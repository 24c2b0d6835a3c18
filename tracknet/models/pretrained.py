"""Pretrained backbones: `model.pretrained_model_name`, a folder or an identifier on the hub, to a module with its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tracknet.errors import ConfigError
from tracknet.models.backbones import CONVNEXT_CLASSES, VIT_CLASSES, with_stages, without_mask_token
from tracknet.models.folder import loading_problem, quiet_transformers, read_model_config, tensor_shapes, weight_files
from tracknet.models.hub import download, find_on_hub
from tracknet.schema.model import ConvNextFpnHeatmapConfig, ModelConfig, UnetHeatmapConfig, VitHeatmapConfig

REMEDIES = (
    "give a local folder with config.json and model.safetensors, or null for random weights,"
    " or train the demo, which needs none (--data demo --model demo --training demo)"
)


# Keys of model.backbone that the weights decide, and what transformers calls them.
VIT_FIELDS = {
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
CONVNEXT_FIELDS = {"hidden_sizes": "hidden_sizes", "depths": "depths"}


def check_pretrained(model: ModelConfig) -> None:
    """Whether `model.pretrained_model_name` can be had; reads no weights and downloads nothing.

    A folder, or the hub's cache where the hub cannot be asked, is looked into; of the hub it is only asked whether it has the model.

    Raises:
        ConfigError: as `load_backbone`.
    """
    if isinstance(model, UnetHeatmapConfig) or model.pretrained_model_name is None:
        return
    with _named(model.pretrained_model_name):
        folder = _local_folder(model.pretrained_model_name) or find_on_hub(model.pretrained_model_name, model.backbone.local_files_only)
        if folder is not None:
            _read_config(folder, model)
            tensor_shapes(weight_files(folder))


def load_backbone(model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PreTrainedModel:
    """The backbone with the weights that `model.pretrained_model_name` names, float32 whatever the file holds.

    Raises:
        ConfigError: names the key, the model, what is wrong with it and the remedies.
    """
    name = model.pretrained_model_name
    assert name is not None
    with _named(name):
        return _load(_local_folder(name) or download(name, model.backbone.local_files_only), model)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors within name the key, the model and the remedies."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"model.pretrained_model_name={name}: {error}; {REMEDIES}") from error


def _local_folder(name: str) -> Path | None:
    """The folder of this name; None if it is an identifier on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError("there is no such folder")
    return None


def _read_config(folder: Path, model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PretrainedConfig:
    """The folder's configuration, of the right family and sizes, with the settings of the run."""
    classes = VIT_CLASSES if isinstance(model, VitHeatmapConfig) else CONVNEXT_CLASSES
    model_type = read_model_config(folder)["model_type"]
    if model_type not in classes:
        raise ConfigError(f"its config.json says model_type {model_type}, but {model.model_name} takes {', '.join(classes)}")
    with _refusing_bad_files(model_type):
        return _adapted(AutoConfig.from_pretrained(folder, local_files_only=True), model)


def _load(folder: Path, model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PreTrainedModel:
    """Never through `AutoBackbone.from_pretrained`, which asks the hub about local folders."""
    config = _read_config(folder, model)
    weight_files(folder)
    options: dict[str, Any] = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    with _refusing_bad_files(config.model_type):
        loaded: Any = (VIT_CLASSES | CONVNEXT_CLASSES)[config.model_type].from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    backbone, report = loaded
    if problem := loading_problem(report, ("missing_keys", "mismatched_keys"), _may_be_missing):
        raise ConfigError(f"its weights do not fit its config.json: {problem}")
    return without_mask_token(backbone)


@contextmanager
def _refusing_bad_files(model_type: str) -> Iterator[None]:
    """Whatever transformers or safetensors raise on a bad file is told to the user with its cause."""
    with quiet_transformers():
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"its files do not make a {model_type} ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _may_be_missing(name: str) -> bool:
    """The norms of the chosen stages are no part of a classifier's weights and start at one; the mask token is dropped here."""
    return name.startswith("hidden_states_norms.") or "mask_token" in name


def _adapted(config: PretrainedConfig, model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PretrainedConfig:
    """The pretrained configuration with the settings of the run; refuses sizes that the weights do not have."""
    for key, field in (VIT_FIELDS if isinstance(model, VitHeatmapConfig) else CONVNEXT_FIELDS).items():
        given, wanted = getattr(config, field), getattr(model.backbone, key)
        if given != wanted:
            raise ConfigError(f"its {field} is {given}, but model.backbone.{key}={wanted}; set model.backbone.{key}={given}")
    return with_stages(config, model.backbone.return_stages) if isinstance(model, ConvNextFpnHeatmapConfig) else config

"""Pretrained backbones: `model.pretrained_model_name`, a folder or an identifier on the hub, to a module with its weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tracknet.errors import ConfigError
from tracknet.models.backbones import CONVNEXT_CLASSES, VIT_CLASSES, with_stages, without_mask_token
from tracknet.models.folder import loading_problem, quiet_transformers, read_model_config, weight_files
from tracknet.models.hub import download
from tracknet.schema.model import ConvNextFpnHeatmapConfig, VitHeatmapConfig

REMEDIES = (
    "give a local folder with config.json and model.safetensors, or null for random weights,"
    " or train the demo, which needs none (--data demo --model demo --training demo)"
)


def load_backbone(model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PreTrainedModel:
    """The backbone with the weights that `model.pretrained_model_name` names, float32 whatever the file holds.

    Raises:
        ConfigError: names the key, the model, what is wrong with it and the remedies.
    """
    name = model.pretrained_model_name
    assert name is not None
    try:
        folder = _folder(name, model.backbone.local_files_only)
        return _load(folder, model)
    except ConfigError as error:
        raise ConfigError(f"model.pretrained_model_name={name}: {error}; {REMEDIES}") from error


def _folder(name: str, local_files_only: bool) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError("there is no such folder")
    return download(name, local_files_only)


def _load(folder: Path, model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PreTrainedModel:
    """Never through `AutoBackbone.from_pretrained`, which asks the hub about local folders."""
    classes = VIT_CLASSES if isinstance(model, VitHeatmapConfig) else CONVNEXT_CLASSES
    model_type = read_model_config(folder)["model_type"]
    if model_type not in classes:
        raise ConfigError(f"its config.json says model_type {model_type}, but {model.model_name} takes {', '.join(classes)}")
    weight_files(folder)
    with quiet_transformers():
        try:
            config = _adapted(AutoConfig.from_pretrained(folder, local_files_only=True), model)
            options: dict[str, Any] = {"add_pooling_layer": False} if model_type == "vit" else {}
            loaded: Any = classes[model_type].from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except ConfigError:
            raise
        except Exception as error:  # whatever transformers or safetensors raise on a bad file; told to the user with its cause
            raise ConfigError(f"its files do not make a {model_type} ({type(error).__name__}: {' '.join(str(error).split())})") from error
    backbone, report = loaded
    if problem := loading_problem(report, ("missing_keys", "mismatched_keys"), _may_be_missing):
        raise ConfigError(f"its weights do not fit its config.json: {problem}")
    return without_mask_token(backbone)


def _may_be_missing(name: str) -> bool:
    """The norms of the chosen stages are no part of a classifier's weights and start at one; the mask token is dropped here."""
    return name.startswith("hidden_states_norms.") or "mask_token" in name


def _adapted(config: PretrainedConfig, model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> PretrainedConfig:
    """The pretrained configuration with the settings of the run; refuses a patch size that the weights do not have."""
    if isinstance(model, ConvNextFpnHeatmapConfig):
        return with_stages(config, model.backbone.return_stages)
    if config.patch_size != model.backbone.patch_size:
        raise ConfigError(f"its patches are {config.patch_size} px, but model.backbone.patch_size={model.backbone.patch_size}")
    return config

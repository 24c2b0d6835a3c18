"""From the run's typed configuration to a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tracknet.models.backbones import random_convnext_config, random_vit_config
from tracknet.models.configuration import TrackNetConfig
from tracknet.models.model import TrackNetModel
from tracknet.models.pretrained import load_backbone
from tracknet.schema.data import DataConfig
from tracknet.schema.model import ConvNextFpnHeatmapConfig, ModelConfig, UnetHeatmapConfig, VitHeatmapConfig


def build_model(model: ModelConfig, data: DataConfig, input_wh: tuple[int, int]) -> TrackNetModel:
    """The network of a run, pretrained where `model.pretrained_model_name` says so, its backbone frozen where `model.backbone.freeze` does.

    Args:
        model: the section `model`.
        data: the section `data`; its window length, background and normalisation shape the network.
        input_wh: width and height in px of the whole picture after resizing.

    Returns:
        A model on the CPU in training mode, float32.

    Raises:
        ConfigError: pretrained weights that cannot be had or do not fit; names the key and the remedies.
    """
    pretrained = None if isinstance(model, UnetHeatmapConfig) or model.pretrained_model_name is None else load_backbone(model)
    config = TrackNetConfig(**_input_fields(model, data, input_wh), **_network_fields(model, pretrained))
    built = TrackNetModel(config)
    if pretrained is not None:
        built.network.backbone.load_state_dict(pretrained.state_dict())
    built.freeze_backbone(model.backbone.freeze)
    return built.train()


def _input_fields(model: ModelConfig, data: DataConfig, input_wh: tuple[int, int]) -> dict[str, Any]:
    return {
        "architecture": model.model_name,
        "frames": data.sequence.window_frames,
        "background": data.background != "none",
        "normalize": data.preprocess.normalize,
        "input_size": input_wh,
        "heatmap_size": tuple(model.heatmap.size),
        "sigma": model.heatmap.sigma,
    }


def _network_fields(model: ModelConfig, pretrained: PreTrainedModel | None) -> dict[str, Any]:
    if isinstance(model, UnetHeatmapConfig):
        return {"backbone": {"channels": list(model.backbone.channels), "blocks_per_stage": model.backbone.blocks_per_stage}}
    if isinstance(model, VitHeatmapConfig):
        config = pretrained.config if pretrained is not None else random_vit_config(model.backbone)
        return {"backbone_config": config.to_diff_dict(), "decoder": asdict(model.decoder), "pretrained": _source(model)}
    config = pretrained.config if pretrained is not None else random_convnext_config(model.backbone)
    return {"backbone_config": config.to_diff_dict(), "fpn": asdict(model.fpn), "pretrained": _source(model)}


def _source(model: VitHeatmapConfig | ConvNextFpnHeatmapConfig) -> str | None:
    """Where the pretrained weights are from, as a saved folder tells it to others: of a folder its name alone, not this machine's path."""
    name = model.pretrained_model_name
    return name if name is None or not Path(name).expanduser().is_dir() else Path(name).expanduser().resolve().name

"""The transformers networks that serve as backbones: their configurations, and modules with random weights from them."""

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextV2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    ViTModel,
)

from tracknet.errors import ConfigError
from tracknet.schema.model import ConvNextBackboneConfig, VitBackboneConfig

# By the `model_type` of their config.json. AutoBackbone refuses the plain ViT, so the ViT family uses the models that give tokens.
VIT_CLASSES: dict[str, type[PreTrainedModel]] = {
    "vit": ViTModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
}
CONVNEXT_CLASSES: dict[str, type[PreTrainedModel]] = {"convnext": ConvNextBackbone, "convnextv2": ConvNextV2Backbone}

RANDOM_GRID = 16  # patches on each side of the square grid of positions of a ViT without pretrained weights; interpolated to the picture's


def random_vit_config(backbone: VitBackboneConfig) -> PretrainedConfig:
    """A DINOv2-style network of the sizes given under `model.backbone`."""
    return Dinov2Config(
        hidden_size=backbone.hidden_size,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_heads,
        patch_size=backbone.patch_size,
        image_size=backbone.patch_size * RANDOM_GRID,
    )


def random_convnext_config(backbone: ConvNextBackboneConfig) -> PretrainedConfig:
    """A ConvNeXt of the sizes given under `model.backbone`, up to the last stage used."""
    config = ConvNextConfig(hidden_sizes=list(backbone.hidden_sizes), depths=list(backbone.depths))
    return with_stages(config, backbone.return_stages)


def with_stages(config: PretrainedConfig, return_stages: list[int]) -> PretrainedConfig:
    """The configuration of a ConvNeXt that gives these stages and has none after the last of them, whose work would be lost.

    Args:
        config: of a whole ConvNeXt.
        return_stages: numbers of stages; stage k has a stride of 2 ** (k + 1) px.

    Raises:
        ConfigError: a stage twice, or one that the network does not have.
    """
    stages, available = sorted(return_stages), len(config.depths)
    if not stages or len(set(stages)) < len(stages) or stages[0] < 1 or stages[-1] > available:
        raise ConfigError(
            f"model.backbone.return_stages={list(return_stages)} must name stages from 1 to {available}, each once, at least one"
        )
    last = stages[-1]
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in ("stage_names", "out_features", "out_indices")}
    fields |= {"hidden_sizes": list(config.hidden_sizes[:last]), "depths": list(config.depths[:last]), "num_stages": last}
    return AutoConfig.for_model(**fields, out_indices=stages)


def backbone_from_config(fields: dict[str, Any]) -> PreTrainedModel:
    """The backbone with random weights.

    Args:
        fields: what `to_diff_dict` makes of a transformers configuration.
    """
    config: Any = AutoConfig.for_model(**fields)
    if config.model_type == "vit":
        return ViTModel(config, add_pooling_layer=False)
    return without_mask_token((VIT_CLASSES | CONVNEXT_CLASSES)[config.model_type](config))


def without_mask_token(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone less the token that only masked pre-training uses: a parameter that no gradient ever reaches."""
    embeddings = getattr(backbone, "embeddings", None)
    if isinstance(getattr(embeddings, "mask_token", None), nn.Parameter):
        embeddings.mask_token = None  # type: ignore[union-attr]
    return backbone

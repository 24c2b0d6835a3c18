"""The whole configuration: one section per folder of `configs/`, and what `build_cfg` works out."""

from dataclasses import dataclass
from typing import Any

from tracknet.schema.data import DataConfig
from tracknet.schema.runtime import RuntimeConfig
from tracknet.schema.training import TrainingConfig


@dataclass
class Config:
    """`model` is one of `schema.model.MODELS`; its type is left open because OmegaConf knows no union of dataclasses."""

    data: DataConfig
    model: Any
    training: TrainingConfig
    runtime: RuntimeConfig

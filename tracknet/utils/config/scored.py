"""The section `data` for a model that exists: it says itself what it takes in, so that only the place of the data is asked for."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracknet.errors import ConfigError
from tracknet.schema.data import DataConfig
from tracknet.schema.model import MODELS
from tracknet.schema.tree import MISSING, Schema
from tracknet.schema.validation import check_scored_data
from tracknet.utils.config.build import PATH_KEYS, absolute
from tracknet.utils.config.files import find_yaml, project_root, read_yaml
from tracknet.utils.config.overrides import Override, merge_trees, missing_key, parse_overrides

OF_THE_PLACE = ("data.root", "data.split", "data.cache_dir", "data.cache_limit_gb", "data.on_error", "data.synthetic")
"""What may be changed; all else in `data` belongs to training, or to the model."""


def scored_data(name: str, overrides: Sequence[str]) -> DataConfig:
    """Reads one YAML of `configs/data` and merges the overrides over it.

    Args:
        name: of the file, as `--data` has it.
        overrides: `key=value` texts.

    Raises:
        ConfigNotFoundError: a YAML that does not exist.
        ConfigError: any other mistake in the file or the overrides, or an override of what the model decides.
    """
    given = parse_overrides(overrides)
    for override in given:
        _check_is_of_the_place(override)
    file = read_yaml(find_yaml("data", name), "data")
    schema = Schema({"model": next(iter(MODELS.values()))})
    schema.check(file.tree, file.place)
    changes = [override.tree(schema) for override in given]
    for change in changes:
        schema.check(change, lambda key: "command line: ")
    cfg = _merge(schema.without_nulls(reduce(merge_trees, changes, file.tree)))
    # values that came out of ${...} meet their types and ranges only now
    schema.check(cast(dict[str, Any], OmegaConf.to_container(cfg)), lambda key: "")
    for key in PATH_KEYS:
        value = OmegaConf.select(cfg, key) if key.startswith("data.") else None
        if value == "":
            raise ConfigError(f"{key} is empty; give a path, or null where the key may be null")
        if value is not None:
            OmegaConf.update(cfg, key, absolute(value, project_root()))
    data = cast(DataConfig, OmegaConf.to_object(cfg.data))
    check_scored_data(data)
    return data


def _check_is_of_the_place(override: Override) -> None:
    key = override.key
    if not any(key == place or key.startswith(f"{place}.") for place in OF_THE_PLACE):
        why = "the model's own config.json decides what it takes in" if key.startswith("data") else "the model is trained already"
        raise ConfigError(f"{key} cannot be set here: {why}; what can be set is {', '.join(OF_THE_PLACE)}")


def _merge(tree: dict[str, Any]) -> DictConfig:
    if (key := missing_key(tree)) is not None:
        raise ConfigError(f"{key} is {MISSING}; give it a value with {key}=...")
    try:
        cfg = cast(DictConfig, OmegaConf.merge(OmegaConf.create({"data": OmegaConf.structured(DataConfig())}), OmegaConf.create(tree)))
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{(error.msg or str(error)).splitlines()[0]}") from None
    return cfg

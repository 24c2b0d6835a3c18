"""Which dataclasses the names in the configuration choose: model family, optimizer, scheduler."""

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from tracknet.errors import ConfigError
from tracknet.schema.model import MODELS
from tracknet.schema.training import OPTIMIZERS, SCHEDULERS, TrainingConfig
from tracknet.schema.tree import Choices, Schema, shown
from tracknet.utils.config.overrides import Override

Place = Callable[[str], str]
"""The text before the message about a dotted key, such as `configs/data/x.yaml:3: `."""

logger = logging.getLogger(__name__)


def choose(tree: dict[str, Any], place: Place, overrides: list[Override]) -> Choices:
    """The dataclasses that `model_name` and the names of optimizer and scheduler choose.

    Where an override names another optimizer or scheduler than the YAML, the YAML's keys that the new one lacks leave `tree`, with a
    warning; another model family is refused, because it has a YAML of its own.

    Raises:
        ConfigError: a name that there is not, or another family than the YAML's.
    """
    family = _chosen("model.model_name", MODELS, tree["model"].get("model_name"), place)
    wanted = _override_of("model.model_name", overrides)
    if wanted is not None and wanted != family:
        _chosen("model.model_name", MODELS, wanted, lambda key: "command line: ")
        raise ConfigError(f"model.model_name={wanted} would change the family {family} of this YAML; choose another one with --model")
    choices: Choices = {"model": MODELS[family]}
    for key, kinds, default in (
        ("training.optimizer", OPTIMIZERS, TrainingConfig().optimizer.name),
        ("training.scheduler", SCHEDULERS, TrainingConfig().scheduler.name),
    ):
        section = tree["training"].get(key.split(".")[1])
        in_yaml = section.get("name", default) if isinstance(section, dict) else default
        name = _chosen(f"{key}.name", kinds, in_yaml, place)
        wanted = _override_of(f"{key}.name", overrides)
        if wanted is not None and wanted != name:
            new = _chosen(f"{key}.name", kinds, wanted, lambda key: "command line: ")
            _drop_foreign(key, section, kinds[name], kinds[new])
            name = new
        choices[key] = kinds[name]
    return choices


def _chosen(key: str, kinds: dict[str, Any], name: Any, place: Place) -> str:
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(f"{place(key)}{key} is {shown(name)}; it must be one of {', '.join(kinds)}")
    return name


def _override_of(key: str, overrides: list[Override]) -> str | None:
    """The text that the last override gives to `key`, alone or in its section's mapping; None if none does."""
    section, _, name = key.rpartition(".")
    found = None
    for override in overrides:
        if override.key == key:
            found = override.text.strip("'\"")
        elif override.key == section:
            value = override.value(Schema({}))
            found = str(value[name]) if isinstance(value, dict) and name in value else found
    return found


def _drop_foreign(key: str, section: Any, old: Any, new: Any) -> None:
    """Takes out of the YAML's section what belongs to the old choice only; what neither has stays, to be refused."""
    if not isinstance(section, dict):
        return
    old_names, new_names = ({spec.name for spec in fields(kind)} for kind in (old, new))
    foreign = [name for name in section if name in old_names - new_names]
    section.pop("name", None)
    for name in foreign:
        del section[name]
    if foreign:
        logger.warning("%s.name=%s: the YAML's %s belong to %s and do not apply", key, new().name, ", ".join(foreign), old().name)

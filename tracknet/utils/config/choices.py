"""Which dataclasses the names in the configuration choose: model family, optimizer, scheduler; and what a name leaves without use."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from tracknet.errors import ConfigError
from tracknet.schema.model import MODELS
from tracknet.schema.training import OPTIMIZERS, SCHEDULERS, LossConfig, TrainingConfig
from tracknet.schema.tree import Choices, shown
from tracknet.utils.config.overrides import Override

Place = Callable[[str], str]
"""The text before the message about a dotted key, such as `configs/data/x.yaml:3: `."""

NAMED = {"training.optimizer": OPTIMIZERS, "training.scheduler": SCHEDULERS}


def choose(tree: dict[str, Any], place: Place, overrides: list[Override]) -> tuple[Choices, list[str]]:
    """The dataclasses that `model_name` and the names of optimizer and scheduler choose, and warnings.

    Where an override names another optimizer or scheduler than the YAML, the YAML's keys that the new one lacks leave `tree`, with a
    warning; another model family is refused, because it has a YAML of its own.

    Raises:
        ConfigError: a name that there is not, another family than the YAML's, or broken YAML in an override of a section.
    """
    family = _chosen("model.model_name", MODELS, tree["model"].get("model_name"), place)
    for wanted in _overrides_of("model.model_name", overrides):
        if wanted != family:
            _chosen("model.model_name", MODELS, wanted, _on_command_line)
            raise ConfigError(f"model.model_name={wanted} would change the family {family} of this YAML; choose another one with --model")
    choices: Choices = {"model": MODELS[family]}
    warnings: list[str] = []
    for key, kinds in NAMED.items():
        default = getattr(TrainingConfig(), key.split(".")[1]).name
        section = tree["training"].get(key.split(".")[1])
        in_yaml = section.get("name", default) if isinstance(section, dict) else default
        name = _chosen(f"{key}.name", kinds, in_yaml, place)
        given = [_chosen(f"{key}.name", kinds, wanted, _on_command_line) for wanted in _overrides_of(f"{key}.name", overrides)]
        if given and given[-1] != name:
            warnings += _drop_foreign(key, section, kinds[name], kinds[given[-1]])
            name = given[-1]
        choices[key] = kinds[name]
    return choices, warnings


def settle_names(change: dict[str, Any], choices: Choices) -> None:
    """Writes the name that won into an override, as nested mappings, whose name a later override replaces."""
    for key in NAMED:
        section: Any = change
        for name in key.split("."):
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and "name" in section:
            section["name"] = choices[key]().name


def refuse_idle_loss(training: dict[str, Any], changes: list[dict[str, Any]], loss: LossConfig) -> None:
    """Refuses an override that changes what the loss makes no use of; a YAML may spell it out.

    Args:
        training: the YAML's section.
        changes: the overrides as nested mappings.
        loss: the outcome of both.

    Raises:
        ConfigError: `alpha` or `beta` without the focal loss.
    """
    if loss.name == "focal":
        return
    for name in ("alpha", "beta"):
        given = any(name in ((change.get("training") or {}).get("loss") or {}) for change in changes)
        in_yaml = {**vars(LossConfig()), **(training.get("loss") or {})}[name]
        if given and getattr(loss, name) != in_yaml:
            raise ConfigError(
                f"training.loss.{name}={getattr(loss, name):g} does nothing with training.loss.name={loss.name};"
                " set training.loss.name=focal or leave it out"
            )


def _on_command_line(key: str) -> str:
    return "command line: "


def _chosen(key: str, kinds: dict[str, Any], name: Any, place: Place) -> str:
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(f"{place(key)}{key} is {shown(name)}; it must be one of {', '.join(kinds)}")
    return name


def _overrides_of(key: str, overrides: list[Override]) -> Iterator[Any]:
    """The values that overrides give to `key`, alone or in a mapping for a section around it, in their order."""
    for override in overrides:
        if override.key == key:
            yield override.as_text()
        elif key.startswith(f"{override.key}."):
            value = override.parsed()
            path = key.removeprefix(f"{override.key}.").split(".")
            while path and isinstance(value, dict) and path[0] in value:
                value = value[path.pop(0)]
            if not path:
                yield value


def _drop_foreign(key: str, section: Any, old: Any, new: Any) -> list[str]:
    """Takes out of the YAML's section what belongs to the old choice only, with a warning; what neither has stays, to be refused."""
    if not isinstance(section, dict):
        return []
    old_names, new_names = ({spec.name for spec in fields(kind)} for kind in (old, new))
    foreign = [name for name in section if name in old_names - new_names]
    section.pop("name", None)
    for name in foreign:
        del section[name]
    if not foreign:
        return []
    verbs = "belongs to {} and does" if len(foreign) == 1 else "belong to {} and do"
    return [f"{key}.name={new().name}: the YAML's {', '.join(foreign)} {verbs.format(old().name)} not apply"]

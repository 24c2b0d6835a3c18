"""Reads the command line's `key=value`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tracknet.errors import ConfigError
from tracknet.schema.tree import MISSING, Schema, shown, wants_text
from tracknet.utils.config.files import parse_yaml

KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Override:
    """One `key=value`, the value still as it was typed."""

    key: str
    text: str

    def value(self, schema: Schema) -> Any:
        """The value as YAML reads it; where the schema wants text, unquoted text stays as typed.

        Raises:
            ConfigError: the value is broken YAML.
        """
        found = schema.find(self.key)
        return self.as_text() if found is not None and wants_text(found[1]) else self.parsed()

    def as_text(self) -> str | None:
        """The value as text, without its quotes if it has any; null is None."""
        try:
            parsed = self.parsed()
        except ConfigError:
            return self.text
        return parsed if parsed is None or isinstance(parsed, str) else self.text

    def parsed(self) -> Any:
        """The value as YAML reads it.

        Raises:
            ConfigError: the value is broken YAML.
        """
        return parse_yaml(self.text, f"command line: {self.key}={shown(self.text)}", self.key, numbered=False)[0]

    def tree(self, schema: Schema) -> dict[str, Any]:
        """The override as nested mappings.

        Raises:
            ConfigError: the schema has no such key, or the value is broken YAML.
        """
        if schema.find(self.key) is None:
            raise ConfigError(f"command line: {schema.unknown(self.key)}")
        value = self.value(schema)
        for name in reversed(self.key.split(".")):
            value = {name: value}
        return dict(value)


def parse_overrides(arguments: Iterable[str]) -> list[Override]:
    """Splits each `key=value`.

    Raises:
        ConfigError: one that is not of that form, or that sets what `build_cfg` works out; one text in place of a list of them.
    """
    if isinstance(arguments, str):
        raise ConfigError(f"overrides is one text; give a list of them: {shown([arguments])}")
    found = []
    for argument in arguments:
        if not isinstance(argument, str):
            raise ConfigError(f"overrides holds {shown(argument)}; each must be a text key=value, such as 'training.optimizer.lr=1e-4'")
        key, equals, text = argument.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise ConfigError(f"{argument!r} is not an override; write key=value, such as training.optimizer.lr=1e-4")
        if not text.strip():
            raise ConfigError(f"{argument!r} has no value; write {key}=null for none")
        if key.split(".")[0] == "runtime":
            raise ConfigError(f"{key} is worked out, not set; --seed and --output-dir change it")
        found.append(Override(key, text))
    return found


def missing_key(tree: dict[str, Any], prefix: str = "") -> str | None:
    """The first dotted key whose value is still OmegaConf's mark for `to be given`; None if all are there."""
    for name, value in tree.items():
        if value == MISSING:
            return f"{prefix}{name}"
        if isinstance(value, dict) and (inner := missing_key(value, f"{prefix}{name}.")) is not None:
            return inner
    return None


def merge_trees(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `update`; mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for name, value in update.items():
        old = merged.get(name)
        merged[name] = merge_trees(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged

"""Checks a plain tree, read from YAML or the command line, against the schema's dataclasses, key by key."""

import difflib
import sys
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from tracknet.errors import ConfigError
from tracknet.schema.bounds import null_is_default, range_text, within
from tracknet.schema.data import DataConfig
from tracknet.schema.model import MODELS
from tracknet.schema.training import TrainingConfig

MISSING = "???"  # OmegaConf's mark for a value that somebody still has to give
TYPE_NAMES = {int: ("whole number", "whole numbers"), float: ("number", "numbers"), str: ("text", "texts"), bool: ("true or false", "")}

Choices = dict[str, type]
"""The dataclasses of the sections that a name chooses: `model`, `training.optimizer`, `training.scheduler`."""


class Schema:
    """The keys of the three sections of `configs/`, for one choice of model family, optimizer and scheduler."""

    def __init__(self, choices: Choices) -> None:
        self.sections: Choices = {"data": DataConfig, "training": TrainingConfig, **choices}

    def leaves(self, key: str = "") -> dict[str, tuple[Field[Any] | None, Any]]:
        """The (field, type) of every name in the section `key`, which may be the root."""
        if key == "":
            return {name: (None, self.sections[name]) for name in ("data", "model", "training")}
        kind = self.section_at(key)
        if kind is None:
            return {}
        hints = get_type_hints(kind)
        return {spec.name: (spec, self.sections.get(f"{key}.{spec.name}", hints[spec.name])) for spec in fields(kind)}

    def section_at(self, key: str) -> type | None:
        """The dataclass of a section; None if `key` is a value or unknown."""
        if key in self.sections:
            return self.sections[key]
        found = self.find(key)
        return None if found is None else _dataclass_in(found[1])

    def find(self, key: str) -> tuple[Field[Any] | None, Any] | None:
        """The (field, type) of a dotted key; None if the schema has no such key."""
        parent, _, name = key.rpartition(".")
        return self.leaves(parent).get(name)

    def keys(self, key: str = "") -> Iterator[str]:
        """All dotted keys below a section, sections included."""
        for name in self.leaves(key):
            inner = f"{key}.{name}".lstrip(".")
            yield inner
            yield from self.keys(inner)

    def check(self, tree: dict[str, Any], place: Callable[[str], str], key: str = "") -> None:
        """Refuses the first unknown key, wrong type or value out of range.

        Args:
            tree: nested mappings; an entry with `${...}` is checked for its type only once OmegaConf has resolved it.
            place: the text put before the message for a dotted key, such as `configs/data/x.yaml:3: `.
            key: the section that `tree` is.

        Raises:
            ConfigError: names the place, the key, what was given and what is allowed.
        """
        known = self.leaves(key)
        for name, value in tree.items():
            inner = f"{key}.{name}".lstrip(".")
            if name not in known:
                raise ConfigError(place(inner) + self.unknown(inner))
            spec, hint = known[name]
            section = self.section_at(inner)
            if value is None and null_is_default(spec):
                continue
            if section is None:
                if not (_fits(hint, value) and (_open(value) or spec is None or within(spec, value))):
                    raise ConfigError(f"{place(inner)}{inner} is {shown(value)}; it must be {allowed(spec, hint)}{_quoting(hint, value)}")
            elif isinstance(value, dict):
                self.check(value, place, inner)
            elif not (value is None and NoneType in get_args(hint)):
                names = ", ".join(spec.name for spec in fields(section))
                raise ConfigError(f"{place(inner)}{inner} is {shown(value)}; it must be a section with the keys {names}")

    def without_nulls(self, tree: dict[str, Any], key: str = "") -> dict[str, Any]:
        """A checked tree less the nulls that stand for a default."""
        known, kept = self.leaves(key), {}
        for name, value in tree.items():
            if value is None and null_is_default(known[name][0]):
                continue
            kept[name] = self.without_nulls(value, f"{key}.{name}".lstrip(".")) if isinstance(value, dict) else value
        return kept

    def unknown(self, key: str) -> str:
        """The message about an unknown key, with the model family that has it or the valid key that it most likely stands for."""
        families = [
            name for name, kind in MODELS.items() if key.startswith("model.") and Schema({**self.sections, "model": kind}).find(key)
        ]
        if families:
            own = next(name for name, kind in MODELS.items() if kind is self.sections["model"])
            return f"unknown key {key}: the model family {own} has none, {' and '.join(families)} has; choose its YAML with --model"
        return f"unknown key {key}; did you mean {self._nearest(key)}?"

    def _nearest(self, key: str) -> str:
        parent, _, name = key.rpartition(".")
        siblings = difflib.get_close_matches(name, list(self.leaves(parent)), n=1, cutoff=0.6)
        if siblings:
            return f"{parent}.{siblings[0]}".lstrip(".")
        known = list(self.keys())
        tails = [candidate for candidate in known if candidate.endswith("." + name)]
        return difflib.get_close_matches(key, tails or known, n=1, cutoff=0.0)[0]


def _dataclass_in(hint: Any) -> type | None:
    candidates = [hint, *get_args(hint)]
    return next((kind for kind in candidates if isinstance(kind, type) and is_dataclass(kind)), None)


def _open(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == MISSING)


def _fits(hint: Any, value: Any) -> bool:
    if value is None:
        return NoneType in get_args(hint)
    if _open(value):
        return True
    kind = _base(hint)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(entry not in (None, MISSING) and _fits(get_args(kind)[0], entry) for entry in value)
    if kind is float:
        # true where the number is finite; `nan` compares false
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind and (kind is not int or abs(value) < 2**63)


def _base(hint: Any) -> Any:
    """The type without `| None`."""
    return next(kind for kind in (get_args(hint) or (hint,)) if kind is not NoneType) if NoneType in get_args(hint) else hint


def _quoting(hint: Any, value: Any) -> str:
    """A hint for a list of texts that look like numbers, such as game folders named 1 and 2."""
    if get_args(_base(hint)) != (str,) or not isinstance(value, list) or not all(type(entry) in (int, float, str, bool) for entry in value):
        return ""
    return f"; put quotes around each: {shown([str(entry) for entry in value])}"


def wants_text(hint: Any) -> bool:
    """Whether a key holds text, so that `key=007` on the command line is not a number."""
    return _base(hint) is str


def allowed(spec: Field[Any] | None, hint: Any) -> str:
    """A field's type and range in words."""
    kind, limits = _base(hint), "" if spec is None else range_text(spec)
    if get_origin(kind) is list:
        length = spec.metadata["length"] if spec is not None and spec.metadata else None
        text = f"a list of {'' if length is None else f'{length} '}{TYPE_NAMES[get_args(kind)[0]][1]}"
    elif limits.startswith("one of"):
        text, limits = limits, ""
    else:
        name = TYPE_NAMES[kind][0]
        text = name if kind in (bool, str) else f"a {name}"
    text = f"{text} {limits}".strip()
    if null_is_default(spec):
        return f"{text}, or null for the default"
    return f"{text}, or null" if NoneType in get_args(hint) else text


def shown(value: Any) -> str:
    """A value in a message: as YAML writes it, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

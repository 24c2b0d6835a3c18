"""Value ranges of configuration keys, declared beside the key and worded in one place."""

from dataclasses import Field, field
from typing import Any


def bounded(
    default: Any = None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    length: int | None = None,
    factory: Any = None,
    null_is_default: bool = False,
) -> Any:
    """A dataclass field with a range.

    Args:
        default: default of a scalar field.
        low: smallest value allowed (for a list: of each entry; a list with a range has at least one entry).
        high: largest value allowed.
        above: the value must be strictly greater than this.
        below: the value must be strictly smaller than this.
        choices: the texts allowed.
        length: number of entries of a list.
        factory: default factory of a list or section, in place of `default`.
        null_is_default: null, also as an empty `key:`, stands for the default; the configuration never holds null there.
    """
    metadata = {"low": low, "high": high, "above": above, "below": below, "choices": choices, "length": length}
    metadata["null_is_default"] = null_is_default
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def null_is_default(spec: Field[Any] | None) -> bool:
    """Whether null stands for the field's default."""
    return spec is not None and bool(spec.metadata) and bool(spec.metadata["null_is_default"])


def within(spec: Field[Any], value: Any) -> bool:
    """Whether `value`, which has the field's type, is in the field's range; null and fields without a range always are."""
    rule = spec.metadata
    if value is None or not rule:
        return True
    entries = value if isinstance(value, list) else [value]
    if not entries or (rule["length"] is not None and len(entries) != rule["length"]):
        return False
    return all(
        (rule["choices"] is None or entry in rule["choices"])
        and (rule["low"] is None or entry >= rule["low"])
        and (rule["high"] is None or entry <= rule["high"])
        and (rule["above"] is None or entry > rule["above"])
        and (rule["below"] is None or entry < rule["below"])
        for entry in entries
    )


def range_text(spec: Field[Any]) -> str:
    """The range in words, such as `>= 0 and < 1` or `one of mse, focal`; empty where there is none."""
    rule = spec.metadata
    if not rule:
        return ""
    if rule["choices"] is not None:
        return "one of " + ", ".join(rule["choices"])
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    return " and ".join(f"{sign} {rule[name]:.12g}" for name, sign in signs.items() if rule[name] is not None)

"""A folder with `config.json` and safetensors weights: reading it without the hub, with one-line errors, and transformers kept quiet."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from tracknet.errors import ConfigError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # large models are cut into shards that this file lists


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers shows no progress bars and no warnings: what matters in them is raised as an error here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def read_model_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        ConfigError: no folder, no such file, broken JSON, or no `model_type` in it.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON ({_one_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path} names no model_type, so it is not the configuration of a model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files.

    Raises:
        ConfigError: none there (weights in pickle files, such as pytorch_model.bin, are never read), or a shard is missing.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        found = "only pickled weights (.bin), which are never read" if list(folder.glob("*.bin")) else "no weights"
        raise ConfigError(f"{folder} has {found}; it needs {WEIGHTS_NAME}")
    try:
        shards = sorted(set(json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX_NAME} is not a readable list of weight files ({_one_line(error)})") from error
    for shard in shards:
        if not (folder / shard).is_file():
            raise ConfigError(f"{folder} lacks the weight file {shard} that its {INDEX_NAME} lists")
    return [folder / shard for shard in shards]


def tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, without reading the tensors.

    Raises:
        ConfigError: a file that is cut short or not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} is not a readable safetensors file ({_one_line(error)})") from error
    return shapes


def loading_problem(report: Mapping[str, Any], kinds: Sequence[str], harmless: Callable[[str], bool]) -> str | None:
    """The first tensor that `from_pretrained` did not place as it was, in words; None if all are in place.

    Args:
        report: what transformers gives for `output_loading_info`; loaded with `ignore_mismatched_sizes`, since the error for
            those names no tensor.
        kinds: of `missing_keys`, `unexpected_keys`, `mismatched_keys` (name, shape in the file, shape wanted).
        harmless: names that may be missing.
    """
    for kind in kinds:
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in report[kind]]
        found = sorted((entry for entry in entries if not harmless(entry[0])), key=lambda entry: str(entry[0]))
        if not found:
            continue
        name, *shapes = found[0]
        detail = f" (shape {list(shapes[0])} in the file, {list(shapes[1])} wanted)" if shapes else ""
        return f"{len(found)} {kind.replace('_', ' ')}, the first {name}{detail}"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

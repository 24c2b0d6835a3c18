"""Finds the YAML files of `configs/` and reads them, keeping the line of every key for messages."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tracknet.errors import ConfigError, ConfigNotFoundError

CATEGORIES = ("data", "model", "training")
PACKAGE = Path(__file__).resolve().parents[2]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def project_root() -> Path:
    """The folder from which relative paths in YAML and `key=value` count: the checkout; the current folder for an installed wheel."""
    return Path.cwd() if (PACKAGE / "configs").is_dir() else PACKAGE.parent


def config_folders() -> list[Path]:
    """Where names are looked up, first hit wins: `$TRACKNET_CONFIG_DIR` if set, then the shipped `configs/`.

    Raises:
        ConfigError: the variable names no folder.
    """
    shipped = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
    own = os.environ.get("TRACKNET_CONFIG_DIR")
    if not own:
        return [shipped]
    folder = Path(own).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"TRACKNET_CONFIG_DIR={own} is no folder; give one that holds data/, model/ or training/, or unset it")
    return [folder, shipped]


def find_yaml(category: str, name: str) -> Path:
    """The file of `--<category> <name>`.

    Raises:
        ConfigNotFoundError: there is none, or `name` is a path; the message lists the names that exist.
    """
    folders = config_folders()
    files = [path for folder in folders for path in (folder / category).glob("*.yaml") if path.is_file()]
    known = sorted({path.stem for path in files if NAME.fullmatch(path.stem)})
    listed = f"there are: {', '.join(known)}"
    if not isinstance(name, str):
        raise ConfigError(f"--{category} is {name!r}; it must be the name of a file in configs/{category}; {listed}")
    if not NAME.fullmatch(name):
        raise ConfigNotFoundError(f"--{category} {name!r} is not the name of a file in configs/{category}; {listed}")
    for folder in folders:
        path = folder / category / f"{name}.yaml"
        if path.is_file():
            return path
    close = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    searched = " or ".join(str(folder / category) for folder in folders)
    raise ConfigNotFoundError(f"--{category} {name}: no {name}.yaml in {searched}; {listed}{hint}")


@dataclass(frozen=True)
class YamlFile:
    """A file's content as nested plain Python values, and the line of every dotted key."""

    path: Path
    tree: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """`file:line: ` of a dotted key; of the nearest section around it where it is not written."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}: " if key else f"{self.path}: "


class _Loader(yaml.SafeLoader):
    """YAML with `1e-4` as a number, and as text: dates and YAML 1.1's whole numbers `010` (8), `1_6` (16), `0x10` (16), `1:30` (90)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(("int", "float", "timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, name: str, key: str = "", *, numbered: bool = True) -> tuple[Any, dict[str, int]]:
    """Plain Python values, and the line (from 1) of every dotted key.

    Args:
        text: one YAML document.
        name: what a message calls it.
        key: dotted key of the document itself, the prefix of all keys in it.
        numbered: a message gives the line, which a value of the command line has no use for.

    Raises:
        ConfigError: broken YAML, or a key written twice in one mapping.
    """
    lines: dict[str, int] = {}
    loader: _Loader | None = None
    try:
        loader = _Loader(text)  # refuses control characters
        node = loader.get_single_node()
        return (None if node is None else _plain(loader, node, key, lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and numbered else ""
        raise ConfigError(f"{name}{line}: broken YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: broken YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{name}: broken YAML: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, key: str, lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not supported", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, entry, key, lines) for entry in node.value]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    tree: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = name_node.value
        if not isinstance(name, str):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=name_node.start_mark)
        if name_node.tag == "tag:yaml.org,2002:merge":
            raise yaml.MarkedYAMLError(problem="merge keys (<<) are not supported, write the keys out", problem_mark=name_node.start_mark)
        if name in tree:
            raise yaml.MarkedYAMLError(problem=f"the key {name} is written twice", problem_mark=name_node.start_mark)
        inner = f"{key}.{name}".lstrip(".")
        lines[inner] = name_node.start_mark.line + 1
        tree[name] = _plain(loader, value_node, inner, lines)
    return tree


def read_yaml(path: Path, key: str = "") -> YamlFile:
    """Reads a file whose content is a mapping; an empty file is an empty one.

    Args:
        path: the file.
        key: dotted key under which the content stands in the configuration; empty for a whole configuration.

    Raises:
        ConfigError: unreadable, broken, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    tree, lines = parse_yaml(text, str(path), key)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}:1: must hold `key: value` lines")
    content = tree or {}
    return YamlFile(path, {key: content} if key else content, lines)

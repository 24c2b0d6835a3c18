"""The configuration's options, shared by all scripts."""

import argparse
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from tracknet.errors import ConfigError
from tracknet.utils.config.build import DEFAULT_NAMES, named_cfg, rebuilt_cfg, seeded


class _ChooseYaml(argparse.Action):
    """Stores the name and notes that it was asked for, which a default is not."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.chosen_yaml = (*namespace.chosen_yaml, option)


def add_config_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--data --model --training --config --seed --output-dir --dry-run`; what no option takes is a `key=value` override."""
    parser.set_defaults(chosen_yaml=())
    for category, name in DEFAULT_NAMES.items():
        parser.add_argument(
            f"--{category}", default=name, metavar="NAME", action=_ChooseYaml, help=f"YAML of configs/{category} (default: {name})"
        )
    parser.add_argument(
        "--config", metavar="FILE", help="rebuild a run from the config.yaml of its run folder, in place of the three names"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="in place of training.seed")
    parser.add_argument("--output-dir", metavar="FOLDER", help="in place of training.output_dir; relative to the current folder")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration as YAML and make nothing")


def cfg_from_arguments(arguments: argparse.Namespace, overrides: Sequence[str]) -> DictConfig:
    """The configuration that parsed options and overrides ask for.

    With `--dry-run` no generator is seeded: nothing is drawn before the program ends, and torch, which takes seconds to import, can be
    left alone.

    Raises:
        ConfigError: as `build_cfg`, and for `--config` beside a YAML name.
    """
    if arguments.config is not None and arguments.chosen_yaml:
        raise ConfigError(f"--config and {arguments.chosen_yaml[0]} exclude each other: a saved configuration is whole")
    common: dict[str, Any] = {"seed": arguments.seed, "output_dir": arguments.output_dir, "dry_run": arguments.dry_run}
    if arguments.config is not None:
        cfg = rebuilt_cfg(arguments.config, overrides, **common)
    else:
        cfg = named_cfg({category: getattr(arguments, category) for category in DEFAULT_NAMES}, overrides, **common)
    return cfg if arguments.dry_run else seeded(cfg)

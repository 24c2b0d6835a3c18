"""The configuration of a run, from `configs/` and the command line: `build_cfg` and what goes with it.

`files` finds and reads YAML, `overrides` reads `key=value`, `build` puts them together, `cli` holds the options.
"""

from tracknet.utils.config.build import build_cfg, saved_cfg, typed, with_run_identity
from tracknet.utils.config.cli import add_config_cli_arguments, cfg_from_arguments

__all__ = ["add_config_cli_arguments", "build_cfg", "cfg_from_arguments", "saved_cfg", "typed", "with_run_identity"]

"""Builds a run's configuration: YAML, overrides, paths, identity, seeds and folders."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracknet.errors import ConfigError
from tracknet.schema.data import DataConfig
from tracknet.schema.root import Config
from tracknet.schema.runtime import RuntimeConfig
from tracknet.schema.training import TrainingConfig
from tracknet.schema.tree import MISSING, Schema, shown
from tracknet.schema.validation import check_config
from tracknet.utils.config.choices import Place, choose, refuse_idle_loss, settle_names
from tracknet.utils.config.files import CATEGORIES, YamlFile, find_yaml, project_root, read_yaml
from tracknet.utils.config.overrides import merge_trees, missing_key, parse_overrides
from tracknet.utils.seeding import seed_everything

DEFAULT_NAMES = {"data": "tracknet", "model": "vit_heatmap", "training": "default"}
PATH_KEYS = ("data.root", "data.cache_dir", "training.init_from", "training.output_dir", "training.log_dir", "training.ckpt_dir")
TIMESTAMP_FORMAT = "%Y%m%d-%H%M%S"
MAX_SEED = 2**32 - 1

logger = logging.getLogger(__name__)


def build_cfg(
    data_name: str = DEFAULT_NAMES["data"],
    model_name: str = DEFAULT_NAMES["model"],
    training_name: str = DEFAULT_NAMES["training"],
    overrides: Sequence[str] | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
) -> DictConfig:
    """Reads one YAML of each category and merges the overrides over them; seeds the generators; makes the output folders.

    Args:
        data_name: file of `configs/data`, without `.yaml`; also of the folder `$TRACKNET_CONFIG_DIR`, which is looked at first.
        model_name: file of `configs/model`.
        training_name: file of `configs/training`.
        overrides: a list of `key=value` texts (not one text), the last one wins, such as `training.optimizer.lr=1e-4`.
        seed: in place of `training.seed`, 0 to 2**32 - 1.
        output_dir: in place of `training.output_dir`; relative to the current folder, while paths in YAML and overrides are relative
            to the project root.
        dry_run: makes no folder.

    Returns:
        Sections `data`, `model`, `training`, `runtime`, fully resolved, all paths absolute; `typed` gives them as dataclasses.

    Raises:
        ConfigNotFoundError: a YAML that does not exist; it is a FileNotFoundError.
        ConfigError: any other mistake in the files, overrides or arguments.
    """
    names = {"data": data_name, "model": model_name, "training": training_name}
    return seeded(named_cfg(names, overrides, seed, output_dir, dry_run))


def seeded(cfg: DictConfig) -> DictConfig:
    """The same, once all generators are seeded with its seed; imports torch."""
    seed_everything(cfg.runtime.seed)
    return cfg


def named_cfg(
    names: Mapping[str, str], overrides: Sequence[str] | None, seed: int | None, output_dir: str | Path | None, dry_run: bool
) -> DictConfig:
    """`build_cfg` without the seeding, which imports torch; `names` has a file of each category."""
    files = {category: read_yaml(find_yaml(category, name), category) for category, name in names.items()}
    tree = {category: file.tree[category] for category, file in files.items()}
    return _build(tree, lambda key: files[key.split(".")[0]].place(key), names, overrides, seed, output_dir, dry_run)


def saved_cfg(
    path: str | Path,
    overrides: Sequence[str] | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
) -> DictConfig:
    """Rebuilds a run from the `config.yaml` of its run folder; `runtime` is worked out anew, the rest, seeds too, as in `build_cfg`.

    Args:
        path: the file; relative to the current folder.
        overrides: as in `build_cfg`.
        seed: as in `build_cfg`.
        output_dir: as in `build_cfg`.
        dry_run: makes no folder.

    Raises:
        ConfigError: the file is no saved configuration, or any mistake in it or the overrides.
    """
    return seeded(rebuilt_cfg(path, overrides, seed, output_dir, dry_run))


def rebuilt_cfg(
    path: str | Path, overrides: Sequence[str] | None, seed: int | None, output_dir: str | Path | None, dry_run: bool
) -> DictConfig:
    """`saved_cfg` without the seeding, which imports torch."""
    file = read_yaml(Path(path).expanduser())
    for name in file.tree:
        if name not in (*CATEGORIES, "runtime"):
            raise ConfigError(f"{file.place(name)}unknown section {name}; a saved configuration has data, model, training and runtime")
    tree = {}
    for category in CATEGORIES:
        if not isinstance(file.tree.get(category), dict):
            raise ConfigError(f"{file.path}: has no section {category}; give the config.yaml of a run folder")
        tree[category] = file.tree[category]
    return _build(tree, file.place, _saved_names(file), overrides, seed, output_dir, dry_run)


def _saved_names(file: YamlFile) -> dict[str, str]:
    """The YAML names that the saved run was built from, kept for the record."""
    runtime = file.tree.get("runtime")
    names = {}
    for category in CATEGORIES:
        name = runtime.get(f"{category}_name") if isinstance(runtime, dict) else None
        names[category] = name if isinstance(name, str) else "saved"
    return names


def typed(cfg: DictConfig) -> Config:
    """The configuration as instances of the schema's dataclasses."""
    return cast(Config, OmegaConf.to_object(cfg))


def with_run_identity(cfg: DictConfig, timestamp: str) -> None:
    """Rewrites `runtime.timestamp` and `runtime.run_id`, so that all ranks can take those of rank 0.

    Raises:
        ConfigError: `timestamp` is not YYYYMMDD-HHMMSS.
    """
    _check_timestamp(timestamp)
    cfg.runtime.timestamp = timestamp
    cfg.runtime.run_id = f"run-{timestamp}-s{cfg.runtime.seed}"


def _build(
    tree: dict[str, Any],
    place: Place,
    names: Mapping[str, str],
    overrides: Sequence[str] | None,
    seed: int | None,
    output_dir: str | Path | None,
    dry_run: bool,
) -> DictConfig:
    given = parse_overrides(overrides or ())
    choices, warnings = choose(tree, place, given)
    schema = Schema(choices)
    schema.check(tree, place)
    _let_amp_decide(tree["training"])
    changes = [override.tree(schema) for override in given]
    for change in changes:
        settle_names(change, choices)
        schema.check(change, lambda key: "command line: ")
    cfg = _merge(schema, tree, changes)
    # values that came out of ${...} meet their types and ranges only now
    schema.check(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(CATEGORIES)))), lambda key: "")
    _set_paths(cfg, output_dir)
    _set_runtime(cfg, names, seed)
    config = typed(cfg)
    check_config(config)
    refuse_idle_loss(tree["training"], changes, config.training.loss)
    if not dry_run:
        _make_folders(cfg)
    for warning in warnings:  # only now: after a refusal there is nothing to say beside it
        logger.warning("%s", warning)
    return cfg


def _let_amp_decide(training: dict[str, Any]) -> None:
    """A file with `amp` and without `precision` is older than `precision`, whose default would overrule it."""
    if "amp" in training and "precision" not in training:
        training["precision"] = None


def _merge(schema: Schema, tree: dict[str, Any], changes: list[dict[str, Any]]) -> DictConfig:
    """The typed configuration with all `${...}` resolved; `runtime` is still to be filled."""
    choices = schema.sections
    runtime = RuntimeConfig(**{spec.name: cast(Any, MISSING) for spec in fields(RuntimeConfig)})
    training = TrainingConfig(optimizer=choices["training.optimizer"](), scheduler=choices["training.scheduler"]())
    base = Config(DataConfig(), choices["model"](), training, runtime)
    merged = schema.without_nulls(reduce(merge_trees, changes, tree))
    if (key := missing_key(merged)) is not None:
        raise ConfigError(f"{key} is {MISSING}; give it a value with {key}=...")
    try:
        cfg = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(base), OmegaConf.create(merged)))
        for section in CATEGORIES:
            OmegaConf.resolve(cfg[section])
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{(error.msg or str(error)).splitlines()[0]}") from None
    return cfg


def _set_paths(cfg: DictConfig, output_dir: str | Path | None) -> None:
    """Makes paths absolute: those of YAML and overrides from the project root, `output_dir` from the current folder."""
    root = project_root()
    for key in PATH_KEYS:
        value = OmegaConf.select(cfg, key)
        if value == "":
            raise ConfigError(f"{key} is empty; give a path, or null where the key may be null")
        if value is not None:
            OmegaConf.update(cfg, key, absolute(value, root))
    weights = cfg.model.pretrained_model_name
    if weights is not None and (weights.startswith(("./", "../", "~", "/")) or (root / weights).is_dir()):
        cfg.model.pretrained_model_name = absolute(weights, root)
    if output_dir is not None and not isinstance(output_dir, str | Path):
        raise ConfigError(f"--output-dir is {shown(output_dir)}; it must be the path of a folder")
    if output_dir is not None:
        if str(output_dir) == "":
            raise ConfigError("--output-dir is empty; give a folder")
        cfg.training.output_dir = absolute(output_dir, Path.cwd())


def absolute(path: str | Path, base: Path) -> str:
    """A path that counts from `base`, without `..` and `~`. Raises ConfigError for the home of somebody who has none."""
    try:
        return os.path.normpath(base / Path(path).expanduser())
    except RuntimeError:  # ~somebody without a home
        raise ConfigError(f"{path}: there is no such home folder") from None


def _set_runtime(cfg: DictConfig, names: Mapping[str, str], seed: int | None) -> None:
    """Fills `runtime`. A seed given beside the YAML also becomes `training.seed`, so that the saved file rebuilds this run."""
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"--seed is {shown(seed)}; it must be a whole number >= 0 and <= {MAX_SEED}")
        cfg.training.seed = seed
    output_root = Path(cfg.training.output_dir)
    log_dir, ckpt_dir = cfg.training.log_dir, cfg.training.ckpt_dir
    cfg.runtime.seed = cfg.training.seed
    cfg.runtime.project_root = str(project_root())
    cfg.runtime.output_root = str(output_root)
    cfg.runtime.log_dir = str(output_root / "logs") if log_dir is None else log_dir
    cfg.runtime.ckpt_dir = str(output_root / "checkpoints") if ckpt_dir is None else ckpt_dir
    cfg.runtime.data_name, cfg.runtime.model_name, cfg.runtime.training_name = (names[category] for category in CATEGORIES)
    # launchers export one timestamp for all ranks
    with_run_identity(cfg, os.environ.get("TRACKNET_TIMESTAMP") or datetime.now().strftime(TIMESTAMP_FORMAT))


def _check_timestamp(timestamp: str) -> None:
    try:
        if not re.fullmatch(r"[0-9]{8}-[0-9]{6}", timestamp):
            raise ValueError
        datetime.strptime(timestamp, TIMESTAMP_FORMAT)
    except ValueError:
        raise ConfigError(f"TRACKNET_TIMESTAMP is {shown(timestamp)}; it must be a time as YYYYMMDD-HHMMSS") from None


def _make_folders(cfg: DictConfig) -> None:
    for name, change in (("output_root", "--output-dir"), ("log_dir", "training.log_dir"), ("ckpt_dir", "training.ckpt_dir")):
        folder = Path(cfg.runtime[name])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}; change {change}") from None

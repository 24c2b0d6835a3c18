"""The shape of the project: imports go one way, the shipped YAMLs are whole, the wheel works alone."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import which
from types import NoneType
from typing import Any, get_args

import pytest
import yaml

from tracknet.schema.model import MODELS
from tracknet.schema.training import OPTIMIZERS, SCHEDULERS
from tracknet.schema.tree import Schema
from tracknet.utils.config import build_cfg, typed

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((CHECKOUT / "configs").glob("*/*.yaml"))
SHIPPED = {category: [path.stem for path in CONFIGS if path.parent.name == category] for category in ("data", "model", "training")}


def test_imports_go_one_way() -> None:
    # a process of its own: import-linter switches all loggers of the process off
    program = "from importlinter.cli import lint_imports_command as command; command()"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", program, "--no-cache"], cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


def imported_packages(path: Path) -> set[str]:
    """First words of all absolute imports of a file, wherever they stand."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0}
    return {name.split(".")[0] for name in names}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    declared = {re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in [*project["dependencies"], *optional]}
    other_names = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    imported = set().union(*(imported_packages(path) for path in (CHECKOUT / "tracknet").rglob("*.py")))
    third_party = imported - set(sys.stdlib_module_names) - {"tracknet"}
    assert {"torch", "yaml", "huggingface_hub"} <= third_party
    assert {other_names.get(name, name) for name in third_party} - declared == set()


def unspelled(schema: Schema, key: str, content: Any) -> list[str]:
    """The schema's keys that a YAML leaves out; an optional section that is null is spelled out."""
    missing = []
    for name, (_, hint) in schema.leaves(key).items():
        inner = f"{key}.{name}"
        if name not in content:
            missing.append(inner)
        elif schema.section_at(inner) is not None and not (content[name] is None and NoneType in get_args(hint)):
            missing += unspelled(schema, inner, content[name])
    return missing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_yaml_spells_out_every_key_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("#")
    assert all(word in header for word in ("-m tracknet.scripts.train", "Hardware:", "Time and score:"))
    content = yaml.safe_load(text)
    choices = {"model": MODELS[content.get("model_name", "unet_heatmap")]}
    for section, kinds in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        choices[f"training.{section}"] = kinds[content[section]["name"]] if section in content else next(iter(kinds.values()))
    assert unspelled(Schema(choices), path.parent.name, content) == []


@pytest.mark.parametrize("data_name", SHIPPED["data"])
@pytest.mark.parametrize("model_name", SHIPPED["model"])
@pytest.mark.parametrize("training_name", SHIPPED["training"])
def test_all_shipped_yamls_go_together(data_name: str, model_name: str, training_name: str) -> None:
    config = typed(build_cfg(data_name, model_name, training_name, dry_run=True))
    assert config.model.model_name in MODELS
    assert config.training.grad_clip_norm == 0
    assert not set(config.data.split.train_games) & set(config.data.split.val_games)


def test_the_contracts_keys_are_all_there() -> None:
    """The keys that the owner's contract names, for both families and with the defaults of `build_cfg`."""
    cfg = build_cfg(dry_run=True)
    convnext = build_cfg(model_name="convnext_fpn_heatmap", dry_run=True).model
    micro_batch = {"adaptive_micro_batch", "min_micro_batch_size", "mb_backoff_factor", "oom_retries", "micro_batch_size", "grad_clip_norm"}
    decoder = {"channels", "upsample", "blocks_per_stage", "norm", "activation", "use_depthwise", "use_se", "se_reduction", "dropout"}
    for section, keys in (
        (cfg.data, {"root", "split", "preprocess", "sequence"}),
        (cfg.data.split, {"train_games", "val_games"}),
        (cfg.data.preprocess, {"resize", "normalize", "flip_prob"}),
        (cfg.data.sequence, {"enabled", "length", "stride"}),
        (cfg.model, {"model_name", "pretrained_model_name", "backbone", "decoder", "heatmap"}),
        (cfg.model.backbone, {"freeze", "device_map", "local_files_only", "patch_size"}),
        (cfg.model.decoder, decoder),
        (cfg.model.heatmap, {"size", "sigma"}),
        (convnext.backbone, {"freeze", "return_stages", "device_map", "local_files_only"}),
        (convnext.fpn, {"lateral_dim", "fuse"}),
        (
            cfg.training,
            micro_batch | {"seed", "batch_size", "epochs", "grad_clip", "precision", "amp", "output_dir", "log_dir", "ckpt_dir"},
        ),
        (cfg.training.optimizer, {"name", "lr", "weight_decay"}),
        (cfg.training.scheduler, {"name", "warmup_epochs"}),
        (cfg.training.loss, {"name", "alpha", "beta"}),
        (cfg.training.data_loader, {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "drop_last"}),
        (cfg.runtime, {"seed", "project_root", "output_root", "log_dir", "ckpt_dir", "timestamp", "run_id"}),
    ):
        assert keys <= set(section)


def test_the_wheel_works_from_another_folder(tmp_path: Path) -> None:
    uv = which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    build = [uv, "build", "--wheel", "--offline", "--out-dir", str(tmp_path / "dist"), str(CHECKOUT)]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("hatchling is not in uv's cache, and this test uses no network")
    assert built.returncode == 0, built.stderr
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    shipped = {path.relative_to(installed / "tracknet/configs") for path in (installed / "tracknet/configs").glob("*/*.yaml")}
    assert shipped == {path.relative_to(CHECKOUT / "configs") for path in CONFIGS}
    done = subprocess.run(
        [sys.executable, "-m", "tracknet.scripts.train", "--dry-run"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = yaml.safe_load(done.stdout)
    assert printed["runtime"]["project_root"] == str(elsewhere)
    assert printed["data"]["root"] == str(elsewhere / "data/tracknet")
    assert list(elsewhere.iterdir()) == []

"""`build_cfg`: types, ranges, paths, identity, seeds, rebuilding; every mistake is one `ConfigError` naming the key."""

import contextlib
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from tracknet.errors import ConfigError, UserError
from tracknet.schema.data import SyntheticConfig
from tracknet.schema.model import ConvNextFpnHeatmapConfig, UnetHeatmapConfig, VitHeatmapConfig
from tracknet.schema.root import Config
from tracknet.schema.training import AdadeltaConfig, SgdConfig, StepConfig, gradient_bound
from tracknet.schema.tree import Schema
from tracknet.schema.validation import check_sizes, size_contradictions
from tracknet.utils.config import build_cfg, saved_cfg, typed, with_run_identity
from tracknet.utils.config.files import read_yaml

CHECKOUT = Path(__file__).resolve().parents[1]


def dry(*overrides: str, **arguments: Any) -> DictConfig:
    return build_cfg(overrides=overrides, dry_run=True, **arguments)


def refusal(*overrides: str, **arguments: Any) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(ConfigError) as caught:
        dry(*overrides, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 2
    return message


@pytest.fixture
def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    for category in ("data", "model", "training"):
        (folder / category).mkdir(parents=True)
    monkeypatch.setenv("TRACKNET_CONFIG_DIR", str(folder))
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- what comes out


def test_the_defaults_are_tracknet_vit_heatmap_default(tmp_path: Path) -> None:
    cfg = build_cfg(output_dir=tmp_path / "out")
    assert set(cfg) == {"data", "model", "training", "runtime"}
    assert (cfg.runtime.data_name, cfg.runtime.model_name, cfg.runtime.training_name) == ("tracknet", "vit_heatmap", "default")
    assert cfg.model.model_name == "vit_heatmap"
    assert Path(cfg.data.root) == CHECKOUT / "data/tracknet"
    assert Path(cfg.runtime.project_root) == CHECKOUT


def test_typed_gives_the_dataclasses() -> None:
    config = typed(dry(data_name="demo", model_name="demo", training_name="demo"))
    assert isinstance(config, Config)
    assert isinstance(config.model, UnetHeatmapConfig)
    assert isinstance(config.data.synthetic, SyntheticConfig)
    assert config.data.preprocess.resize == [512, 288]
    assert isinstance(typed(dry()).model, VitHeatmapConfig)
    assert isinstance(typed(dry(model_name="convnext_fpn_heatmap")).model, ConvNextFpnHeatmapConfig)


def test_overrides_reach_their_key_and_the_last_one_wins() -> None:
    cfg = dry(
        "training.optimizer.lr=1e-4", "training.epochs=3", "training.epochs=5", "data.preprocess.resize=null", "training.loss={name: mse}"
    )
    assert cfg.training.optimizer.lr == pytest.approx(1e-4)
    assert isinstance(cfg.training.optimizer.lr, float)
    assert cfg.training.epochs == 5
    assert cfg.data.preprocess.resize is None
    assert cfg.training.loss.name == "mse"
    assert cfg.training.loss.alpha == 2.0


@given(
    lr=st.floats(1e-12, 1e12),
    epochs=st.integers(1, 2**40),
    drop=st.booleans(),
    games=st.lists(st.from_regex(r"g[a-z]{1,8}", fullmatch=True), min_size=1, unique=True),
)
@settings(max_examples=20, deadline=None)
def test_any_value_in_range_comes_through_unchanged(lr: float, epochs: int, drop: bool, games: list[str]) -> None:
    cfg = dry(
        f"training.optimizer.lr={lr!r}",
        f"training.epochs={epochs}",
        f"training.data_loader.drop_last={str(drop).lower()}",
        f"data.split.train_games=[{', '.join(repr(game) for game in games)}]",
    )
    assert (cfg.training.optimizer.lr, cfg.training.epochs) == (lr, epochs)
    assert cfg.training.data_loader.drop_last is drop
    assert list(cfg.data.split.train_games) == games


def test_a_key_that_the_yaml_leaves_out_has_the_default_of_the_schema(own_configs: Path) -> None:
    write(own_configs / "training", "short", "epochs: 2\n")
    cfg = dry(training_name="short")
    assert cfg.training.epochs == 2
    assert cfg.training.loss.name == "mse"
    assert cfg.training.optimizer.name == "adamw"
    assert cfg.runtime.seed == 42


def test_text_stays_as_typed() -> None:
    assert dry("training.tracking.project=007").training.tracking.project == "007"
    assert dry("training.tracking.project='a b'").training.tracking.project == "a b"
    assert dry("training.tracking.project=a: {b").training.tracking.project == "a: {b"
    assert dry("training.tracking.project=no").training.tracking.project == "no"


def test_interpolations_are_resolved_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOOTAGE", "/footage")
    cfg = dry("data.root=${oc.env:FOOTAGE}/tennis", "training.epochs=${training.batch_size}")
    assert cfg.data.root == "/footage/tennis"
    assert cfg.training.epochs == cfg.training.batch_size
    assert "training.epochs" in refusal("training.epochs=${data.augment.brightness}")
    assert "data.root" in refusal("data.root=${oc.env:NO_SUCH_VARIABLE}")


# ---- refusals of one key


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("training.batch_size=abc", "training.batch_size", "whole number >= 1"),
        ("training.batch_size=1.5", "training.batch_size", "whole number"),
        ("training.batch_size=true", "training.batch_size", "whole number"),
        ("training.batch_size=0", "training.batch_size", ">= 1"),
        ("training.batch_size=null", "training.batch_size", "whole number"),
        ("training.batch_size=9223372036854775808", "training.batch_size", "whole number"),
        ("training.optimizer.lr=nan", "training.optimizer.lr", "number > 0"),
        ("training.optimizer.lr=.nan", "training.optimizer.lr", "number > 0"),
        ("training.optimizer.lr=.inf", "training.optimizer.lr", "number > 0"),
        ("training.optimizer.lr=1e999", "training.optimizer.lr", "number > 0"),
        ("training.optimizer.lr=true", "training.optimizer.lr", "number > 0"),
        ("training.optimizer.betas=[0.9]", "training.optimizer.betas", "2 numbers"),
        ("training.optimizer.betas=[0.9, 1.0]", "training.optimizer.betas", "< 1"),
        ("training.amp=1", "training.amp", "true or false"),
        ("training.channels_last=1", "training.channels_last", "true or false"),
        ("training.num_threads=-1", "training.num_threads", "whole number"),
        ("training.precision=fp8", "training.precision", "auto, fp32, fp16, bf16"),
        ("training.loss=focal", "training.loss", "name, alpha, beta"),
        ("training.optimizer.name=lion", "training.optimizer.name", "adamw, adam, sgd, adadelta"),
        ("training.scheduler.name=null", "training.scheduler.name", "cosine, linear, constant, step"),
        ("model.model_name=hrnet", "model.model_name", "vit_heatmap, convnext_fpn_heatmap, unet_heatmap"),
        ("data.split.train_games=[a, 8]", "data.split.train_games", "list of texts"),
        ("data.split.train_games=game1", "data.split.train_games", "list of texts"),
        ("data.preprocess.resize=[512, 28.8]", "data.preprocess.resize", "2 whole numbers"),
        ("data.preprocess.resize=[512, null]", "data.preprocess.resize", "2 whole numbers"),
        ("data.preprocess.resize=[512, 288, 3]", "data.preprocess.resize", "2 whole numbers"),
        ("model.decoder.channels=[]", "model.decoder.channels", "list of whole numbers"),
        ("data.preprocess.flip_prob=1.5", "data.preprocess.flip_prob", "<= 1"),
        ("data.root=???", "data.root", "give it a value"),
        ("data.root=''", "data.root", "empty"),
        ("model=null", "model", "section with the keys model_name"),
        ("model=3", "model", "section with the keys model_name"),
        ("model={backbone: 3}", "model.backbone", "section"),
        ("training=null", "training", "section with the keys seed"),
        ("training=3", "training", "section with the keys seed"),
        ("data=null", "data", "section with the keys root"),
        ("data=[3]", "data", "section with the keys root"),
        ("training={scheduler: {name: foo}}", "training.scheduler.name", "cosine, linear, constant, step"),
        ("training={scheduler: {name: null}}", "training.scheduler.name", "cosine, linear, constant, step"),
        ("training={optimizer: null}", "training.optimizer", "section"),
        ("training.optimizer={name: 3}", "training.optimizer.name", "adamw, adam, sgd, adadelta"),
        ("model={model_name: unet_heatmap}", "model.model_name", "--model"),
        ("model={model_name: hrnet}", "model.model_name", "vit_heatmap, convnext_fpn_heatmap, unet_heatmap"),
        ("training.epochs=010", "'010'", "whole number"),
        ("training.epochs=1_6", "'1_6'", "whole number"),
        ("training.epochs=0x10", "'0x10'", "whole number"),
        ("training.epochs=0b1", "'0b1'", "whole number"),
        ("training.epochs=1:30", "'1:30'", "whole number"),
        ("training.grad_clip=1_0.5", "'1_0.5'", "number"),
        ("data.split.train_games=[1, 2]", "data.split.train_games", "quotes around each: ['1', '2']"),
        ("data.split.train_games=[game1/]", "data.split.train_games", "'game1/'"),
        ("data.split.val_games=[./game1]", "data.split.val_games", "'./game1'"),
        ("data.split.val_games=[a/../game1]", "data.split.val_games", "'a/../game1'"),
        ("data.split.val_games=[..]", "data.split.val_games", "'..'"),
        ("data.split.val_games=[.]", "data.split.val_games", "'.'"),
        ("data.split.val_games=['']", "data.split.val_games", "''"),
        ("data.split.val_games=[/game1]", "data.split.val_games", "'/game1'"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_allowed(override: str, key: str, allowed: str) -> None:
    message = refusal(override)
    assert key in message
    assert allowed in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.optimizer.learning_rate=1", None),
        ("training.optimiser.lr=1", "training.optimizer"),
        ("training.batchsize=1", "training.batch_size"),
        ("training.lr=1", "training.optimizer.lr"),
        ("optimizer.lr=1", "training.optimizer.lr"),
        ("data.preproces.resize=null", "data.preprocess"),
        ("training.seed.x=1", "training.seed"),
        ("training.loss={alhpa: 1}", "training.loss.alpha"),
        ("trainign.epochs=1", "training.epochs"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(override: str, nearest: str | None) -> None:
    message = refusal(override)
    assert "unknown key" in message
    assert f"did you mean {nearest or ''}" in message


@pytest.mark.parametrize(
    ("override", "model_name", "family"),
    [
        ("model.backbone.return_stages=[1]", "vit_heatmap", "convnext_fpn_heatmap"),
        ("model={fpn: {fuse: sum}}", "vit_heatmap", "convnext_fpn_heatmap"),
        ("model.fpn.lateral_dim=3", "vit_heatmap", "convnext_fpn_heatmap"),
        ("model.decoder.norm=group", "convnext_fpn_heatmap", "vit_heatmap"),
        ("model.backbone.patch_size=14", "unet", "vit_heatmap"),
    ],
)
def test_a_key_of_another_model_family_names_that_family(override: str, model_name: str, family: str) -> None:
    message = refusal(override, model_name=model_name)
    assert "unknown key model." in message
    assert f"{family} has" in message
    assert "--model" in message


@given(st.from_regex(r"(data|model|training)(\.[a-z_]{1,12}){1,3}", fullmatch=True))
@settings(max_examples=20, deadline=None)
def test_no_key_outside_the_schema_is_accepted(key: str) -> None:
    config = typed(dry())
    schema = Schema(
        {
            "model": type(config.model),
            "training.optimizer": type(config.training.optimizer),
            "training.scheduler": type(config.training.scheduler),
        }
    )
    if key not in set(schema.keys()):
        assert key in refusal(f"{key}=1")


@pytest.mark.parametrize(
    "override",
    ["training.seed", "=5", "training..seed=1", ".seed=1", "training.seed.=1", "training.seed=", "a b=1", "[x]=1", "runtime.seed=3"],
)
def test_a_malformed_override_is_refused(override: str) -> None:
    assert override.split("=")[0] in refusal(override)


@pytest.mark.parametrize("value", ["[1, 2", "{a: 1, a: 2}", "!!python/object:os.system {}", "&x [*x]", "[" * 2000])
def test_broken_yaml_in_an_override_is_refused(value: str) -> None:
    for key in ("training.epochs", "data", "model", "training", "training.optimizer"):
        message = refusal(f"{key}={value}")
        assert f"{key}=" in message
        assert not re.search(r":\d+: ", message)  # a value has no line


def test_a_section_may_be_given_whole_or_empty() -> None:
    assert typed(dry("model={}", "data={}", "training={}")).model == typed(dry()).model
    assert dry("model={backbone: {freeze: true}}").model.backbone.freeze is True
    training = typed(dry("training={optimizer: {name: sgd, momentum: 0.5}, scheduler: {name: step}}")).training
    assert isinstance(training.optimizer, SgdConfig)
    assert training.optimizer.momentum == 0.5
    assert isinstance(training.scheduler, StepConfig)


def test_the_last_name_wins_whatever_form_it_has() -> None:
    for overrides in (
        ["training.optimizer.name=adam", "training={optimizer: {name: sgd}}"],
        ["training={optimizer: {name: adam}}", "training.optimizer={name: adadelta}", "training.optimizer.name='sgd'"],
    ):
        optimizer = typed(dry(*overrides)).training.optimizer
        assert isinstance(optimizer, SgdConfig)
        assert optimizer.name == "sgd"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data_name": None}, "--data"),
        ({"model_name": 3}, "--model"),
        ({"output_dir": 5}, "--output-dir"),
        ({"overrides": "training.epochs=3"}, "list"),
        ({"overrides": [3]}, "key=value"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_cfg(dry_run=True, **arguments)
    assert len(str(caught.value).splitlines()) == 1


# ---- YAML files


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("epochs: 2\nbatch_size: [1\n", 3, "broken YAML"),
        ("epochs: 2\n\tbatch_size: 1\n", 2, "broken YAML"),
        ("epochs: 2\nseed: 1\nepochs: 3\n", 3, "epochs is written twice"),
        ("loss:\n  name: mse\n  name: focal\n", 3, "name is written twice"),
        ("epochs: 2\nbatch_size: many\n", 2, "training.batch_size is 'many'"),
        ("optimizer:\n  name: sgd\n  lr: -1\n", 3, "training.optimizer.lr is -1"),
        ("optimizer:\n  name: sgd\n  betas: [0.9, 0.99]\n", 3, "unknown key training.optimizer.betas"),
        ("optimizer:\n  name: lion\n", 2, "training.optimizer.name is 'lion'"),
        ("optimizer: adamw\n", 1, "training.optimizer is 'adamw'"),
        ("# nothing\n\nepoch: 3\n", 3, "did you mean training.epochs"),
        ("- a\n- b\n", 1, "key: value"),
        ("epochs: 2\n--- \nepochs: 3\n", 2, "broken YAML"),
        ("epochs: !!python/name:os.system\n", 1, "broken YAML"),
        ("? [a, b]\n: 1\n", 1, "plain word"),
        ("loss: &x\n  name: mse\ntracking:\n  <<: *x\n", 4, "merge keys (<<) are not supported"),
        ("epochs: 2\nseed: 010\n", 2, "training.seed is '010'"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_line(own_configs: Path, text: str, line: int, words: str) -> None:
    path = write(own_configs / "training", "mine", text)
    message = refusal(training_name="mine")
    assert message.startswith(f"{path}:{line}: ")
    assert words in message


def test_a_file_that_is_no_utf8_text_is_refused(own_configs: Path) -> None:
    path = own_configs / "training" / "mine.yaml"
    path.write_bytes(b"epochs: \xff\n")
    assert str(path) in refusal(training_name="mine")
    path.write_bytes(b"epochs: \x01\n")
    assert str(path) in refusal(training_name="mine")


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_no_file_content_ends_in_anything_but_a_mapping_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp(), "noise", "")
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        assert isinstance(read_yaml(path).tree, dict)


def test_a_name_that_does_not_exist_lists_those_that_do(own_configs: Path) -> None:
    write(own_configs / "data", "badminton", "root: x\n")
    with pytest.raises(FileNotFoundError) as caught:
        dry(data_name="badmintn")
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    for name in ("badminton", "demo", "tennis", "tracknet", "did you mean badminton"):
        assert name in message


def test_only_names_that_are_accepted_are_listed(own_configs: Path) -> None:
    for name in ("-dash", "two words", "fine"):
        write(own_configs / "data", name, "root: x\n")
    (own_configs / "data" / "folder.yaml").mkdir()
    os.mkfifo(own_configs / "data" / "pipe.yaml")
    assert "there are: demo, fine, tennis, tracknet" in refusal(data_name="nowhere")


def test_an_old_file_with_amp_and_without_precision_lets_amp_decide(own_configs: Path) -> None:
    for amp in ("true", "false"):
        write(own_configs / "training", "old", f"amp: {amp}\n")
        assert dry(training_name="old").training.precision is None
        assert dry("training.precision=auto", training_name="old").training.precision == "auto"
    write(own_configs / "training", "new", "epochs: 3\n")
    assert dry(training_name="new").training.precision == "auto"


def test_null_or_an_empty_key_is_the_default_of_loss_and_output_dir(own_configs: Path) -> None:
    default = typed(dry("training.loss.name=mse")).training
    for text in ("loss:\noutput_dir:\n", "loss: null\noutput_dir: null\n", "epochs: 3\n"):
        write(own_configs / "training", "mine", text)
        training = typed(dry(training_name="mine")).training
        assert (training.loss, training.output_dir) == (default.loss, str(CHECKOUT / "outputs"))
    training = typed(dry("training.output_dir=there", "training.output_dir=null", "training.loss=null")).training
    assert (training.loss, training.output_dir) == (default.loss, str(CHECKOUT / "outputs"))
    assert typed(dry("training.loss=null", "training={loss: {name: focal}}")).training.loss.name == "focal"
    assert "training.loss.name" in refusal("training.loss.name=null")


@pytest.mark.parametrize("name", ["../data/demo", "/etc/passwd", "..", ".", "", "a/b", "demo.yaml", "x" * 300, "a\nb"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    message = refusal(data_name=name)
    assert "demo, tennis, tracknet" in message


def test_own_configs_come_first_and_the_shipped_ones_stay(own_configs: Path) -> None:
    write(own_configs / "training", "default", "epochs: 77\n")
    assert dry().training.epochs == 77
    assert dry(training_name="demo").training.epochs != 77


def test_a_config_folder_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKNET_CONFIG_DIR", "/no/such/folder")
    assert "TRACKNET_CONFIG_DIR" in refusal()


def test_numbers_like_1e_4_and_dates_are_read_as_a_person_means_them(own_configs: Path) -> None:
    write(own_configs / "training", "mine", "optimizer:\n  name: adamw\n  lr: 1e-4\ntracking:\n  project: 2024-01-01\n")
    cfg = dry(training_name="mine")
    assert cfg.training.optimizer.lr == 1e-4
    assert cfg.training.tracking.project == "2024-01-01"


# ---- optimizer, scheduler and model by name


def test_another_optimizer_drops_the_keys_of_the_yamls_and_keeps_the_shared_ones(caplog: pytest.LogCaptureFixture) -> None:
    before = typed(dry(training_name="tennis")).training
    config = typed(
        dry("training.optimizer.name=sgd", "training.optimizer.momentum=0.5", "training.scheduler.name=step", training_name="tennis")
    )
    assert config.training.optimizer == SgdConfig(lr=before.optimizer.lr, weight_decay=before.optimizer.weight_decay, momentum=0.5)
    assert isinstance(config.training.scheduler, StepConfig)
    assert config.training.scheduler.warmup_epochs == before.scheduler.warmup_epochs
    assert "betas, eps belong to adamw" in caplog.text
    assert isinstance(typed(dry("training.optimizer={name: adadelta, rho: 0.5}")).training.optimizer, AdadeltaConfig)
    dry("training.scheduler.name=constant")
    assert "min_lr_ratio belongs to cosine and does not apply" in caplog.text


def test_a_refusal_comes_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    refusal("training.optimizer.name=sgd", "training.epochs=0")
    refusal("training.optimizer.name=sgd", "training.micro_batch_size=99999")
    assert caplog.text == ""


def test_a_name_in_a_structure_must_be_that_structures_own() -> None:
    schema = Schema({"model": UnetHeatmapConfig, "training.optimizer": SgdConfig, "training.scheduler": StepConfig})
    for tree in (
        {"model": {"model_name": "vit_heatmap"}},
        {"training": {"optimizer": {"name": "adamw"}}},
        {"training": {"scheduler": {"name": "cosine"}}},
    ):
        with pytest.raises(ConfigError, match="name"):
            schema.check(tree, lambda key: "")


def test_a_foreign_key_that_was_asked_for_is_refused() -> None:
    assert "training.optimizer.betas" in refusal("training.optimizer.name=sgd", "training.optimizer.betas=[0.9, 0.99]")


def test_another_model_family_needs_its_own_yaml() -> None:
    assert "--model" in refusal("model.model_name=unet_heatmap")
    assert dry("model.model_name=vit_heatmap").model.model_name == "vit_heatmap"


# ---- settings that contradict each other

UNET = {"model_name": "unet"}


@pytest.mark.parametrize(
    ("overrides", "arguments", "words"),
    [
        (["data.root=null"], {}, "data.root"),
        (["data.root=x"], {"data_name": "demo"}, "data.synthetic"),
        (["data.split.val_games=[game8, game2]"], {}, "game2"),
        (["data.split.train_games=[]"], {}, "data.split.train_games"),
        (["data.split.train_games=[a, a]"], {}, "more than once"),
        (["data.augment.scale=[1.2, 0.8]"], {}, "data.augment.scale"),
        (["data.augment.crop=[600, 160]"], {}, "data.augment.crop"),
        (["data.augment.crop=[160, 161]"], {}, "80.5"),
        (["model.heatmap.size=[256, 300]"], {}, "model.heatmap.size"),
        (["model.pretrained_model_name=facebook/dinov2-small"], UNET, "model.pretrained_model_name"),
        (["model.backbone.device_map=auto"], {}, "model.backbone.device_map"),
        (["model.backbone.device_map=auto"], {"model_name": "convnext_fpn_heatmap"}, "model.backbone.device_map"),
        (["model.backbone.return_stages=[3, 1]"], {"model_name": "convnext_fpn_heatmap"}, "return_stages"),
        (["model.pretrained_model_name=null", "model.backbone.num_heads=7"], {}, "num_heads"),
        (["training.precision=fp32", "training.amp=true"], {}, "training.amp"),
        (["training.grad_clip=1", "training.grad_clip_norm=2"], {}, "grad_clip_norm"),
        (["training.optimizer.name=sgd", "training.optimizer.momentum=0", "training.optimizer.nesterov=true"], {}, "nesterov"),
        (["training.scheduler.warmup_epochs=9", "training.epochs=8"], {}, "warmup_epochs"),
        (["training.batch_size=8", "training.micro_batch_size=9"], {}, "training.micro_batch_size"),
        (["training.batch_size=8", "training.min_micro_batch_size=9"], {}, "training.min_micro_batch_size"),
        (["training.micro_batch_size=2", "training.min_micro_batch_size=3"], {}, "training.min_micro_batch_size"),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], arguments: dict[str, str], words: str) -> None:
    assert words in refusal(*overrides, **arguments)


@given(crop=st.tuples(st.integers(8, 512), st.integers(8, 288)), heatmap=st.tuples(st.integers(1, 512), st.integers(1, 288)))
@settings(max_examples=20, deadline=None)
def test_a_crop_is_taken_exactly_where_it_holds_whole_heatmap_cells(crop: tuple[int, int], heatmap: tuple[int, int]) -> None:
    whole = all((c * h / r).is_integer() for c, h, r in zip(crop, heatmap, (512, 288), strict=True))
    overrides = [f"data.augment.crop={list(crop)}", f"model.heatmap.size={list(heatmap)}"]
    if whole:
        dry(*overrides)
    else:
        assert "data.augment.crop" in refusal(*overrides)


@given(
    picture=st.tuples(st.integers(8, 64), st.integers(8, 64)),
    crop=st.none() | st.tuples(st.integers(8, 80), st.integers(8, 80)),
    heatmap=st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
def test_sizes_go_together_exactly_as_the_contract_says(
    picture: tuple[int, int], crop: tuple[int, int] | None, heatmap: tuple[int, int]
) -> None:
    whole = crop is None or all(c <= p and (c * h / p).is_integer() for c, h, p in zip(crop, heatmap, picture, strict=True))
    fit = all(h <= p for h, p in zip(heatmap, picture, strict=True))
    assert (not list(size_contradictions(picture, crop, heatmap))) is (whole and fit)


def test_sizes_are_checked_once_the_clips_have_told_theirs() -> None:
    config = typed(dry("data.preprocess.resize=null", "data.augment.crop=[160, 160]"))
    check_sizes(config.data, config.model, (512, 288))
    check_sizes(config.data, config.model, (1280, 720))  # 32 x 32 whole cells
    for input_wh, words in (((128, 72), "model.heatmap.size"), ((512, 144), "data.augment.crop"), ((500, 288), "heatmap cells")):
        with pytest.raises(ConfigError, match=words):
            check_sizes(config.data, config.model, input_wh)


def test_a_loss_setting_that_would_do_nothing_is_refused(own_configs: Path) -> None:
    for overrides in (["training.loss.name=mse", "training.loss.alpha=3"], ["training.loss={name: mse, beta: 1}"]):
        assert "training.loss.name=focal" in refusal(*overrides)
    assert dry("training.loss={name: mse, alpha: 2, beta: 4}").training.loss.name == "mse"  # as the YAML spells them out
    assert dry("training.loss.alpha=3").training.loss.alpha == 3  # the YAML's loss is focal
    write(own_configs / "training", "mse", "loss: {name: mse, alpha: 3}\n")
    assert dry("training.loss.alpha=3", training_name="mse").training.loss.alpha == 3
    assert "training.loss.alpha" in refusal("training.loss.alpha=2", training_name="mse")
    assert "training.loss.alpha" in refusal("training.loss=null", "training.loss.alpha=5")


@pytest.mark.parametrize(("first", "second", "bound"), [(0, 0, 0), (2, 0, 2), (0, 3, 3), (4, 4, 4)])
def test_the_gradient_bound_above_zero_holds(first: float, second: float, bound: float) -> None:
    cfg = dry(f"training.grad_clip={first}", f"training.grad_clip_norm={second}")
    assert gradient_bound(typed(cfg).training) == bound


# ---- paths, identity, seeds


def test_yaml_and_overrides_count_from_the_project_root_and_output_dir_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = dry("data.root=footage", "data.cache_dir=../cache", "training.init_from=~/start", "training.log_dir=my/logs", output_dir="here")
    assert cfg.data.root == str(CHECKOUT / "footage")
    assert cfg.data.cache_dir == str(CHECKOUT.parent / "cache")
    assert cfg.training.init_from == str(Path.home() / "start")
    assert cfg.runtime.output_root == str(tmp_path / "here")
    assert cfg.runtime.log_dir == str(CHECKOUT / "my/logs")
    assert cfg.runtime.ckpt_dir == str(tmp_path / "here/checkpoints")
    assert dry("training.output_dir=there").runtime.log_dir == str(CHECKOUT / "there/logs")


def test_a_local_model_folder_is_a_path_and_a_hub_name_is_not() -> None:
    assert dry().model.pretrained_model_name == "facebook/dinov2-small"
    assert dry("model.pretrained_model_name=./weights").model.pretrained_model_name == str(CHECKOUT / "weights")
    assert dry("model.pretrained_model_name=tracknet/schema").model.pretrained_model_name == str(CHECKOUT / "tracknet/schema")


def test_a_dry_run_makes_nothing_and_a_real_one_the_three_folders(tmp_path: Path) -> None:
    build_cfg(output_dir=tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    cfg = build_cfg(output_dir=tmp_path / "out", overrides=[f"training.log_dir={tmp_path}/elsewhere/logs"])
    for folder in (cfg.runtime.output_root, cfg.runtime.log_dir, cfg.runtime.ckpt_dir):
        assert Path(folder).is_dir()
    assert cfg.runtime.log_dir == f"{tmp_path}/elsewhere/logs"


def test_a_mistake_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        build_cfg(output_dir=tmp_path / "out", overrides=["training.precision=fp32", "training.amp=true"])
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output-dir"):
        build_cfg(output_dir=tmp_path / "file" / "out")


def test_the_seed_of_the_command_line_goes_first_and_reaches_all_generators() -> None:
    assert dry().runtime.seed == 42
    assert dry("training.seed=5").runtime.seed == 5
    draws = []
    for _ in range(2):
        cfg = dry("training.seed=5", seed=7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert cfg.runtime.seed == 7
    assert draws[0] == draws[1]
    assert torch.initial_seed() == 7
    assert os.environ["PYTHONHASHSEED"] == "7"


@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.5])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    assert "--seed" in refusal(seed=seed)


def test_run_id_and_timestamp(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = dry(seed=3)
    assert re.fullmatch(r"\d{8}-\d{6}", cfg.runtime.timestamp)
    assert cfg.runtime.run_id == f"run-{cfg.runtime.timestamp}-s3"
    with_run_identity(cfg, "20300102-030405")
    assert (cfg.runtime.timestamp, cfg.runtime.run_id) == ("20300102-030405", "run-20300102-030405-s3")
    monkeypatch.setenv("TRACKNET_TIMESTAMP", "20250102-030405")
    assert dry().runtime.run_id == "run-20250102-030405-s42"


@pytest.mark.parametrize("timestamp", ["yesterday", "20251302-030405", "20250102-030405\n", "../x"])
def test_a_wrong_timestamp_is_refused(timestamp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKNET_TIMESTAMP", timestamp)
    assert "TRACKNET_TIMESTAMP" in refusal()


# ---- rebuilding a run

NAMES = {"data_name": "demo", "model_name": "demo", "training_name": "demo"}


def test_a_saved_configuration_rebuilds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dry("training.optimizer.name=sgd", "training.tracking.project='1e5'", seed=9, output_dir=tmp_path / "out", **NAMES)
    OmegaConf.save(first, tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    again = saved_cfg("config.yaml", dry_run=True)
    with_run_identity(again, first.runtime.timestamp)
    assert again == first
    assert typed(again) == typed(first)


def test_overrides_seed_and_output_dir_apply_to_a_saved_configuration(tmp_path: Path) -> None:
    OmegaConf.save(dry(seed=9, output_dir=tmp_path / "out", **NAMES), tmp_path / "config.yaml")
    cfg = saved_cfg(tmp_path / "config.yaml", ["training.epochs=3"], seed=1, output_dir=tmp_path / "new", dry_run=True)
    assert (cfg.training.epochs, cfg.runtime.seed) == (3, 1)
    assert cfg.runtime.ckpt_dir == str(tmp_path / "new/checkpoints")


@pytest.mark.parametrize(
    "text", ["", "data: {}\n", "epochs: 3\n", "data: {}\nmodel: {}\ntraining: {}\n", "data: 3\nmodel: {}\ntraining: {}\n"]
)
def test_a_file_that_is_no_saved_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "config", text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        saved_cfg(path, dry_run=True)
    with pytest.raises(ConfigError, match="nowhere"):
        saved_cfg(tmp_path / "nowhere.yaml", dry_run=True)

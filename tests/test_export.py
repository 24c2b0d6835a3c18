"""Handing a model on: ONNX and torch.export files that compute what PyTorch does, whole or not there at all."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import real
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, data_config, unet, windows
from torch import Tensor

import tracknet.inference.export as export_module
from tracknet import BallTracker
from tracknet.errors import ConfigError, UserError
from tracknet.inference.export import ALLOWED_DIFFERENCE, export_model
from tracknet.inference.onnx_network import OnnxNetwork
from tracknet.models import TrackNetModel, build_model
from tracknet.scripts.export import main

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
# the family, T, background, normalisation, picture size, heatmap size; sides that the strides do not divide too
CASES = {
    "unet": ("unet", 3, True, True, (96, 64), (48, 32)),
    "unet-odd": ("unet", 1, False, False, (101, 57), (50, 28)),
    "vit": ("vit", 3, True, True, (84, 56), (42, 28)),
    "vit-odd": ("vit", 1, False, False, (101, 57), (48, 32)),
    "convnext": ("convnext", 3, True, True, (96, 64), (48, 32)),
    "convnext-odd": ("convnext", 1, False, False, (101, 57), (48, 32)),
}
QUICK = ()  # the U-Net is in other tests, of both formats
cases = pytest.mark.parametrize(
    ("case", "file_format"),
    [
        pytest.param(case, file_format, marks=[] if (case, file_format) in QUICK else [pytest.mark.slow])
        for case in CASES
        for file_format in FORMATS
    ],
)
formats = pytest.mark.parametrize("file_format", FORMATS)


def saved(case: str, folder: Path) -> Path:
    family, frames, background, normalize, input_wh, heatmap_wh = CASES[case]
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.heatmap.size = list(heatmap_wh)
    build_model(config, data_config(frames, background, normalize), input_wh).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("unet", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def onnx_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    export_model(checkpoint, folder, "onnx")
    return folder


def inputs(case: str, count: int) -> tuple[Tensor, Tensor | None]:
    _, frames, background, _, (width, height), _ = CASES[case]
    pictures, backgrounds = windows(count, frames, (height, width), seed=count)
    return pictures, backgrounds if background else None


def read_torch(folder: Path) -> torch.nn.Module:
    """As the script's help says."""
    return torch.export.load(folder / "model.pt2").module()


def assert_computes_the_same(case: str, checkpoint: Path, folder: Path, file_format: str) -> None:
    """For batch sizes that were not checked when it was written too."""
    model = TrackNetModel.from_pretrained(checkpoint)
    network = OnnxNetwork(folder) if file_format == "onnx" else read_torch(folder)
    for count in (1, 2, 3, 7):
        frames, background = inputs(case, count)
        with torch.no_grad():
            expected = model(frames, background)
        logits = network(frames) if background is None and file_format == "torch" else network(frames, background)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=ALLOWED_DIFFERENCE)


@cases
def test_every_network_computes_what_pytorch_does(case: str, file_format: str, tmp_path: Path) -> None:
    checkpoint = saved(case, tmp_path / "checkpoint")
    folder = tmp_path / "new" / "out"
    done = export_model(checkpoint, folder, file_format)
    assert done.file == folder / FORMATS[file_format]
    assert 0 <= done.largest_difference <= ALLOWED_DIFFERENCE
    assert os.listdir(tmp_path / "new") == ["out"]
    assert_computes_the_same(case, checkpoint, folder, file_format)


@formats
def test_the_script_says_the_difference_and_the_folder_what_it_holds(
    checkpoint: Path, file_format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "source")
    fields = json.loads(Path("source/config.json").read_text())
    fields["detection"] = {"threshold": 0.37, "protocol": "tracknetv2", "f1": 0.8, "games": ["game8"], "frames": 12, "step": 7}
    Path("source/config.json").write_text(json.dumps(fields))
    Path("source/README.md").write_text("# a card\n")
    assert main(["--checkpoint", "source", "--output", "out", *([] if file_format == "onnx" else ["--format", "torch"])]) == 0

    out, err = capfd.readouterr()
    record = json.loads(Path("out/export.json").read_text())
    file = Path("out", FORMATS[file_format])
    difference = f"{record['largest_difference']:.1e} (allowed 1e-04)"
    assert (out, err) == (f"{file}: largest difference of a logit from PyTorch {difference}\n", "")
    assert sorted(os.listdir()) == ["out", "source"]
    assert {path.name for path in Path("out").iterdir()} == {"config.json", "README.md", "export.json", file.name}
    assert json.loads(Path("out/config.json").read_text()) == fields
    assert Path("out/README.md").read_text() == "# a card\n"
    assert record["opset"] == (18 if file_format == "onnx" else None)
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["inputs"] == [
        {"name": "frames", "shape": ["batch", 3, 3, 64, 96], "dtype": "uint8"},
        {"name": "background", "shape": ["batch", 3, 64, 96], "dtype": "uint8"},
    ]
    assert record["outputs"] == [{"name": "logits", "shape": ["batch", 3, 32, 48], "dtype": "float32"}]
    content = file.read_bytes()
    assert str(Path(export_module.__file__).parents[2]).encode() not in content  # nothing of the machine that it was made on
    assert len(content) < 3 * Path("source/model.safetensors").stat().st_size + 100_000
    assert_computes_the_same("unet", Path("source"), Path("out"), file_format)


@pytest.mark.parametrize("file_format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_failed_check_leaves_nothing(
    checkpoint: Path, file_format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is of a network whose last bias is another by 1e-3."""
    trace = export_module._trace

    def trace_another(model: TrackNetModel) -> torch.export.ExportedProgram:
        other = TrackNetModel.from_pretrained(checkpoint).requires_grad_(False)
        other.network.head.bias += 1e-3
        return trace(other)

    monkeypatch.setattr(export_module, "_trace", trace_another)
    assert main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "new/out"), "--format", file_format]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "does not compute what PyTorch does (largest difference of a logit 1.0e-03, allowed 1e-04)" in err
    assert os.listdir(tmp_path) == []


def test_what_is_no_number_is_no_agreement(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors["network.head.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="largest difference of a logit nan"):
        export_model(tmp_path / "source", tmp_path / "out", "torch")
    assert os.listdir(tmp_path) == ["source"]


def test_group_norms_do_not_lose_small_variations() -> None:
    """PyTorch's GroupNorm of channels-last tensors is 0.14 off here."""
    layer = torch.nn.GroupNorm(8, 16)
    x = 1 + 0.01 * torch.randn(2, 16, 144, 256, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.group_norm(x.double(), 8)
    export_module._round_alike(layer)
    assert (layer(x.contiguous(memory_format=torch.channels_last)) - exact).abs().max() < 1e-4


def complaint(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line_and_makes_nothing(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def refused(source: Path, code: int = 2) -> str:
        return complaint(capfd, ["--checkpoint", str(source), "--output", str(out)], code)

    assert "has no config.json" in refused(tmp_path / "nowhere")
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(source) in refused(source)
    weights.unlink()
    assert "it needs model.safetensors" in refused(source)
    (source / "config.json").write_text('{"model_type": "dinov2"}')
    assert "model of type dinov2, not tracknet" in refused(source)
    assert "--checkpoint" in complaint(capfd, ["--output", str(out)], 2)
    assert "'tflite'" in complaint(capfd, ["--checkpoint", str(checkpoint), "--output", str(out), "--format", "tflite"], 2)
    assert "unrecognized" in complaint(capfd, ["--checkpoint", str(checkpoint), "--output", str(out), "--opset", "9"], 2)
    assert os.listdir(tmp_path) == ["source"]


def test_nothing_that_is_there_is_touched(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        err = complaint(capfd, ["--checkpoint", str(checkpoint), "--output", str(tmp_path / name)], 2)
        assert "is there already; name a new folder" in err
    assert "cannot be written" in complaint(capfd, ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "file/out")], 1)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


@pytest.mark.parametrize("file_format", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    file_format: str, small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = unet()
    config.backbone.channels = [16, 64, 96]
    build_model(config, data_config(), (96, 64)).save_pretrained(tmp_path / "large")
    arguments = ["--checkpoint", str(tmp_path / "large"), "--output", str(small_disk / "out"), "--format", file_format]
    assert (tmp_path / "large/model.safetensors").stat().st_size > 2**20
    assert "cannot be written (No space left on device)" in complaint(capfd, arguments, 1)
    assert os.listdir(small_disk) == []


def test_what_onnx_cannot_hold_is_refused(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "ONNX_LIMIT_BYTES", 10_000)
    err = complaint(capfd, ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")], 2)
    assert "use --format torch" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(
    package: str, checkpoint: Path, onnx_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    err = complaint(capfd, ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")], 1)
    assert package in err
    assert "pip install tracknet[onnx]" in err
    if package == "onnxruntime":
        with pytest.raises(UserError, match=r"onnxruntime is needed .*pip install tracknet\[onnx\]"):
            OnnxNetwork(onnx_folder)
    assert os.listdir(tmp_path) == []


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def test_a_damaged_or_foreign_file_is_one_line(
    checkpoint: Path, onnx_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(change: object, record: bool = False) -> str:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(onnx_folder, folder)
        if not record:
            (folder / "export.json").unlink()
        change(folder)  # type: ignore[operator]
        with pytest.raises(ConfigError) as caught:
            OnnxNetwork(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def rewrite(name: str, content: bytes) -> object:
        return lambda folder: (folder / name).write_bytes(content)

    def resize(**fields: object) -> object:
        config = json.loads((onnx_folder / "config.json").read_text())
        return rewrite("config.json", json.dumps({**config, **fields}).encode())

    whole = (onnx_folder / "model.onnx").read_bytes()
    for content in (b"", b"not a model", whole[: len(whole) // 2], whole[:-1000]):
        assert "is not a model that onnxruntime can run" in refused(rewrite("model.onnx", content))
    assert "has no model.onnx" in refused(lambda folder: (folder / "model.onnx").unlink())
    for fields in ({"frames": 2}, {"background": False}, {"input_size": [96, 60]}, {"heatmap_size": [24, 16]}):
        assert "is of another model than the config.json beside it" in refused(resize(**fields))
    for fields in ({"input_size": 5}, {"input_size": ["wide"]}, {"frames": 0}, {"input_size": [96]}, {"frames": None}):
        assert "export the checkpoint again" in refused(resize(**fields))
    assert "not readable JSON" in refused(rewrite("config.json", b"{"))
    assert "model of type dinov2" in refused(resize(model_type="dinov2"))
    assert "its SHA-256 differs" in refused(lambda folder: flip(folder / "model.onnx", len(whole) // 2), record=True)
    assert "export.json cannot be read" in refused(rewrite("export.json", b"[]"), record=True)
    assert capfd.readouterr() == ("", "")


def test_the_onnx_network_takes_what_the_model_takes(checkpoint: Path, onnx_folder: Path) -> None:
    network, model = OnnxNetwork(onnx_folder), TrackNetModel.from_pretrained(checkpoint)
    assert network.config.to_diff_dict() == model.config.to_diff_dict()
    frames, background = windows(2)
    far = frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # as pictures come: colours next to each other
    with torch.no_grad():
        torch.testing.assert_close(network(far, background, None), model(frames, background), rtol=0, atol=ALLOWED_DIFFERENCE)
    for given, words in (
        ((frames, None), "takes a background"),
        ((frames[:, :2], background), "frames must be uint8"),
        ((frames[..., :95], background), "frames must be uint8"),
        ((frames.float(), background), "frames must be uint8"),
        ((frames, background[:1]), "background must be uint8"),
    ):
        with pytest.raises(ValueError, match=words):
            network(*given)


def test_the_tracker_finds_the_same_with_onnx(checkpoint: Path, onnx_folder: Path, tmp_path: Path) -> None:
    """On real footage, row for row, with a threshold that parts the frames in two."""
    clip = real("tennis/clips/game8_Clip1.mp4")
    scores = np.sort(BallTracker.from_pretrained(checkpoint, device="cpu", trajectory=False).track(clip).score)
    middle = slice(len(scores) // 3, 2 * len(scores) // 3)
    gap = middle.start + int(np.diff(scores[middle]).argmax())
    threshold = float(scores[gap : gap + 2].mean())
    rows = {}
    for name, folder in {"torch": checkpoint, "onnx": onnx_folder}.items():
        track = BallTracker.from_pretrained(folder, device="cpu", threshold=threshold, trajectory=False).track(clip)
        track.write_csv(tmp_path / f"{name}.csv")
        rows[name] = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len(rows["onnx"]) == len(rows["torch"]) == len(scores)
    assert {row["visible"] for row in rows["torch"]} == {"0", "1"}
    for expected, found in zip(rows["torch"], rows["onnx"], strict=True):
        numbers = {name: (float(expected.pop(name) or 0), float(found.pop(name) or 0)) for name in ("x", "y", "score")}
        assert found == expected
        for name, (wanted, got) in numbers.items():
            assert abs(wanted - got) < (2e-5 if name == "score" else 1.01e-3), (name, wanted, got)


def test_without_memory_the_remedy_is_named(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = OnnxNetwork(onnx_folder)

    class Full:
        def run(self, *_: object) -> object:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 12")

    monkeypatch.setattr(network, "_session", Full())
    with pytest.raises(UserError, match="out of memory with one window in each thread; set OMP_NUM_THREADS"):
        network(*windows(2))


def test_help_shows_how_the_program_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert 'torch.export.load("NEWDIR/model.pt2").module()(frames, background)' in capsys.readouterr().out

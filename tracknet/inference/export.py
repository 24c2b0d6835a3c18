"""Hands a trained model on: one file that runs without this package, checked against PyTorch before it gets its name.

`model.onnx` runs in onnxruntime and others, and in `BallTracker` (see `onnx_network`). `model.pt2` is of `torch.export`; it is read by
`torch.export.load("FOLDER/model.pt2").module()(frames, background)`, on the CPU, and needs nothing but PyTorch.
"""

import io
import json
import logging
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tracknet.data.background import median_picture
from tracknet.data.synthetic.clip import make_clip
from tracknet.data.synthetic.venue import make_venue
from tracknet.errors import ConfigError, UserError, shown
from tracknet.inference.onnx_network import BATCH, NEEDS_ONNX, ONNX_NAME, RECORD_NAME, OnnxNetwork, input_shapes, output_shapes, sha256_of
from tracknet.models import TrackNetConfig, TrackNetModel
from tracknet.models.folder import CONFIG_NAME, read_model_config, weight_files

TORCH_NAME = "model.pt2"
CARD_NAME = "README.md"
ALLOWED_DIFFERENCE = 1e-4  # of the logits
BATCH_SIZES = (1, 2, 5)  # that are checked: the one that tracing likes to fix, the traced one, and another
OPSET = (
    18  # the exporter's own; of onnxruntime's GroupNorms, that of opset 21 rounds worse (3e-5 against 2e-5, on black 0.016 against 0.003)
)
ONNX_LIMIT_BYTES = 2_000_000_000  # a protobuf file ends at 2**31; the rest is for the graph
_CHATTY = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")  # loggers

Windows = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the model's.
        largest_difference: of a logit to PyTorch's, over all windows that were checked.
    """

    file: Path
    largest_difference: float


def export_model(checkpoint: Path, output: Path, file_format: str) -> Exported:
    """Writes a checkpoint's network as one file, with its configuration and card beside it, whole and checked or not at all.

    Args:
        checkpoint: folder with `config.json` and `model.safetensors`.
        output: folder to make.
        file_format: `onnx` or `torch`.

    Returns:
        The file and how far it is from PyTorch.

    Raises:
        ConfigError: the checkpoint cannot be loaded, the output is there already, or the model is too large for the format.
        UserError: a package is missing, the disk refuses, or the file does not compute what PyTorch does.
    """
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output {output} is there already; name a new folder")
    if file_format == "onnx":
        _require_onnx()
    model = _load(checkpoint)
    if file_format == "onnx" and (size := _byte_count(model)) > ONNX_LIMIT_BYTES:
        limit = f"{ONNX_LIMIT_BYTES / 1e9:.0f} GB"
        raise ConfigError(f"the weights have {size / 1e9:.1f} GB, but an ONNX file ends at {limit}; use --format torch")
    _round_alike(model)
    name, write, read = {"onnx": (ONNX_NAME, _write_onnx, _read_onnx), "torch": (TORCH_NAME, _write_torch, _read_torch)}[file_format]
    try:
        with _new_folder(output) as folder, _quiet():
            (folder / CONFIG_NAME).write_text(model.model_texts()[CONFIG_NAME], encoding="utf-8")
            if (checkpoint / CARD_NAME).is_file():
                shutil.copyfile(checkpoint / CARD_NAME, folder / CARD_NAME)
            write(_trace(model), folder / name)
            difference = largest_difference(model, read(folder / name))
            if not difference <= ALLOWED_DIFFERENCE:  # what is no number is no agreement either
                found = f"largest difference of a logit {difference:.1e}, allowed {ALLOWED_DIFFERENCE:.0e}"
                raise UserError(f"{output} is not written: {name} does not compute what PyTorch does ({found})")
            record = _record(model.config, folder / name, difference)
            (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror or error})") from error
    return Exported(output / name, difference)


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"{package} is needed for --format onnx ({error}): {NEEDS_ONNX}") from error


def _load(checkpoint: Path) -> TrackNetModel:
    """The checkpoint's model in float32, ready to be run."""
    model_type = read_model_config(checkpoint)["model_type"]
    if model_type != TrackNetConfig.model_type:
        raise ConfigError(f"{checkpoint} holds a model of type {shown(model_type)}, not {TrackNetConfig.model_type}")
    weight_files(checkpoint)  # names what is missing; transformers would look for it on the hub
    model: TrackNetModel = TrackNetModel.from_pretrained(checkpoint, dtype=torch.float32)
    model.requires_grad_(False)
    return model


def _byte_count(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _round_alike(model: nn.Module) -> None:
    """Lets GroupNorm read its input channel by channel, in what is traced and in what that is compared with.

    On the CPU, PyTorch's GroupNorm of channels-last tensors sums squares before it subtracts the mean. In a trained U-Net that alone
    moved logits by 1.1e-4 on a rally and by 0.11 on a black picture from what float64 gives; like this they were 5e-6 and 6e-6 away.
    """
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def _trace(model: TrackNetModel) -> ExportedProgram:
    """The network as a program for any number of windows of the size that it was trained for."""
    shapes = input_shapes(model.config)
    pictures = tuple(torch.zeros([2, *shape[1:]], dtype=torch.uint8) for shape in shapes.values())  # type: ignore[list-item]
    traced = torch.export.export(model, pictures, dynamic_shapes=_any_batch(model.config))
    # `torch.export.load` refuses the region without autocast that stays in a program as it was traced (torch 2.15)
    program: ExportedProgram = traced.run_decompositions({})
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    program.example_inputs = None  # pictures that would only make the file larger
    return program


def _any_batch(config: TrackNetConfig) -> tuple[dict[int, Dim], ...]:
    batch = Dim(BATCH, min=1)
    return tuple({0: batch} for _ in input_shapes(config))


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    names = ["frames", "background"][: len(program.graph_signature.user_inputs)]
    written: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=tuple({0: BATCH} for _ in names),
    )
    written.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor, Tensor | None], Tensor]:
    return OnnxNetwork(path.parent)


def _write_torch(program: ExportedProgram, path: Path) -> None:
    content = io.BytesIO()  # written to the disk by itself, PyTorch would tell of a full one as of a bug
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _read_torch(path: Path) -> Callable[[Tensor, Tensor | None], Tensor]:
    module = torch.export.load(path).module()
    return lambda frames, background: module(frames) if background is None else module(frames, background)


@torch.no_grad()
def largest_difference(model: TrackNetModel, network: Callable[[Tensor, Tensor | None], Tensor]) -> float:
    """The largest difference of a logit between a model and what was made of it, over `BATCH_SIZES` of noise and of a drawn rally.

    Args:
        model: on the CPU, in evaluation mode.
        network: called with frames and background; gives float32 logits.

    Returns:
        The difference; not a number where either gives such.
    """
    differences = []
    for windows in (_noise(model.config, max(BATCH_SIZES)), _rally(model.config, max(BATCH_SIZES))):
        for count in BATCH_SIZES:
            frames, background = (None if pictures is None else pictures[:count] for pictures in windows)
            assert frames is not None
            logits, expected = network(frames, background), model(frames, background)
            if logits.shape != expected.shape or logits.dtype != expected.dtype:
                raise UserError(f"the exported network gives {logits.dtype} {list(logits.shape)} for {count} windows")
            differences.append((logits - expected).abs().max())
    return float(torch.stack(differences).max())


def _noise(config: TrackNetConfig, count: int) -> Windows:
    generator = torch.Generator().manual_seed(0)
    pictures = [
        torch.randint(0, 256, [count, *shape[1:]], dtype=torch.uint8, generator=generator)  # type: ignore[list-item]
        for shape in input_shapes(config).values()
    ]
    return pictures[0], pictures[1] if config.background else None


def _rally(config: TrackNetConfig, count: int) -> Windows:
    """Consecutive windows of one drawn clip."""
    rng = np.random.default_rng(0)
    width, height = config.input_size
    clip = make_clip(rng, make_venue(rng, (width, height)), count * config.frames)
    pictures = np.stack([clip.draw(number)[0] for number in range(count * config.frames)])
    frames = torch.from_numpy(pictures).permute(0, 3, 1, 2).reshape(count, config.frames, 3, height, width)
    background = torch.from_numpy(median_picture(pictures)).permute(2, 0, 1).expand(count, 3, height, width)
    return frames, background if config.background else None


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that gets this name at the end; where anything fails, nothing is left."""
    missing = [parent for parent in path.parents if not parent.exists()]
    folder = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporters neither log nor warn; what matters is raised, and the result is checked."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _record(config: TrackNetConfig, file: Path, difference: float) -> dict[str, Any]:
    is_onnx = file.name == ONNX_NAME
    packages = ["tracknet", "torch", "transformers", *(["onnx", "onnxscript", "onnxruntime"] if is_onnx else [])]
    return {
        "file": file.name,
        "sha256": sha256_of(file),
        "opset": OPSET if is_onnx else None,
        "versions": {name: _version(name) for name in packages},
        "largest_difference": difference,
        "allowed_difference": ALLOWED_DIFFERENCE,
        "checked_batch_sizes": list(BATCH_SIZES),
        "inputs": [{"name": name, "shape": shape, "dtype": "uint8"} for name, shape in input_shapes(config).items()],
        "outputs": [{"name": name, "shape": shape, "dtype": "float32"} for name, shape in output_shapes(config).items()],
    }


def _version(package: str) -> str | None:
    """None where the package runs from a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

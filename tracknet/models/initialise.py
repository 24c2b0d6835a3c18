"""Fine-tuning: `training.init_from` puts a saved model folder's weights into a new run's model."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tracknet.errors import ConfigError
from tracknet.models.configuration import TrackNetConfig
from tracknet.models.folder import read_model_config, tensor_shapes, weight_files
from tracknet.models.model import TrackNetModel

# Fields of config.json that must be equal, with the keys that set them.
SAME_FIELDS = {
    "architecture": "--model",
    "frames": "data.sequence.length",
    "background": "data.background",
    "normalize": "data.preprocess.normalize",
}


def check_init_from(folder: Path | str) -> None:
    """Whether a folder holds a saved model at all; cheap, and before there is a model to compare with.

    Raises:
        ConfigError: no such folder, no tracknet model in it, or no readable weights; names training.init_from.
    """
    folder = Path(folder).expanduser()
    try:
        _saved_config(folder)
        tensor_shapes(weight_files(folder))
    except ConfigError as error:
        raise ConfigError(f"training.init_from={folder}: {error}") from error


def load_weights_from(model: TrackNetModel, folder: Path | str) -> None:
    """Copies all weights of a saved model into `model`; sizes of the picture and of the heatmap may differ.

    Args:
        model: of the new run; unchanged where an error is raised.
        folder: with `config.json` and `model.safetensors`, as `save_pretrained` leaves it.

    Raises:
        ConfigError: names training.init_from and the first thing that does not fit.
    """
    folder = Path(folder).expanduser()
    try:
        _check_config(model, folder)
        files = weight_files(folder)
        _check_tensors(model, tensor_shapes(files))
    except ConfigError as error:
        raise ConfigError(f"training.init_from={folder}: {error}") from error
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    model.load_state_dict(tensors)


def _saved_config(folder: Path) -> dict[str, Any]:
    """The fields of a saved tracknet model's `config.json`."""
    if not folder.is_dir():
        raise ConfigError("there is no such folder")
    saved = read_model_config(folder)
    if saved["model_type"] != TrackNetConfig.model_type:
        raise ConfigError(
            f"it holds a {saved['model_type']}, not a trained tracknet model; pretrained backbones go into model.pretrained_model_name"
        )
    return saved


def _check_config(model: TrackNetModel, folder: Path) -> None:
    saved = _saved_config(folder)
    for field, key in SAME_FIELDS.items():
        wanted = getattr(model.config, field)
        if field not in saved or saved[field] != wanted:
            given = saved.get(field, "missing")
            raise ConfigError(f"its {field} is {given}, this run's is {wanted}; change {key} or choose another folder")


def _check_tensors(model: TrackNetModel, saved: dict[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved:
            raise ConfigError(f"it lacks the tensor {name} of this run's network; make the section model equal to its own")
        if name not in wanted:
            raise ConfigError(f"its tensor {name} has no place in this run's network; make the section model equal to its own")
        if saved[name] != wanted[name]:
            raise ConfigError(
                f"its tensor {name} has the shape {list(saved[name])}, this run's network wants {list(wanted[name])};"
                " make the section model equal to its own"
            )

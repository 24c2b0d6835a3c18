"""What single keys cannot say about themselves: settings that contradict each other or that training cannot honour."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from tracknet.errors import ConfigError
from tracknet.schema.data import DataConfig, SplitConfig
from tracknet.schema.model import ConvNextFpnHeatmapConfig, ModelConfig, UnetHeatmapConfig, VitHeatmapConfig
from tracknet.schema.root import Config
from tracknet.schema.training import SgdConfig, TrainingConfig

SIDES = ("train_games", "val_games", "test_games")


def check_config(config: Config) -> None:
    """Refuses the first contradiction.

    Raises:
        ConfigError: names the keys and what to change.
    """
    for message in _contradictions(config):
        raise ConfigError(message)


def _contradictions(config: Config) -> Iterator[str]:
    yield from _source(config.data)
    yield from _split(config.data.split)
    yield from _augment(config.data)
    if config.data.preprocess.resize is not None:  # null: the clips decide, and `check_sizes` is called when they are known
        yield from size_contradictions(config.data.preprocess.resize, config.data.augment.crop, config.model.heatmap.size)
    yield from _model(config.model)
    yield from _precision(config.training)
    yield from _optimization(config.training)
    yield from _micro_batch(config.training)


def check_scored_data(data: DataConfig) -> None:
    """Refuses what an evaluation cannot honour in `data`, where the sides that it does not score may be empty.

    Raises:
        ConfigError: names the keys and what to change.
    """
    for message in (*_source(data), *_names(data.split)):
        raise ConfigError(message)


def _source(data: DataConfig) -> Iterator[str]:
    if data.root is None and data.synthetic is None:
        yield "data.root is null; give the folder that holds the games, or choose --data demo, which draws its own"
    if data.root is not None and data.synthetic is not None:
        yield f"data.root={data.root} and data.synthetic exclude each other; set data.synthetic=null, or data.root=null"
    if data.root == "":
        yield "data.root is empty; give the folder that holds the games"


def _split(split: SplitConfig) -> Iterator[str]:
    for side in ("train_games", "val_games"):
        if not getattr(split, side):
            yield f"data.split.{side} is empty; name at least one game folder"
    yield from _names(split)


def _names(split: SplitConfig) -> Iterator[str]:
    for side in SIDES:
        games = getattr(split, side)
        for game in games:
            if Path(game).name != game or game in ("", ".", ".."):
                yield f"data.split.{side} has {game!r}, which is no folder's name; write the name alone, such as game1"
        twice = sorted({game for game in games if games.count(game) > 1})
        if twice:
            yield f"data.split.{side} names {', '.join(twice)} more than once"
    for one, other in combinations(SIDES, 2):
        both = sorted(set(getattr(split, one)) & set(getattr(split, other)))
        if both:
            yield f"data.split: {', '.join(both)} stands in {one} and in {other}; a game belongs to one side only"


def _augment(data: DataConfig) -> Iterator[str]:
    smallest, largest = data.augment.scale
    if smallest > largest:
        yield f"data.augment.scale is [{smallest:g}, {largest:g}]; the first is the smallest factor, the second the largest"


def size_contradictions(input_wh: Sequence[int], crop: Sequence[int] | None, heatmap_size: Sequence[int]) -> Iterator[str]:
    """What is wrong between the sizes, one message each; nothing if they go together.

    Args:
        input_wh: (width, height) of the picture that the network is given, in input px: `preprocess.resize`, else the clips' size.
        crop: (width, height) of `augment.crop` in input px; it lies in the picture and holds whole heatmap cells. None: no crop.
        heatmap_size: (width, height) of `heatmap.size`, which belongs to the whole picture and is not larger than it.
    """
    picture = f"the input picture of {input_wh[0]} x {input_wh[1]} px (data.preprocess.resize; null: the clips' own size)"
    for axis, name in enumerate(("width", "height")):
        if heatmap_size[axis] > input_wh[axis]:
            yield f"model.heatmap.size={list(heatmap_size)} is larger than {picture}; lower its {name} to {input_wh[axis]} or less"
        if crop is None:
            continue
        if crop[axis] > input_wh[axis]:
            yield f"data.augment.crop={list(crop)} does not fit into {picture}; lower its {name} to {input_wh[axis]} or less"
        elif crop[axis] * heatmap_size[axis] % input_wh[axis]:
            cells = crop[axis] * heatmap_size[axis] / input_wh[axis]
            yield (
                f"data.augment.crop={list(crop)} has a {name} of {cells:g} heatmap cells, not a whole number;"
                f" change it, model.heatmap.size={list(heatmap_size)} or {picture}"
            )


def check_sizes(data: DataConfig, model: ModelConfig, input_wh: tuple[int, int]) -> None:
    """Refuses a crop or heatmap that does not go with the pictures; for when the clips have told their size.

    Args:
        data: for `augment.crop`.
        model: for `heatmap.size`.
        input_wh: (width, height) of the network's input picture, in input px.

    Raises:
        ConfigError: names the keys and what to change.
    """
    for message in size_contradictions(input_wh, data.augment.crop, model.heatmap.size):
        raise ConfigError(message)


def _model(model: ModelConfig) -> Iterator[str]:
    match model:
        case UnetHeatmapConfig():
            if model.pretrained_model_name is not None:
                yield (
                    f"model.pretrained_model_name={model.pretrained_model_name}: unet_heatmap has no pretrained weights; set it to null"
                    " (training.init_from starts from a model trained here)"
                )
            return
        case VitHeatmapConfig(backbone=vit):
            if model.pretrained_model_name is None and vit.hidden_size % vit.num_heads:
                yield f"model.backbone.hidden_size={vit.hidden_size} is no multiple of model.backbone.num_heads={vit.num_heads}"
        case ConvNextFpnHeatmapConfig(backbone=convnext):
            if convnext.return_stages != sorted(set(convnext.return_stages)):
                yield f"model.backbone.return_stages={convnext.return_stages} must rise, each stage once, such as [1, 2, 3, 4]"
    if model.backbone.device_map is not None:
        yield (
            f"model.backbone.device_map={model.backbone.device_map} is refused: training places one whole copy of the model"
            " on each process's device; set it to null"
        )


def _precision(training: TrainingConfig) -> Iterator[str]:
    if training.precision == "fp32" and training.amp:
        yield "training.precision=fp32 contradicts training.amp=true; set training.precision=auto, fp16 or bf16, or training.amp=false"


def _optimization(training: TrainingConfig) -> Iterator[str]:
    bound, other = training.grad_clip, training.grad_clip_norm
    if bound > 0 and other > 0 and bound != other:
        yield f"training.grad_clip={bound:g} and training.grad_clip_norm={other:g} name one bound; set one of them to 0"
    optimizer = training.optimizer
    if isinstance(optimizer, SgdConfig) and optimizer.nesterov and optimizer.momentum == 0:
        yield "training.optimizer.nesterov=true needs training.optimizer.momentum above 0"
    warmup = training.scheduler.warmup_epochs
    if training.max_steps == 0 and warmup > training.epochs:
        yield f"training.scheduler.warmup_epochs={warmup:g} is longer than training.epochs={training.epochs}"


def _micro_batch(training: TrainingConfig) -> Iterator[str]:
    size, batch, smallest = training.micro_batch_size, training.batch_size, training.min_micro_batch_size
    if size > batch:
        yield f"training.micro_batch_size={size} is above training.batch_size={batch}; lower it, or set 0 to start from the whole batch"
    start, name = (size, "micro_batch_size") if size > 0 else (batch, "batch_size")
    if smallest > start:
        yield f"training.min_micro_batch_size={smallest} is above training.{name}={start}, the size that a step starts with; lower it"

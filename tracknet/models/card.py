"""The model card of a saved folder: its `README.md`, which the Hugging Face hub shows. It says nothing that `config.json` does not."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tracknet.models.configuration import TrackNetConfig

CARD_NAME = "README.md"

CODE_LICENCE = "Apache-2.0"  # LICENSE

# What the hub calls the licences that this program's own goes together with: weights from data and a backbone of these are under it.
_PERMISSIVE = frozenset({"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"})

# Weights of the backbones' authors: how their names on the hub begin, their licence, and where that stands.
_BACKBONE_LICENCES = {
    "google/vit-": ("Apache-2.0", "the models' cards"),
    "facebook/dinov2-": ("Apache-2.0", "facebookresearch/dinov2 LICENSE"),
    "facebook/dinov3-": ("DINOv3 License", "facebookresearch/dinov3 LICENSE.md; access is asked for on the hub"),
    "facebook/convnext-": ("Apache-2.0", "the models' cards"),
    "facebook/convnextv2-": ("CC-BY-NC-4.0", "facebookresearch/ConvNeXt-V2 README.md; not for commercial use"),
}

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # anything else may be a path on the machine that trained

_TEXT = """---
{front}
---

# TrackNet {architecture}

Finds the ball in sports video: {frames} in, a heatmap of the ball for each of them out, at {width} x {height} px{background}.

## How to use it

```python
from tracknet import BallTracker

track = BallTracker.from_pretrained("path/to/this/folder").track("rally.mp4")
```

```bash
python -m tracknet.scripts.predict --checkpoint path/to/this/folder rally.mp4 --overlay
```

## Training

{training}

## Score and detection threshold

{score}

## Licences

- Code: {code_licence}.
{data_licences}
- Backbone: {backbone_licence}
"""


def model_card(config: TrackNetConfig) -> str:
    """The text of `README.md`: YAML front matter as the hub reads it, then Markdown. The same configuration gives the same text."""
    width, height = config.input_size
    return _TEXT.format(
        front=_front_matter(config).to_yaml().strip(),
        architecture=config.architecture,
        frames="one frame" if config.frames == 1 else f"{config.frames} neighbouring frames",
        width=width,
        height=height,
        background=", with the difference to the clip's median picture" if config.background else "",
        training=_training(config),
        score=_score(config),
        code_licence=CODE_LICENCE,
        data_licences=_data_licences(config),
        backbone_licence=_backbone_licence(config),
    )


def _front_matter(config: TrackNetConfig) -> ModelCardData:
    licence = _weights_licence(config)
    return ModelCardData(
        license=licence,
        license_name=None if licence != "other" else "see-this-card",
        license_link=None if licence != "other" else CARD_NAME,
        library_name="tracknet",
        pipeline_tag="object-detection",
        tags=["tracknet", "ball-tracking", "sports", "video", config.architecture],
        base_model=config.pretrained if config.pretrained and _HUB_NAME.fullmatch(config.pretrained) else None,
        metrics=["f1"],
        model_name=f"tracknet-{config.architecture}",
        eval_results=_results(config),
    )


def _results(config: TrackNetConfig) -> list[EvalResult] | None:
    """The validation score, where it is that of these very weights."""
    chosen, origin = config.detection, config.trained_on
    if chosen is None or origin is None or chosen["step"] != origin["step"]:
        return None
    return [
        EvalResult(
            task_type="object-detection",
            task_name="Ball detection",
            dataset_type=origin["data"],
            dataset_name=f"{origin['data']}: {', '.join(chosen['games'])}",
            dataset_split="validation",
            metric_type="f1",
            metric_name=f"F1, protocol {chosen['protocol']}, threshold {chosen['threshold']:g} chosen on these games",
            metric_value=round(chosen["f1"], 4),
        )
    ]


def _training(config: TrackNetConfig) -> str:
    origin = config.trained_on
    if origin is None:
        return "What it was trained on is not on record."
    return "\n".join(
        [
            f"Data {_code(origin['data'])}, {origin['step']} updates.\n",
            f"- Trained on: {_listed(origin['train_games'])}.",
            f"- Validated on: {_listed(origin['val_games'])}.",
            *(f"- Its weights started from others. {_start(start)}" for start in _starts(config)),
        ]
    )


def _starts(config: TrackNetConfig) -> list[dict[str, Any] | None]:
    """What the weights go back to, the oldest first; None for what is not on record."""
    return (config.trained_on or {}).get("started_from") or []  # older folders have none


def _start(start: dict[str, Any] | None) -> str:
    if start is None:
        return "What those were trained on is not on record."
    games = f"trained on {_listed(start['train_games'])}, validated on {_listed(start['val_games'])}"
    return f"Those had seen the data {_code(start['data'])}: {games}."


def _score(config: TrackNetConfig) -> str:
    chosen, origin = config.detection, config.trained_on
    if chosen is None:
        return "No threshold was chosen: no evaluation has found a ball, or there was none. Predictions then use 0.5."
    text = (
        f"F1 {chosen['f1']:.4f} at a detection threshold of {chosen['threshold']:g}, by the protocol {_code(chosen['protocol'])}, on"
        f" {chosen['frames']} labelled frames of the validation games {_listed(chosen['games'])}.\n\n"
        "The threshold is the one of 0.01, 0.02 ... 0.99 with the best F1 in the evaluation after"
        f" {chosen['step']} updates.\nThe score is on the games that chose the threshold, and on which training chooses its best"
        " checkpoint, so other footage may score lower."
    )
    if origin is not None and origin["step"] != chosen["step"]:
        text += f"\n\nThese weights have {origin['step']} updates and were not evaluated themselves."
    return text


def _weights_licence(config: TrackNetConfig) -> str:
    """As the hub names it: this program's, where all data and the backbone are known to allow that."""
    licences = [data["licence"] if data else None for data in (*_starts(config), config.trained_on)]
    licences.append(CODE_LICENCE if config.pretrained is None else _known_backbone(config.pretrained)[0])
    return CODE_LICENCE.lower() if all(licence and licence.lower() in _PERMISSIVE for licence in licences) else "other"


def _data_licences(config: TrackNetConfig) -> str:
    """A line for the data of the last run, and one for each other that the weights go back to."""
    lines = [f"- Training data: {_data_licence(config.trained_on)}"]
    lines += [f"- Training data of the weights it started from: {_data_licence(start)}" for start in _starts(config)]
    return "\n".join(lines)


def _data_licence(data: dict[str, Any] | None) -> str:
    if data is None:
        return "not on record."
    name = _code(data["data"])
    if data["licence"]:
        return f"{_escaped(data['licence'])} ({name})."
    return f"none is on record for {name}; ask its authors before you use these weights."


def _backbone_licence(config: TrackNetConfig) -> str:
    if config.pretrained is None:
        if None in _starts(config):
            return "not on record."
        return "trained from random weights, so none beside the above."
    name = _code(config.pretrained)
    licence, source = _known_backbone(config.pretrained)
    if licence is None:
        return f"it started from the weights of {name}; see the card of {name}."
    return f"it started from the weights of {name}, {licence} ({source})."


def _known_backbone(name: str) -> tuple[str | None, str]:
    """The licence of a backbone's weights and where it stands; none for those that their authors' names do not tell."""
    found = [entry for beginning, entry in _BACKBONE_LICENCES.items() if name.startswith(beginning)]
    return found[0] if found else (None, "")


def _listed(games: list[str]) -> str:
    return ", ".join(map(_escaped, games))


def _escaped(text: str) -> str:
    """Text as Markdown that shows it: no link, picture, HTML or emphasis comes of it. It holds no line break (`is_name`)."""
    return re.sub(r"([\\`*_\[\]<>&~|$])", r"\\\1", text)


def _code(text: str) -> str:
    """Text as Markdown that shows it as code, between more backticks than stand in it."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if len(fence) > 1 or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"

"""One self-contained HTML page from a run's history and, where there is one, its evaluation."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray

from tracknet.report.charts import ErrorMap, error_map, line_chart
from tracknet.report.gallery import WHY, Mistake
from tracknet.report.history import RunHistory, Series

JPEG_QUALITY = 85
TRAINING_PROTOCOLS_SHOWN = ("tracknetv2", "wasb")  # those that training logs


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        title: what a reader without pictures is told.
        data_uri: the whole picture.
    """

    title: str
    data_uri: str


@dataclass(frozen=True)
class Gallery:
    """The worst frames of one kind.

    Attributes:
        kind: FP1, FP2 or FN.
        count: of all such frames, not only those shown.
        mistakes: the worst first.
    """

    kind: str
    count: int
    mistakes: Sequence[Mistake]


@dataclass(frozen=True)
class Evaluation:
    """What the page shows of an evaluation.

    Attributes:
        scores: the content of `scores.json`.
        galleries: of the worst frames; empty where the data is gone.
        maps: of the errors, game by game; empty where the data is gone.
        about: which checkpoint, games and threshold.
    """

    scores: Mapping[str, Any]
    galleries: Sequence[Gallery]
    maps: Sequence[ErrorMap]
    about: str


def render_page(history: RunHistory, evaluation: Evaluation | None, notes: Sequence[str]) -> str:
    """The page's HTML.

    Args:
        history: of the run.
        evaluation: of one of its checkpoints; None leaves scores and gallery out.
        notes: what the reader must know, such as why something is left out.
    """
    launches = history.info["launches"]
    torn = [f"{history.torn_lines} lines of metrics.jsonl were torn and are left out."] if history.torn_lines else []
    template = Environment(autoescape=True).from_string(files("tracknet.report").joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=f"TrackNet: {history.path.name}",
        status=_status(launches),
        facts=_facts(history),
        notes=[*notes, *torn],
        charts=_training_charts(history),
        overview=None if evaluation is None else _overview(evaluation.scores),
        tables=[] if evaluation is None else list(_tables(evaluation.scores)),
        scores_about="" if evaluation is None else evaluation.about,
        maps=[] if evaluation is None else [Picture(f"errors in {errors.game}", _svg_uri(error_map(errors))) for errors in evaluation.maps],
        galleries=[] if evaluation is None else [_gallery(gallery) for gallery in evaluation.galleries if gallery.mistakes],
        made_by=_made_by(launches),
        command=launches[-1]["command"] if launches else "",
        config_yaml=history.config_yaml,
    )


def _status(launches: Sequence[Mapping[str, Any]]) -> str:
    if not launches:
        return "run.json is missing: how the run was started and how it ended is not known."
    last = launches[-1]
    begun = datetime.fromisoformat(launches[0]["started"]).strftime("%Y-%m-%d %H:%M")
    ending = last.get("exit")
    told = "still going on, or killed without a word" if ending is None else f"{ending['message']} (exit code {ending['code']})"
    times = "" if len(launches) == 1 else f", {len(launches)} launches"
    return f"Begun {begun}{times}; {told}."


def _facts(history: RunHistory) -> list[tuple[str, str]]:
    facts = [("steps", f"{history.rows[-1]['step']:,}")]
    for protocol in TRAINING_PROTOCOLS_SHOWN:
        series = history.series(f"val/f1_{protocol}")
        if len(series):
            facts.append((f"F1 {protocol}, last step", f"{series.value[-1]:.3f}"))
            best = int(series.value.argmax())
            facts.append((f"F1 {protocol}, highest", f"{series.value[best]:.3f} (step {series.step[best]:,})"))
    speed, memory = history.series("train/samples_per_s"), history.series("train/peak_memory_gb")
    if len(speed):
        facts.append(("samples/s, median", f"{np.median(speed.value):.0f}"))
    if len(memory):
        facts.append(("peak memory", f"{memory.value.max():.2f} GB"))
    retries = history.series("train/oom_retries")
    facts.append(("out-of-memory retries", f"{int(retries.value.sum())}"))
    if history.info["launches"]:
        last = history.info["launches"][-1]
        facts.append(("processes", f"{last['world_size']} on {last['device']}"))
    return facts


def _made_by(launches: Sequence[Mapping[str, Any]]) -> str:
    if not launches:
        return "run.json is missing."
    last, git = launches[-1], launches[-1].get("git")
    commit = f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    return f"Python {last['python']}, {versions}{commit}. The last launch:"


def _training_charts(history: RunHistory) -> list[Picture]:
    """The curves, each where the run has logged it."""

    def lines(names: Mapping[str, str]) -> dict[str, Series]:
        found = {label: history.series(name) for label, name in names.items()}
        return {label: series for label, series in found.items() if len(series)}

    def by_game(protocol: str) -> dict[str, str]:
        suffix = f"/f1_{protocol}"
        return {name[len("val/") : -len(suffix)]: name for name in history.names("val/") if name.endswith(suffix) and name.count("/") == 2}

    charts: list[tuple[str, dict[str, str], dict[str, bool]]] = [
        ("Training loss", {"loss": "train/loss"}, {"log_scale": True}),
        ("Validation F1", {name: f"val/f1_{name}" for name in TRAINING_PROTOCOLS_SHOWN}, {}),
        ("Validation F1 by game (tracknetv2)", by_game("tracknetv2"), {}),
        ("Learning rate", {"lr": "train/lr"}, {"from_zero": True}),
        ("Gradient norm", {"norm": "train/grad_norm"}, {"log_scale": True}),
        ("Throughput, samples/s", {"samples/s": "train/samples_per_s"}, {"from_zero": True}),
        ("Peak memory, GB", {"GB": "train/peak_memory_gb"}, {"from_zero": True}),
        ("Micro-batch size, windows", {"windows": "train/micro_batch_size"}, {"from_zero": True, "steps": True}),
        ("Out-of-memory retries", {"retries": "train/oom_retries"}, {"from_zero": True, "steps": True}),
    ]
    drawn = [(title, lines(names), options) for title, names, options in charts]
    return [Picture(title, _svg_uri(line_chart(title, found, **options))) for title, found, options in drawn if found]


def _overview(scores: Mapping[str, Any]) -> dict[str, Any]:
    """F1 under each protocol, over all games and in each."""
    games = list(scores["games"])
    rows = []
    for name, result in scores["protocols"].items():
        whole = result["all"]
        found = [result["games"][game]["f1"] if game in result["games"] else None for game in games]
        rows.append([name, _f1(whole), *(_fraction(f1) for f1 in found)])
    return {"columns": ["F1", "all (95 %)", *games], "rows": rows}


def _tables(scores: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """One table for each protocol: all games, then each by itself."""
    for name, result in scores["protocols"].items():
        rows = [_score_row("all", result["all"]), *(_score_row(game, block) for game, block in result["games"].items())]
        columns = ["", "F1 (95 %)", "precision", "recall", "AP", "error px", "TP", "FP1", "FP2", "TN", "FN"]
        yield {"title": name, "about": _rule(result["declaration"]), "columns": columns, "rows": rows}


def _rule(declaration: Mapping[str, Any]) -> str:
    """A protocol in words."""
    limit = f"{'below' if declaration['strict'] else 'at most'} {declaration['distance_px']:g} px"
    size = declaration["size_wh"]
    where = "in the original picture" if size is None else f"at {size[0]}x{size[1]}"
    numbers = " between integers" if declaration["truncate"] else ""
    hidden = declaration["occluded_distance_px"]
    more = [
        f"visibility {', '.join(map(str, declaration['ball']))} is a ball",
        *([] if hidden is None else [f"at most {hidden:g} px where it is occluded"]),
        *(["recall counts FP1 as missed"] if declaration["fp1_in_recall"] else []),
        *(["each frame as often as windows hold it"] if declaration["window"] > 1 else []),
    ]
    return f"{limit}{numbers} {where}; {'; '.join(more)}. Read in {declaration['source']}."


def _score_row(name: str, block: Mapping[str, Any]) -> list[str]:
    error = (block["error_px"] or {}).get("median")
    rates = [_fraction(block[key]) for key in ("precision", "recall", "ap")]
    return [name, _f1(block), *rates, "" if error is None else f"{error:.1f}"] + [
        f"{block[key]:,}" for key in ("tp", "fp1", "fp2", "tn", "fn")
    ]


def _f1(block: Mapping[str, Any]) -> str:
    interval = block["intervals"]["f1"]
    return _fraction(block["f1"]) + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _fraction(value: float | None) -> str:
    """Nothing where no frame counts."""
    return "" if value is None else f"{value:.3f}"


def _gallery(gallery: Gallery) -> dict[str, Any]:
    frames = [Picture(mistake.caption, _jpeg_uri(mistake.picture)) for mistake in gallery.mistakes]
    return {"kind": gallery.kind, "count": gallery.count, "why": WHY[gallery.kind], "frames": frames}


def _svg_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _jpeg_uri(picture: NDArray[np.uint8]) -> str:
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"

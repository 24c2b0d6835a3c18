"""Where the weights of a run come from: what the `config.json` and the card of each of its checkpoints tell of it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracknet.errors import ConfigError
from tracknet.models.configuration import check_past, is_name
from tracknet.models.folder import read_model_config
from tracknet.schema.root import Config

log = logging.getLogger("tracknet")


@dataclass(frozen=True)
class Provenance:
    """Two fields of `TrackNetConfig`.

    Attributes:
        pretrained: the model whose weights the backbone started from.
        trained_on: the data, and what the weights started from.
    """

    pretrained: str | None
    trained_on: dict[str, Any] | None


def read_provenance(folder: Path) -> Provenance:
    """What a saved model's folder tells of it.

    Raises:
        ConfigError: its `config.json` cannot be read, or tells something else there.
    """
    fields = read_model_config(folder)
    provenance = Provenance(fields.get("pretrained"), fields.get("trained_on"))
    try:
        check_past(provenance.pretrained, provenance.trained_on)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    return provenance


def provenance_of(config: Config, pretrained: str | None, starts_from: Path | None) -> Provenance:
    """That of a new run.

    Args:
        config: of the run.
        pretrained: the model whose weights its backbone has.
        starts_from: the folder whose weights then take the place of all others; None where there is none.

    Raises:
        ConfigError: a name that cannot stand in a card, or as `read_provenance`.
    """
    data = config.data
    own = {
        "data": config.runtime.data_name,
        "licence": data.licence,
        "train_games": list(data.split.train_games),
        "val_games": list(data.split.val_games),
    }
    names = [("--data", own["data"]), ("data.licence", data.licence or "")]
    names += [("data.split", game) for game in (*data.split.train_games, *data.split.val_games)]
    for key, name in names:
        if not is_name(name):
            raise ConfigError(f"{key}: {name!a} holds a control character, which cannot stand in the card of a model; rename it")
    starts: list[dict[str, Any] | None] = []
    if starts_from is not None:
        start = read_provenance(starts_from)
        pretrained, starts = start.pretrained, _starts_after(start)
    return Provenance(pretrained, own | {"started_from": starts, "step": 0})


def _starts_after(start: Provenance) -> list[dict[str, Any] | None]:
    """What a run that starts from these weights goes back to, the oldest first."""
    if start.trained_on is None:
        return [None]
    earlier = start.trained_on.get("started_from") or []  # older folders have none
    return [*earlier, {key: value for key, value in start.trained_on.items() if key not in ("started_from", "step")}]


def warn_of_known_games(trained_on: dict[str, Any] | None) -> None:
    """Warns, in the log, of games that this run validates on and that the weights it started from were trained on."""
    if trained_on is None:
        return
    starts = [start for start in trained_on.get("started_from") or [] if start and start["data"] == trained_on["data"]]
    known = {game for start in starts for game in start["train_games"]} & set(trained_on["val_games"])
    if known:
        log.warning(
            "training.init_from: its weights were trained on %s, which data.split.val_games has now: the scores, the choice of the best"
            " checkpoint and the detection threshold are on training data; keep the split of the earlier run",
            ", ".join(game for game in trained_on["val_games"] if game in known),
        )

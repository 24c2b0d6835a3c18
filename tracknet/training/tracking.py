"""Metrics and preview pictures of a run: into its folder always, to Weights & Biases where asked for."""

import io
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tracknet.schema.training import TrackingConfig
from tracknet.training.wandb_thread import WandbThread
from tracknet.utils.run_directory import PREVIEW, RunDirectory, write_atomically

JPEG_QUALITY = 90  # a preview takes some 150 kB; as PNG, ten times that


class Tracker:
    """Writes `metrics.jsonl` and `previews/`, and passes both on to W&B. Only the main rank writes; elsewhere all methods do nothing.

    Args:
        run: the run's folder.
        settings: `training.tracking`; its `wandb` holds, whatever WANDB_MODE says.
        config: the resolved configuration, as plain dicts, for W&B.
        is_main: whether this is the main rank.
        run_id: shown as the name of the W&B run.
        wandb_id: the id from the checkpoint of a resumed run, so that W&B continues that run; None makes a new one.
            `metrics.jsonl` must have been cut at the resumed step before: W&B gets from it what earlier launches did not hand over.
    """

    def __init__(
        self, run: RunDirectory, settings: TrackingConfig, config: dict[str, Any], *, is_main: bool, run_id: str, wandb_id: str | None
    ) -> None:
        self._run, self._is_main = run, is_main
        self._wandb: WandbThread | None = None
        self._wandb_id = wandb_id
        if not is_main:
            return
        self._last_step, self._known_names = run.metrics_of_last_step()
        if settings.wandb != "disabled" and wandb_id is None:
            # Not the run id: two runs that start in the same second on two machines would become one in W&B.
            self._wandb_id = secrets.token_hex(4)
        run.record_wandb_id(self._wandb_id)
        if self._wandb_id is not None and settings.wandb != "disabled":
            self._wandb = WandbThread(
                folder=run.path,
                metrics_file=run.metrics_file,
                pictures=_pictures_of(run.previews),
                mode=settings.wandb,
                project=settings.project,
                name=run_id,
                wandb_id=self._wandb_id,
                config=config,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line to `metrics.jsonl`; never waits for W&B.

        What an earlier launch has written of the step stays as it is: it was killed before a checkpoint knew of it.

        Args:
            step: number of steps done; never smaller than in the call before.
            metrics: names such as "train/loss" and their values.

        Raises:
            UserError: `metrics.jsonl` cannot be written.
        """
        if not self._is_main:
            return
        known = self._known_names if step == self._last_step else frozenset()
        new = {name: value for name, value in metrics.items() if name not in known}
        if not new:
            return
        self._run.append_metrics({"step": step, **new})
        if self._wandb is not None:
            self._wandb.metrics_written()

    def log_previews(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Writes `previews/step-00000123-<name>.jpg`. W&B gets them with the metrics of the step.

        Args:
            step: number of steps done; metrics of this step must follow, or have come before.
            pictures: by name, RGB (H, W, 3).

        Raises:
            UserError: a picture cannot be written.
        """
        if not self._is_main:
            return
        files = {}
        for name, picture in pictures.items():
            plain_name = re.sub(r"[^A-Za-z0-9._-]", "-", name)
            files[plain_name] = self._run.previews / f"step-{step:08}-{plain_name}.jpg"
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "JPEG", quality=JPEG_QUALITY)
            write_atomically(files[plain_name], encoded.getvalue())
        if self._wandb is not None:
            self._wandb.add_pictures(step, files)

    def state(self) -> dict[str, str | None]:
        """What a checkpoint must hold so that a resumed run continues the same W&B run."""
        return {"wandb_id": self._wandb_id}

    def finish(self, exit_code: int) -> None:
        """Hands the rest to W&B and waits for it, but only for some seconds; a second call does nothing.

        Args:
            exit_code: of the process; W&B shows 0 as finished and everything else as failed. After a stop signal (75, 130) this takes
                4 s at most, else 10.
        """
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None


def _pictures_of(previews: Path) -> dict[int, dict[str, Path]]:
    """The pictures that are there, by step and name."""
    found: dict[int, dict[str, Path]] = {}
    for path in previews.glob("step-*.jpg"):
        if match := PREVIEW.fullmatch(path.name):
            found.setdefault(int(match["step"]), {})[match["name"]] = path
    return found

"""Metrics and preview pictures of a run: into its folder always, to Weights & Biases where asked for."""

import io
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tracknet.schema.training import TrackingConfig
from tracknet.training.wandb_thread import WandbThread
from tracknet.utils.run_directory import RunDirectory, write_atomically

JPEG_QUALITY = 90  # a preview takes some 150 kB; as PNG, ten times that


class Tracker:
    """Writes `metrics.jsonl` and `previews/`, and passes both on to W&B. Only the main rank writes; elsewhere all methods do nothing.

    Args:
        run: the run's folder.
        settings: `training.tracking`; its `wandb` holds, whatever WANDB_MODE says.
        config: the resolved configuration, as plain dicts, for W&B.
        is_main: whether this is the main rank.
        run_id: shown as the name of the W&B run.
        wandb_id: the id from the checkpoint of a resumed run, so that W&B continues that run; None makes a new one. A run resumed
            some steps before the last one that W&B knows repeats those steps, and W&B keeps the first copy.
    """

    def __init__(
        self, run: RunDirectory, settings: TrackingConfig, config: dict[str, Any], *, is_main: bool, run_id: str, wandb_id: str | None
    ) -> None:
        self._run, self._is_main = run, is_main
        self._wandb: WandbThread | None = None
        self._wandb_id = wandb_id
        if not is_main:
            return
        if settings.wandb != "disabled" and wandb_id is None:
            # Not the run id: two runs that start in the same second on two machines would become one in W&B.
            self._wandb_id = secrets.token_hex(4)
        run.record_wandb_id(self._wandb_id)
        if self._wandb_id is not None and settings.wandb != "disabled":
            self._wandb = WandbThread(
                folder=run.path, mode=settings.wandb, project=settings.project, name=run_id, wandb_id=self._wandb_id, config=config
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line to `metrics.jsonl`; never waits for W&B.

        Args:
            step: number of steps done; never smaller than in the call before.
            metrics: names such as "train/loss" and their values.

        Raises:
            UserError: `metrics.jsonl` cannot be written.
        """
        if not self._is_main:
            return
        self._run.append_metrics({"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.log(step, metrics)

    def log_previews(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Writes `previews/step-00000123-<name>.jpg`.

        Args:
            step: number of steps done.
            pictures: by name, RGB (H, W, 3).

        Raises:
            UserError: a picture cannot be written.
        """
        if not self._is_main:
            return
        files = {}
        for name, picture in pictures.items():
            files[name] = self._run.previews / f"step-{step:08}-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.jpg"
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "JPEG", quality=JPEG_QUALITY)
            write_atomically(files[name], encoded.getvalue())
        if self._wandb is not None:
            self._wandb.log_pictures(step, files)

    def state(self) -> dict[str, str | None]:
        """What a checkpoint must hold so that a resumed run continues the same W&B run."""
        return {"wandb_id": self._wandb_id}

    def finish(self, exit_code: int) -> None:
        """Hands the rest to W&B and waits for it, but only for some seconds; a second call does nothing.

        Args:
            exit_code: of the process; W&B shows 0 as finished and everything else as failed.
        """
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None

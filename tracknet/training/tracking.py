"""Metrics and preview pictures of a run: into its folder always, to Weights & Biases where asked for."""

import io
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tracknet.errors import UserError, shown
from tracknet.out_of_memory import is_out_of_memory
from tracknet.schema.training import TrackingConfig
from tracknet.training.background import BackgroundThread
from tracknet.training.wandb_thread import WandbThread
from tracknet.utils.run_directory import PREVIEW, RunDirectory, write_atomically

log = logging.getLogger("tracknet")

FINISH_SECONDS = 2.0  # at the end, for pictures that are not written yet; after a stop signal little time is left
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
        self._pictures = BackgroundThread("tracknet-previews")
        self._pictures_step = -1  # of the last ones
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
        """Adds a line to `metrics.jsonl`; never waits for W&B. A later step than that of pictures waits until these are written.

        What an earlier launch has written of the step stays as it is: it was killed before a checkpoint knew of it.

        Args:
            step: number of steps done; never smaller than in the call before.
            metrics: names such as "train/loss" and their values.

        Raises:
            UserError: `metrics.jsonl` or an earlier picture cannot be written.
        """
        if not self._is_main:
            return
        if step > self._pictures_step >= 0:
            self.settle_previews()  # W&B gets a step with its pictures once a later one is in the file
        known = self._known_names if step == self._last_step else frozenset()
        new = {name: value for name, value in metrics.items() if name not in known}
        if not new:
            return
        self._run.append_metrics({"step": step, **new})
        if self._wandb is not None:
            self._wandb.metrics_written()

    def log_previews(self, step: int, draw: Callable[[], Mapping[str, NDArray[np.uint8]]]) -> None:
        """Has `previews/step-00000123-<name>.jpg` drawn and written on a thread. W&B gets them with the metrics of the step.

        What goes wrong there is raised by `log` for a later step, or by `settle_previews`.

        Args:
            step: number of steps done; metrics of this step must follow, or have come before.
            draw: gives the pictures by name, RGB (H, W, 3); called on the thread.
        """
        if not self._is_main:
            return
        self._pictures_step = step
        self._pictures.add(lambda: self._write_previews(step, draw))

    def settle_previews(self) -> None:
        """Returns when all pictures are on the disk.

        Raises:
            UserError: a picture could not be written, or memory ran out. An error of the program in drawing comes as it was.
        """
        if self._is_main:
            self._pictures.settle()
            self._pictures.check()

    def wait_for_previews(self) -> None:
        """Returns when no picture is under way; what went wrong is told elsewhere. For any thread."""
        if self._is_main:
            self._pictures.settle()

    def _write_previews(self, step: int, draw: Callable[[], Mapping[str, NDArray[np.uint8]]]) -> None:
        try:
            files = self._written(step, draw())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory while previews were drawn: {shown(error)}; lower training.tracking.previews") from error
        if self._wandb is not None:
            self._wandb.add_pictures(step, files)

    def _written(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> dict[str, Path]:
        """The files of the pictures, by the names that they go by there."""
        files = {}
        for name, picture in pictures.items():
            plain_name = re.sub(r"[^A-Za-z0-9._-]", "-", name)
            files[plain_name] = self._run.previews / f"step-{step:08}-{plain_name}.jpg"
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "JPEG", quality=JPEG_QUALITY)
            write_atomically(files[plain_name], encoded.getvalue())
        return files

    def state(self) -> dict[str, str | None]:
        """What a checkpoint must hold so that a resumed run continues the same W&B run."""
        return {"wandb_id": self._wandb_id}

    def finish(self, exit_code: int) -> None:
        """Hands the rest to W&B and waits for it, but only for some seconds; a second call does nothing.

        Args:
            exit_code: of the process; W&B shows 0 as finished and everything else as failed. After a stop signal (75, 130) this takes
                4 s at most, else 10, and pictures that are not written yet get 2 s before that.
        """
        if self._is_main and not self._pictures.settle(FINISH_SECONDS):
            log.warning("the last preview pictures are not all written")
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

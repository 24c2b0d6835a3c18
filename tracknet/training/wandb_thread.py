"""All dealings with Weights & Biases, in one daemon thread that reads `metrics.jsonl`, so that a dead service costs training nothing."""

import logging
import netrc
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tracknet.training.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED
from tracknet.training.wandb_rows import MetricsRows, Row, Unsent, locally_reached, note_reached, reached_with_note

INIT_SECONDS = 15  # a reachable service answers in 0.3 to 5 s; training goes on meanwhile
FLUSH_SECONDS = 1.0  # so much of a run may be missing in its `.wandb` file after a kill; W&B's own 15 s are a whole short run
UPLOAD_SECONDS = 6  # at the end, for what is not uploaded yet; the rest stays in the run's folder for `wandb sync`
FINISH_SECONDS = 10.0  # in all, at the end: W&B's own deadlines fit inside
STOPPED_SECONDS = 4.0  # in all, after a stop signal: the run must have left 10 s after it
KILLED_SECONDS = 3.0  # of these, after the service process is ended: an offline start takes 0.5 s
STOPPED_KILLED_SECONDS = 2.0

log = logging.getLogger("tracknet")


class WandbThread:
    """A W&B run that can fail without anyone noticing but the log. No method waits, except `finish`, and no method raises.

    `online` falls back to an offline run, with one warning, where there is no key, no network or no answer.

    `metrics.jsonl` is what W&B gets, in its order and with the training step as W&B's step. A step goes out in one piece, once a later
    step is in the file or the launch ends. So one number says what W&B has: the last step. A resumed run sends what is later than that and
    in the file: also what a killed launch never handed over. The last step is known

    * online from the service;
    * offline from the `.wandb` files of earlier launches, and from a note of those that ended, for an upload may have removed their files.

    Args:
        folder: the run's folder, which must exist (otherwise W&B goes to the system's temporary one without a word).
        metrics_file: its `metrics.jsonl`, without the lines that the run will write again.
        pictures: of earlier launches, by step and name.
        mode: "online" or "offline".
        project: W&B project.
        name: shown name.
        wandb_id: made by us, so that a resumed run can name it. Offline, W&B itself cannot know that it resumes.
        config: nested plain values.
    """

    def __init__(
        self,
        *,
        folder: Path,
        metrics_file: Path,
        pictures: Mapping[int, Mapping[str, Path]],
        mode: str,
        project: str,
        name: str,
        wandb_id: str,
        config: dict[str, Any],
    ) -> None:
        self._folder, self._mode, self._wandb_id = folder, mode, wandb_id
        self._rows = MetricsRows(metrics_file)
        self._pictures = dict(pictures)
        self._arguments: dict[str, Any] = {
            "project": project,
            "name": name,
            "id": wandb_id,
            "config": config,
            "dir": str(folder),
            "resume": "allow",
        }
        self._has_news = threading.Event()
        self._has_news.set()  # what an earlier launch left
        self._exit_code: int | None = None
        self._is_off = self._gave_up = False
        self._last_sent: Row | None = None
        self._kept_in = ""  # the folder of this launch, for `wandb sync`
        self._exit_hooks = (sys.exit, sys.excepthook)
        # W&B's own error telemetry would hold the interpreter at exit for 20 s where the service accepts and never answers.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            # Here, not in the thread: a data worker forked during an import inherits its locks and never gets them.
            import wandb
        except ImportError as error:
            self._is_off = True
            log.warning("W&B cannot be imported and is off (%s); metrics.jsonl has everything", _in_one_line(error))
            return
        self._client: Any = wandb
        self._thread = threading.Thread(target=self._work, name="tracknet-wandb", daemon=True)
        self._thread.start()

    def metrics_written(self) -> None:
        """Says that `metrics.jsonl` has grown."""
        self._has_news.set()

    def add_pictures(self, step: int, files: Mapping[str, Path]) -> None:
        """Adds files to a step, before metrics of a later one are written."""
        self._pictures[step] = {**self._pictures.get(step, {}), **files}

    def finish(self, exit_code: int) -> None:
        """Lets the thread end the run; where the service is too slow its process is ended, so that nothing hangs at exit.

        Args:
            exit_code: of the process. After a stop signal (75, 130) this takes 4 s at most, else 10.
        """
        if self._is_off:
            return
        stopped = exit_code in (EXIT_PREEMPTED, EXIT_INTERRUPTED)
        seconds, killed_seconds = (STOPPED_SECONDS, STOPPED_KILLED_SECONDS) if stopped else (FINISH_SECONDS, KILLED_SECONDS)
        if self._kept_in or self._mode == "offline":
            killed_seconds = min(killed_seconds, 0.5)  # no offline run is to be started in place of an online one
        self._exit_code = exit_code
        self._has_news.set()
        self._thread.join(seconds - killed_seconds)
        if self._thread.is_alive():
            self._gave_up = True
            _end_service()  # a thread that still waits for the service's first answer now writes an offline run instead
            self._thread.join(killed_seconds)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %.0f s and is left behind; metrics.jsonl has everything", seconds)
            _end_service()

    def _work(self) -> None:
        try:
            run, unsent = self._start_run()
            exit_code = None
            while exit_code is None:
                self._has_news.wait()
                self._has_news.clear()
                exit_code = self._exit_code  # before the file is read: what was written before `finish` belongs to the run
                for row in self._rows.closed():
                    self._send(run, unsent.of(self._with_pictures(row)))
            self._send_last(run, unsent, is_over=exit_code == 0)
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                log.warning("W&B: not all was uploaded within %d s; the rest: wandb sync %s", UPLOAD_SECONDS, self._kept_in)
            if self._last_sent:
                note_reached(self._folder, self._wandb_id, self._last_sent, ended=True)
            self._client.teardown(exit_code=exit_code)  # here, within our deadline, instead of at the interpreter's exit
        except Exception as error:  # whatever a foreign client raises, training goes on
            self._turn_off(error)

    def _with_pictures(self, row: Row) -> Row:
        files = self._pictures.pop(row.step, {})
        return Row(row.step, {**row.values, **{f"previews/{name}": file for name, file in files.items() if file.exists()}})

    def _send(self, run: Any, rows: Iterable[Row]) -> None:
        for row in rows:
            values = {name: self._client.Image(str(value)) if isinstance(value, Path) else value for name, value in row.values.items()}
            run.log(values, step=row.step, commit=True)
            self._last_sent = row

    def _send_last(self, run: Any, unsent: Unsent, *, is_over: bool) -> None:
        """Sends the last step, which may get an evaluation when the run goes on; a note says what of it W&B has."""
        last = self._rows.last()
        rows = list(unsent.of(self._with_pictures(last))) if last else []
        if is_over:  # else it waits: sent now it would take the place of the step with which it can go later
            rows += unsent.rest()
        if rows:
            note_reached(self._folder, self._wandb_id, rows[-1], ended=False)
        self._send(run, rows)

    def _start_run(self) -> tuple[Any, Unsent]:
        """The run and what it lacks: online, or where that cannot be offline, with the reason in one warning."""
        reason = None
        self._client.setup(settings=self._client.Settings(silent=True))
        kept = locally_reached(self._folder, self._wandb_id)
        if self._mode == "online":
            reason = self._missing_key()
            if reason is None:
                try:
                    run = self._init("online")
                    log.info("W&B: %s", run.url)
                    if kept.step >= run.starting_step:
                        log.info("W&B gets now what earlier launches did not upload; leave their folders in %s/wandb alone", self._folder)
                    return run, Unsent(reached_with_note(run.starting_step - 1, self._folder, self._wandb_id))
                except Exception as error:
                    if not threading.main_thread().is_alive():
                        raise  # the interpreter is leaving: start nothing new
                    reason = "no answer before the run ended" if self._gave_up else _in_one_line(error)
                    self._tear_down()  # the service would refuse the same id a second time
        run = self._init("offline")
        where = f"the run is kept offline; upload it later with: wandb sync {self._kept_in}"
        if reason is None:
            log.info("W&B: %s", where)
        else:
            log.warning("W&B is not reachable (%s); %s", reason, where)
        return run, Unsent(kept)

    def _init(self, mode: str) -> Any:
        values = {"mode": mode, "silent": True, "console": "off", "save_code": False, "init_timeout": INIT_SECONDS}
        values |= {"finish_timeout": UPLOAD_SECONDS, "finish_timeout_raises": True, "x_transaction_log_flush_interval": FLUSH_SECONDS}
        known = self._client.Settings.model_fields  # an older client has no deadline to flush at
        settings = self._client.Settings(**{name: value for name, value in values.items() if name in known})
        try:
            run = self._client.init(settings=settings, **self._arguments)
            self._kept_in = str(Path(run.dir).parent)
            return run
        finally:
            self._give_back_exit_hooks()

    def _missing_key(self) -> str | None:
        """Why W&B would ask for a key, which in a thread nobody could type; None if it has one."""
        settings = self._client.setup().settings
        if settings.api_key or settings.identity_token_file:
            return None
        host = urlsplit(settings.base_url).netloc
        files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
        for file in map(os.path.expanduser, files):
            try:
                if os.path.exists(file) and netrc.netrc(file).authenticators(host):
                    return None
            except (OSError, netrc.NetrcParseError) as error:
                return f"cannot read {file}: {error}"
        return f"no API key for {host}: log in with 'wandb login' or set WANDB_API_KEY"

    def _give_back_exit_hooks(self) -> None:
        """W&B wraps `sys.exit` and `sys.excepthook` to learn the exit code, which we tell it ourselves."""
        if type(getattr(sys.exit, "__self__", None)).__module__.startswith("wandb"):
            sys.exit = self._exit_hooks[0]
        if type(getattr(sys.excepthook, "__self__", None)).__module__.startswith("wandb"):
            sys.excepthook = self._exit_hooks[1]

    def _turn_off(self, error: Exception) -> None:
        self._is_off = True
        if self._gave_up:
            later = "if the run goes on it gets the rest"
            log.warning("W&B did not take all before its deadline; %s, else upload it with: wandb sync %s", later, self._kept_in)
        else:
            log.warning("W&B failed and is off from now on (%s); metrics.jsonl has everything", _in_one_line(error))
        _end_service()
        self._tear_down()

    def _tear_down(self) -> None:
        """Lets go of the service; otherwise its exit hook would print a traceback, or wait, when the interpreter leaves."""
        try:
            self._client.teardown()
        except Exception as error:  # its service may be gone already, which is as good
            log.debug("W&B teardown: %s", _in_one_line(error))


def _end_service() -> None:
    """Ends W&B's service process of this process, if one is left; its exit hook would wait for it without limit."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "wandb-core":
                child.kill()


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")

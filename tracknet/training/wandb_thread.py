"""All dealings with Weights & Biases, in one daemon thread behind a bounded queue, so that a dead service costs training nothing."""

import logging
import netrc
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any
from urllib.parse import urlsplit

import psutil

QUEUE_ENTRIES = 1000  # 10,000 steps at the default pace of logging: far more than pass while W&B starts; some 100 kB
INIT_SECONDS = 15  # a reachable service answers in 0.3 to 5 s; training goes on meanwhile
UPLOAD_SECONDS = 6  # at the end, for what is not uploaded yet; the rest stays in the run's folder for `wandb sync`
FINISH_SECONDS = 10.0  # in all, at the end: W&B's own deadlines fit inside, and a scheduler's grace period (often 30 s) holds it
KILLED_SECONDS = 3.0  # after its service process is ended at that deadline: an offline start takes 0.5 s

log = logging.getLogger("tracknet")


@dataclass(frozen=True)
class _Entry:
    """Something to log; `pictures` are files already written."""

    step: int
    metrics: Mapping[str, float]
    pictures: Mapping[str, Path]


@dataclass(frozen=True)
class _Finish:
    exit_code: int


class WandbThread:
    """A W&B run that can fail without anyone noticing but the log. No method waits, except `finish`, and no method raises.

    `online` falls back to an offline run, with one warning, where there is no key, no network or no answer.

    Args:
        folder: the run's folder, which must exist (otherwise W&B goes to the system's temporary one without a word).
        mode: "online" or "offline".
        project: W&B project.
        name: shown name.
        wandb_id: made by us, so that a resumed run can name it. Offline, W&B itself cannot know that it resumes.
        config: nested plain values.
    """

    def __init__(self, *, folder: Path, mode: str, project: str, name: str, wandb_id: str, config: dict[str, Any]) -> None:
        self._mode = mode
        self._arguments: dict[str, Any] = {
            "project": project,
            "name": name,
            "id": wandb_id,
            "config": config,
            "dir": str(folder),
            "resume": "allow",
        }
        self._queue: Queue[_Entry | _Finish] = Queue(QUEUE_ENTRIES)
        self._is_off = self._warned_full = self._gave_up = False
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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues numbers."""
        self._put(_Entry(step, dict(metrics), {}))

    def log_pictures(self, step: int, files: Mapping[str, Path]) -> None:
        """Queues picture files."""
        self._put(_Entry(step, {}, dict(files)))

    def finish(self, exit_code: int) -> None:
        """Lets the thread end the run; where the service is too slow its process is ended, so that nothing hangs at exit."""
        if self._is_off:
            return
        self._put_last(_Finish(exit_code))
        self._thread.join(FINISH_SECONDS - KILLED_SECONDS)
        if self._thread.is_alive():
            self._gave_up = True
            _end_service()  # a thread that still waits for the service's first answer now writes an offline run instead
            self._thread.join(KILLED_SECONDS)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %.0f s and is left behind; metrics.jsonl has everything", FINISH_SECONDS)
            _end_service()

    def _put(self, entry: _Entry) -> None:
        if self._is_off:
            return
        try:
            self._queue.put_nowait(entry)
        except Full:
            if not self._warned_full:
                self._warned_full = True
                log.warning("W&B is too slow: entries from step %d on may be missing there; metrics.jsonl has them all", entry.step)

    def _put_last(self, finish: _Finish) -> None:
        while True:
            try:
                self._queue.put_nowait(finish)
                return
            except Full:
                with suppress(Empty):
                    self._queue.get_nowait()

    def _work(self) -> None:
        try:
            run = self._start_run()
            while isinstance(entry := self._queue.get(), _Entry):
                pictures = {f"previews/{name}": self._client.Image(str(file)) for name, file in entry.pictures.items()}
                run.log({**entry.metrics, **pictures}, step=entry.step)
            run.finish(exit_code=entry.exit_code)
            self._client.teardown(exit_code=entry.exit_code)  # here, within our deadline, instead of at the interpreter's exit
        except Exception as error:  # whatever a foreign client raises, training goes on
            self._turn_off(error)

    def _start_run(self) -> Any:
        """The online run; where that cannot be, an offline one, with the reason in one warning."""
        reason = None
        self._client.setup(settings=self._client.Settings(silent=True))
        if self._mode == "online":
            reason = self._missing_key()
            if reason is None:
                try:
                    run = self._init("online")
                    log.info("W&B: %s", run.url)
                    return run
                except Exception as error:
                    if not threading.main_thread().is_alive():
                        raise  # the interpreter is leaving: start nothing new
                    reason = "no answer before the run ended" if self._gave_up else _in_one_line(error)
                    self._tear_down()  # the service would refuse the same id a second time
        run = self._init("offline")
        kept = f"the run is kept offline; upload it later with: wandb sync {Path(run.dir).parent}"
        if reason is None:
            log.info("W&B: %s", kept)
        else:
            log.warning("W&B is not reachable (%s); %s", reason, kept)
        return run

    def _init(self, mode: str) -> Any:
        settings = self._client.Settings(
            mode=mode, silent=True, console="off", save_code=False, init_timeout=INIT_SECONDS, finish_timeout=UPLOAD_SECONDS
        )
        try:
            return self._client.init(settings=settings, **self._arguments)
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

"""Writes checkpoints: beside their final name, flushed, read back, renamed; then prunes the old ones. `checkpoint` has the layout."""

import contextlib
import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tracknet.errors import UserError
from tracknet.training.checkpoint import BEST, LAST, LEFTOVER_NAME, MUST_BE_FINITE, inspect_checkpoint, linked_step, saved_steps
from tracknet.training.durable import NewFile, flush, only_writer, sha256_on_disk
from tracknet.training.manifest import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL,
    STATE_FILE,
    FileRecord,
    Manifest,
    are_tensor_names,
    file_names,
    is_step,
    read_manifest,
    tensor_file_name,
)
from tracknet.training.tensor_file import NotFiniteError, write_tensors
from tracknet.training.untrusted import CheckpointError

log = logging.getLogger("tracknet")


class CheckpointStore:
    """Writes the checkpoints of one run.

    Whenever the process or the machine dies, every checkpoint in the folder is either complete or under a temporary name, and nothing
    old has been deleted before the new was verified. Writers wait for each other. Only what this class has made is ever removed.

    Args:
        run_folder: `<ckpt_dir>/<run_id>`; made at the first save.
        keep_last: so many newest checkpoints are kept, and the best one besides.
    """

    def __init__(self, run_folder: Path, keep_last: int) -> None:
        self._folder = run_folder
        self._keep_last = keep_last

    def save(
        self,
        step: int,
        model_texts: Mapping[str, str],
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: bool,
    ) -> Path:
        """Writes a checkpoint, points `last` (and `best`) to it and prunes the old ones. For one process only: the main rank.

        A checkpoint of this step that is there already is replaced. Beside the tensors it takes the memory of the largest one that is
        not contiguous.

        Args:
            step: updates made.
            model_texts: what `config.json`, a JSON object, and `README.md` hold.
            tensors: groups of tensors by name, `model` among them; `optimizer` becomes `optimizer.safetensors`.
            state: whatever JSON holds exactly; no NaN and no infinity.
            best: whether it is the best checkpoint so far. One of a later step no longer is: it is of a future that this run, resumed
                at an earlier step, will not have, or will have again.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: it could not be written, or the model or the weights have a NaN or infinity; all earlier checkpoints are as they
                were.
        """
        others = sorted(tensors.keys() - {MODEL})
        if not is_step(step) or MODEL not in tensors or not are_tensor_names(others):
            raise ValueError(f"no checkpoint of step {step} can have the groups of tensors {sorted(tensors)}")
        own_texts = {name: model_texts[name] for name in (CONFIG_FILE, CARD_FILE)}
        texts = own_texts | {STATE_FILE: json.dumps(dict(state), allow_nan=False, indent=1)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with only_writer(self._folder):
                self._tidy()
                folder = self._write(step, texts, tensors)
                self._drop_best_after(step)
                # best before last: a run that resumes from `last` believes that `best` is as good as its state says
                for name in (BEST, LAST) if best else (LAST,):
                    self._link(name, folder.name)
                flush(self._folder)
                flush(self._folder.parent)
                self._prune(step)
        except NotFiniteError as error:
            raise UserError(
                f"the checkpoint of step {step} was not written: {error} holds NaN or infinity; lower training.optimizer.lr;"
                f" the earlier checkpoints in {self._folder} are as they were"
            ) from error
        except (OSError, CheckpointError) as error:
            problem = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
            raise UserError(
                f"training.ckpt_dir: the checkpoint of step {step} could not be written to {self._folder}: {problem};"
                " the earlier checkpoints are as they were"
            ) from error
        return folder

    def _write(self, step: int, texts: Mapping[str, str], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Writes all files under a temporary name, verifies them and moves the folder to its name."""
        final = self._folder / f"step-{step:08d}"
        _check_is_ours(final)
        temporary = self._temporary("saving", final.name)
        temporary.mkdir()
        try:
            _write_files(temporary, step, texts, tensors)
            inspect_checkpoint(temporary)
            if final.is_dir():
                replaced = self._temporary("replaced", final.name)
                final.rename(replaced)
                temporary.rename(final)
                flush(self._folder)  # where a file system does not keep the order of renames, the old one must not go first
                self._discard(replaced)
            else:
                temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # gives the space back; what cannot be removed now goes at the next save
            raise
        flush(self._folder)
        return final

    def _temporary(self, purpose: str, step_name: str) -> Path:
        return self._folder / f".{purpose}-{step_name}-{uuid.uuid4().hex}"

    def _drop_best_after(self, step: int) -> None:
        linked = linked_step(self._folder, BEST)
        if linked is not None and linked > step:
            (self._folder / BEST).unlink()

    def _link(self, name: str, target: str) -> None:
        temporary = self._folder / f".link-{uuid.uuid4().hex}"
        temporary.symlink_to(target)
        temporary.replace(self._folder / name)

    def _tidy(self) -> None:
        """Removes what killed processes left; nobody else is writing now. A checkpoint whose replacement was cut short is put back."""
        for name in (LAST, BEST):
            if os.path.lexists(self._folder / name) and not (self._folder / name).is_symlink():
                raise FileExistsError(errno.EEXIST, f"{name} is not a link made by TrackNet; move it away")
        for entry in list(self._folder.iterdir()):
            leftover = LEFTOVER_NAME.fullmatch(entry.name)
            if not leftover or (leftover[1] is None and not entry.is_symlink()):
                continue
            if leftover[1] == "replaced" and not os.path.lexists(self._folder / leftover[2]):
                entry.rename(self._folder / leftover[2])
            else:
                self._discard(entry)

    def _prune(self, step: int) -> None:
        """Keeps the newest checkpoints up to the step just saved, then those of a later step (from before a resume at an earlier one)."""
        steps = {number: folder for number, folder in saved_steps(self._folder).items() if _is_ours(folder)}
        newest = sorted(steps, key=lambda number: (number > step, -number))
        for number in newest[self._keep_last :]:
            if number == linked_step(self._folder, BEST):
                continue
            if number > step:
                log.warning("%s goes: the run has gone on from an earlier step", steps[number])
            self._discard(steps[number])

    def _discard(self, entry: Path) -> None:
        """Removes a checkpoint or a leftover; failing that it warns, for what had to be saved is saved.

        What a user has put into a checkpoint's folder stays, in the folder of the same step.
        """
        try:
            if entry.is_symlink():
                entry.unlink()
                return
            leftover = LEFTOVER_NAME.fullmatch(entry.name)
            if leftover:
                step_name = leftover[2]
            else:  # renamed first, so that a checkpoint is never seen half deleted
                step_name, entry = entry.name, entry.rename(self._temporary("deleted", entry.name))
            ours = _files_of(entry)
            # the manifest last: a deletion that is cut short still knows then which card is ours
            for file in sorted(entry.iterdir(), key=lambda file: file.name == MANIFEST_FILE):
                if file.name in ours and not (file.is_dir() and not file.is_symlink()):
                    file.unlink()
                else:
                    (self._folder / step_name).mkdir(exist_ok=True)
                    _move_beside(file, self._folder / step_name)
            entry.rmdir()
        except OSError as error:
            log.warning("%s could not be removed: %s", entry, error.strerror)


def _files_of(checkpoint: Path) -> set[str]:
    """The names of what TrackNet has put there; where no manifest tells it, those that each run's checkpoints have.

    A card is ours only where the manifest has it, or where the folder is one that was never finished: in older ones it is a user's.
    """
    names = {MANIFEST_FILE, *file_names(["optimizer", "weights"])}
    leftover = LEFTOVER_NAME.fullmatch(checkpoint.name)
    if not leftover or leftover[1] != "saving":
        names -= {CARD_FILE}
    with contextlib.suppress(UserError):
        names |= read_manifest(checkpoint).files.keys()
    return names


def _is_ours(folder: Path) -> bool:
    """Whether a folder with the name of a checkpoint is one, good or not."""
    return (folder / MANIFEST_FILE).is_file() or (folder / STATE_FILE).is_file()


def _check_is_ours(final: Path) -> None:
    """Nobody else's file or folder is moved out of the way; an empty folder, which a rename replaces, is nobody's."""
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir() or not (_is_ours(final) or not any(final.iterdir()))):
        raise FileExistsError(errno.EEXIST, f"{final.name} is not a checkpoint made by TrackNet; move it away")


def _move_beside(file: Path, folder: Path) -> None:
    """Under its name, or with a number behind it where that is taken."""
    target, number = folder / file.name, 1
    while os.path.lexists(target):
        target, number = folder / f"{file.name}.{number}", number + 1
    file.rename(target)


def _write_files(folder: Path, step: int, texts: Mapping[str, str], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes and reads back each file, and the manifest last."""
    files: dict[str, FileRecord] = {}
    for name, text in texts.items():
        with NewFile(folder / name) as file:
            file.write(text.encode("utf-8"))
        files[name] = _read_back(folder / name, file)
    for group, members in tensors.items():
        name = tensor_file_name(group)
        on_cpu = {key: tensor.detach().to("cpu") for key, tensor in members.items()}
        with NewFile(folder / name) as file:
            write_tensors(on_cpu, file.write, finite=group in MUST_BE_FINITE)
        files[name] = _read_back(folder / name, file)
    others = tuple(sorted(tensors.keys() - {MODEL}))
    with NewFile(folder / MANIFEST_FILE) as file:
        file.write(Manifest(step, others, files).as_text().encode("utf-8"))
    _read_back(folder / MANIFEST_FILE, file)
    flush(folder)


def _read_back(path: Path, written: NewFile) -> FileRecord:
    """Proves that a file holds what it was given, to the bit."""
    if sha256_on_disk(path) != written.sha256:
        raise CheckpointError(f"{path.name}: reads back as something else than was written; the disk or its driver is at fault")
    return FileRecord(written.byte_count, written.sha256)

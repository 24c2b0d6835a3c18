"""Whatever becomes of the files of a checkpoint afterwards, the one before it is found, and nothing bad is loaded."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_table import FaultTable
from saved_runs import RUN_ID, put_foreign_files, resumed_step, save, silence, what_is_wrong

from tracknet.errors import UserError
from tracknet.training.checkpoint import CheckpointError

pytestmark = pytest.mark.faults

FILES = ["README.md", "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors"]
BYTES_PER_FILE = 40


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newest checkpoint, step 2, of a run whose best one is at step 1."""
    silence()
    save(tmp_path / RUN_ID, 1, best=True)
    put_foreign_files(tmp_path / RUN_ID)
    folder = save(tmp_path / RUN_ID, 2)
    assert sorted(entry.name for entry in folder.iterdir()) == FILES
    assert resumed_step(tmp_path) == 2
    return folder


def is_refused(ckpt_dir: Path, checkpoint: Path) -> bool:
    """Whether the checkpoint, when it is asked for by its path, is refused in one line."""
    try:
        resumed_step(ckpt_dir, str(checkpoint))
    except CheckpointError as error:
        return "\n" not in str(error)
    return False


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte(name: str, newest: Path, tmp_path: Path, faults: FaultTable) -> None:
    file = newest / name
    content = file.read_bytes()
    drawn = faults.random(f"flipped {name}")
    places = {0, len(content) - 1, *drawn.sample(range(len(content)), min(len(content), BYTES_PER_FILE))}
    for place in sorted(places):
        flip = drawn.randrange(1, 256)
        file.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        wrong = what_is_wrong(tmp_path, {1})
        if not wrong and not is_refused(tmp_path, newest):
            wrong = "not refused when it is asked for"
        if name == "manifest.json" and wrong:  # between two of its words another kind of space says the same
            wrong = what_is_wrong(tmp_path, {2})
        faults.record("one flipped byte in each file", not wrong, f"{name}, byte {place} ^ {flip}: {wrong}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_lengthened_or_gone(name: str, newest: Path, tmp_path: Path, faults: FaultTable) -> None:
    file = newest / name
    content = file.read_bytes()
    drawn = faults.random(f"cut {name}")
    almost = len(content) - 1 - (name == "manifest.json")  # whose last byte, the end of its last line, says nothing
    lengths = {0, 1, 7, 8, 9, len(content) // 2, almost, *(drawn.randrange(almost) for _ in range(8))}
    for length in sorted(lengths):
        file.write_bytes(content[:length])
        wrong = what_is_wrong(tmp_path, {1})
        faults.record("a file cut short or emptied", not wrong and is_refused(tmp_path, newest), f"{name}, {length} bytes: {wrong}")

    def lengthen() -> None:
        file.write_bytes(content + b"\0")

    def link_to_a_copy() -> None:
        (tmp_path / "copy").write_bytes(content)
        file.symlink_to(tmp_path / "copy")

    for replace in (lambda: None, lengthen, file.mkdir, link_to_a_copy, lambda: os.mkfifo(file)):
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        replace()
        wrong = what_is_wrong(tmp_path, {1})
        faults.record("a file gone, or something else in its place", not wrong and is_refused(tmp_path, newest), f"{name}: {wrong}")


def test_files_of_one_checkpoint_in_another(newest: Path, tmp_path: Path, faults: FaultTable) -> None:
    for name in FILES:
        kept = (newest / name).read_bytes()
        shutil.copy(newest.with_name("step-00000001") / name, newest / name)
        wrong = what_is_wrong(tmp_path, {1})
        faults.record("a file of another checkpoint in its place", not wrong and is_refused(tmp_path, newest), f"{name}: {wrong}")
        (newest / name).write_bytes(kept)
    assert resumed_step(tmp_path) == 2


def links(run_folder: Path, drawn: random.Random) -> dict[str, Callable[[Path], object]]:
    """What `last` may become: by a copying tool, a mistake or a prank."""
    stranger = run_folder.parent / "elsewhere" / RUN_ID
    save(stranger, 9)
    (stranger / "step-00000009" / "own.txt").write_text("mine")
    never = f"step-{drawn.randrange(10**7, 10**8):08}"
    targets: dict[str, str | Path] = {
        "nowhere": never,
        "a checkpoint of another folder": stranger / "step-00000009",
        "the same, by a relative path": f"../elsewhere/{RUN_ID}/step-00000009",
        "out of the folder": "..",
        "the root": "/",
        "a file": "notes.txt",
        "a file outside": "/etc/hostname",
        "itself": "last",
        "its own folder": ".",
        "best": "best",
        "a link that leads out": "step-09999999",
        "the older checkpoint": "step-00000001",
        "the newest by its whole path": run_folder / "step-00000002",
    }
    made: dict[str, Callable[[Path], object]] = {
        name: lambda last, target=target: last.symlink_to(target) for name, target in targets.items()
    }
    return made | {
        "missing": lambda _: None,
        "a file itself": lambda last: last.write_text("step-00000002"),
        "an empty folder": lambda last: last.mkdir(),
        "a copy of the checkpoint": lambda last: shutil.copytree(run_folder / "step-00000002", last),
    }


def test_last_leads_astray(newest: Path, tmp_path: Path, faults: FaultTable) -> None:
    run_folder = newest.parent
    last = run_folder / "last"
    for name, make in links(run_folder, faults.random("last")).items():
        shutil.rmtree(last) if last.is_dir() and not last.is_symlink() else last.unlink(missing_ok=True)
        make(last)
        # where it points to one of the run's own, that one is meant
        wrong = what_is_wrong(tmp_path, {1} if name in ("best", "the older checkpoint") else {2})
        if name == "best":  # a link to a link: either is sound
            wrong = wrong and what_is_wrong(tmp_path, {2})
        faults.record("`last` points nowhere, astray, or is no link", not wrong, f"{name}: {wrong}")
    assert (tmp_path / "elsewhere" / RUN_ID / "step-00000009" / "own.txt").read_text() == "mine"


def test_saving_goes_on_beside_a_damaged_checkpoint_and_costs_no_good_one(newest: Path, tmp_path: Path, faults: FaultTable) -> None:
    """`keep_last=1`: the older checkpoint goes only when the new one is on the disk, and it is the one that loads."""
    run_folder = newest.parent
    for step, name in enumerate(FILES, start=3):
        damaged = run_folder / os.readlink(run_folder / "last")
        (damaged / name).write_bytes(b"")
        (run_folder / "last").unlink()
        (run_folder / "last").symlink_to("step-77777777")
        try:
            save(run_folder, step)
        except UserError as error:
            wrong = str(error)
        else:
            wrong = what_is_wrong(tmp_path, {step})
        faults.record("saving goes on beside a damaged checkpoint", not wrong, f"{name}: {wrong}")

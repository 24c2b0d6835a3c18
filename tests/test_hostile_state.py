"""A checkpoint's state.json is a file, so anything may stand in it: a resume refuses it in one line or walks back, and never breaks."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import arguments_of, train, with_room_for
from test_train import arguments, only_run

from tracknet.errors import UserError
from tracknet.scripts.train import main
from tracknet.training.checkpoint import MANIFEST_FILE, STATE_FILE
from tracknet.training.manifest import FileRecord, Manifest, read_manifest
from tracknet.training.untrusted import sha256_of

FORMAT_1 = Path(__file__).with_name("checkpoint_v1")
# One epoch from step 2 to 4, with averages, and with micro-batches that have fallen and grow soon
SETTINGS = ["training.ema_decay=0.9", "training.epochs=1", "training.batch_size=4", "training.mb_growth_steps=3"]
FORMAT_1_SETTINGS = ["training.ema_decay=0.9", "model.backbone.channels=[2,4]", "training.epochs=2"]
MISSING = object()
VALUES: list[Any] = [MISSING, None, -1, 0, 3, 2**40, 10**400, 0.5, -1e308, 1e308, True, "x", "", [], {}, [[]], {"x": 1}, [-1, 2**70]]
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def stopped(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that was stopped after step 2, and again after step 3."""
    output = tmp_path_factory.mktemp("stopped")
    launch = arguments_of("unet", clips, output, *SETTINGS, "training.checkpoint.keep_last=9")
    with pytest.MonkeyPatch.context() as patch, with_room_for({0: 2}):
        patch.setenv("TRACKNET_CACHE_DIR", str(output / "cache"))
        train(launch, stop_after=2)
        train([*launch, "--resume"], stop_after=1)
    return output / "checkpoints"


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """All keys in a state, and the first entry of each list; of the configuration what is looked at, of the parameters the first."""
    if place:
        yield place
    of_state = place[1:] if place[:1] == ("state",) else place  # format 1 has it one level down
    if of_state[:1] == ("config",) and len(of_state) > 1 and of_state[1] != "runtime":
        return
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if isinstance(value, list) or of_state == ("optimizer", "state"):
        entries = entries[:1]
    for name, entry in entries:
        yield from places(entry, (*place, name))


def changed(state: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner: Any = state
    for name in place[:-1]:
        inner = inner[name]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return state


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Puts a state into a checkpoint, of format 2 with a manifest that says that all is well."""
    content = json.dumps(state).encode()
    (checkpoint / STATE_FILE).write_bytes(content)
    if (checkpoint / MANIFEST_FILE).exists():
        manifest = read_manifest(checkpoint)
        files = dict(manifest.files) | {STATE_FILE: FileRecord(len(content), sha256_of(content))}
        (checkpoint / MANIFEST_FILE).write_text(Manifest(manifest.step, manifest.tensor_names, files).as_text())


def cases(state: dict[str, Any]) -> list[tuple[Place, Any]]:
    return [(place, value) for place in places(state) for value in VALUES]


def what_is_wrong(launch: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """How a launch did not end as it must; empty where it did."""
    capfd.readouterr()
    try:
        code = main(launch)
    except UserError as error:
        return f"UserError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    *_, last = capfd.readouterr().err.splitlines()
    if code not in (0, 1, 2):
        return f"code {code}"
    return "" if (code == 0) == (last[2:3] == ":") else f"code {code}: {last}"


def failures(run: Path, checkpoint: str, tried: list[tuple[Place, Any]], launch: list[str], output: Path, capfd: Any) -> list[str]:
    """Resumes a run once for each change of its newest checkpoint; what went wrong."""
    wrong = []
    state = json.loads((run / checkpoint / STATE_FILE).read_text())
    for place, value in tried:
        shutil.rmtree(output, ignore_errors=True)
        own = output / "checkpoints" / run.name
        shutil.copytree(run, own, symlinks=True)
        write_state(own / checkpoint, changed(state, place, value))
        problem = what_is_wrong([*launch, "--resume", str(own)], capfd)
        if problem:
            wrong.append(f"{'.'.join(map(str, place))} = {'missing' if value is MISSING else repr(value)[:40]}: {problem[:300]}")
    return wrong


def format_2_failures(stopped: Path, clips: Path, output: Path, capfd: Any, count: int | None) -> list[str]:
    run = only_run(stopped)
    all_cases = cases(json.loads((run / "step-00000003" / STATE_FILE).read_text()))
    tried = all_cases if count is None else random.Random(0).sample(all_cases, count)
    return failures(run, "step-00000003", tried, arguments_of("unet", clips, output, *SETTINGS), output, capfd)


def format_1_failures(clips: Path, output: Path, capfd: Any, count: int | None) -> list[str]:
    run = only_run(FORMAT_1)
    all_cases = cases(json.loads((run / "step-00000006" / STATE_FILE).read_text()))
    tried = all_cases if count is None else random.Random(0).sample(all_cases, count)
    return failures(run, "step-00000006", tried, arguments(clips, output, *FORMAT_1_SETTINGS), output, capfd)


def test_a_hostile_state_of_format_2_is_refused_or_passed_over(stopped, clips, tmp_path, capfd):
    wrong = format_2_failures(stopped, clips, tmp_path / "output", capfd, 25)
    assert not wrong, "\n".join(wrong)


def test_a_hostile_state_of_format_1_is_refused(clips, tmp_path, capfd):
    wrong = format_1_failures(clips, tmp_path / "output", capfd, 10)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_hostile_values_of_all_keys(stopped, clips, tmp_path, capfd):
    wrong = format_2_failures(stopped, clips, tmp_path / "output", capfd, 200)  # all of them take a quarter of an hour
    wrong += format_1_failures(clips, tmp_path / "output", capfd, 50)
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong)

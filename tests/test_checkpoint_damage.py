"""Checkpoints that are damaged or made by somebody else: nothing bad is loaded, nothing is run, and one line says what is wrong."""

import hashlib
import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import FILES, MODEL_TEXTS, assert_good, names_in, save, tensors_of

from tracknet.errors import UserError
from tracknet.training.checkpoint import (
    CheckpointError,
    inspect_checkpoint,
    linked_step,
    load_checkpoint,
    saved_steps,
    verify_checkpoint,
)
from tracknet.training.checkpoint_store import CheckpointStore

# Damage


def refused(path: Path, match: str, kind: type[UserError] = CheckpointError) -> None:
    """Neither verifying nor loading takes a checkpoint, and both say so in one line."""
    for action in (verify_checkpoint, load_checkpoint):
        with pytest.raises(kind, match=match) as caught:
            action(path)
        assert "\n" not in str(caught.value)
        assert type(caught.value) is kind


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1) / name
    content = file.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(content) // 2, len(content) - 2}):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf"{name}: .*damaged"):
            inspect_checkpoint(tmp_path / "last")
        refused(tmp_path / "last", rf"{name}: .*damaged")
    file.write_bytes(content + b" ")
    if name != "manifest.json":  # a space behind it changes nothing
        refused(tmp_path / "last", rf"{name}: .*damaged")
    file.unlink()
    refused(tmp_path / "last", rf"{name}: .*No such file")
    file.mkdir()
    refused(tmp_path / "last", rf"{name}: not a plain file")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1, size=20) / name
    content = file.read_bytes()
    for position in range(len(content)):
        flipped = content[position] ^ 1 << position % 8
        file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            verify_checkpoint(tmp_path / "last")
    file.write_bytes(content)
    assert assert_good(tmp_path / "last") == 1


def change_manifest(file: Path, **change: Any) -> None:
    """Rewrites a manifest with its own hash right again."""
    content = json.loads(file.read_text()) | change
    content.pop("sha256")
    own = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    file.write_text(json.dumps(content | {"sha256": own}))


def renew_manifest(folder: Path) -> None:
    """The manifest says of each file what it now is."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name in files:
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder / "manifest.json", files=files)


RECORD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": None},
        {"format_version": 0},
        {"format_version": "2"},
        {"format_version": True},
        {"step": "1"},
        {"step": -1},
        {"step": True},
        {"step": 2**70},
        {"tensors": None},
        {"tensors": ["../../x"]},
        {"tensors": [3]},
        {"tensors": ["optimizer", "weights", "model"]},
        {"tensors": ["optimizer", "optimizer", "weights"]},
        {"files": []},
        {"files": {}},
        {"files": {"../state.json": RECORD}},
        {"files": {"/etc/passwd": RECORD}},
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    change_manifest(folder / "manifest.json", **change)
    refused(tmp_path / "last", r"manifest\.json: not the manifest of a TrackNet checkpoint")


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "notes.txt", "state.json\n"])
def test_a_manifest_that_names_another_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for changed in (files | {name: RECORD}, {**{k: v for k, v in files.items() if k != "state.json"}, name: files["state.json"]}):
        change_manifest(folder / "manifest.json", files=changed)
        refused(tmp_path / "last", r"manifest\.json: not the manifest of a TrackNet checkpoint")


@pytest.mark.parametrize("record", [None, {}, RECORD | {"bytes": -1}, RECORD | {"bytes": "1"}, RECORD | {"sha256": "0" * 63}])
def test_a_record_of_another_form_is_refused(tmp_path: Path, record: object) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change_manifest(folder / "manifest.json", files=files | {"state.json": record})
    refused(tmp_path / "last", r"manifest\.json: not the manifest of a TrackNet checkpoint")


def test_a_newer_format_is_named_and_damage_is_none(tmp_path: Path) -> None:
    file = save(CheckpointStore(tmp_path, 1), 1) / "manifest.json"
    content = file.read_text()
    change_manifest(file, format_version=3, tensors={"other": "form"})
    refused(tmp_path / "last", r"manifest\.json: format_version 3 is newer than this TrackNet reads \(up to 2\)", UserError)
    file.write_text(content.replace('"format_version": 2', '"format_version": 3'))
    refused(tmp_path / "last", r"manifest\.json: its content is not what its own sha256 says")


def test_a_step_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    folder.rename(tmp_path / "step-00000002")
    refused(tmp_path / "step-00000002", "it holds the checkpoint of step 1")
    (tmp_path / "step-00000002").rename(tmp_path / "kept")
    assert assert_good(tmp_path / "kept") == 1


@pytest.mark.parametrize("group", ["model", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path: Path, group: str, value: float, dtype: torch.dtype) -> None:
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    tensors = tensors_of(2)
    tensors[group] |= {"odd": torch.tensor([1.0, value], dtype=dtype)}
    with pytest.raises(UserError, match="step 2 was not written: odd holds NaN or infinity; lower") as caught:
        store.save(2, MODEL_TEXTS, tensors, {}, False)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == {"step-00000001", "last"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracknet.training.tensor_file._all_finite", lambda *_: True)
        store.save(2, MODEL_TEXTS, tensors, {}, False)
    refused(tmp_path / "last", rf"{group}\.safetensors: tensor 'odd' holds NaN or infinity")
    optimizer = tensors_of(3)
    optimizer["optimizer"]["odd"] = torch.tensor(value, dtype=dtype)
    store.save(3, MODEL_TEXTS, optimizer, {}, False)
    assert torch.equal(load_checkpoint(tmp_path / "last").tensors["optimizer"]["odd"].isfinite(), torch.tensor(False))


# Folders of others


@pytest.mark.parametrize("name", FILES)
def test_links_pipes_and_devices_are_not_opened(tmp_path: Path, name: str) -> None:
    folder = save(CheckpointStore(tmp_path / "run", 1), 1)
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, rf"{name}: not a plain file")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, rf"{name}: not a plain file")
    (folder / name).unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind(str(folder / name))
        except OSError:  # the path is too long for one
            return
        refused(folder, rf"{name}: not a plain file")


@pytest.mark.parametrize("name", ["last", "best", "step-00000001"])
@pytest.mark.parametrize("target", ["{good}", "../other/step-00000001", "../other/last", ".", "..", "/", "last"])
def test_a_link_leads_to_no_other_folder(tmp_path: Path, name: str, target: str) -> None:
    good = save(CheckpointStore(tmp_path / "other", 1), 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(target.format(good=good))
    refused(run / name, rf"{name}: a link to '.*', not to a checkpoint beside it")
    assert linked_step(run, name) is None
    (run / "best").unlink(missing_ok=True)
    (run / "best").symlink_to("step-00000001")
    (run / "step-00000001").unlink(missing_ok=True)
    (run / "step-00000001").symlink_to(good)
    refused(run / "best", "step-00000001: a link, not a checkpoint")
    assert saved_steps(run) == {}


def test_a_link_that_points_nowhere_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "last").symlink_to("step-00000001")
    for name in ("last", "step-00000001"):
        refused(tmp_path / name, rf"{name}: there is no checkpoint")


def test_a_run_folder_may_be_behind_a_link(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path / "disk" / "run", 1), 1)
    (tmp_path / "ckpts").symlink_to("disk")
    assert assert_good(tmp_path / "ckpts" / "run" / "last") == 1
    save(CheckpointStore(tmp_path / "ckpts" / "run", 1), 2)
    assert assert_good(tmp_path / "disk" / "run" / "last") == 2


BOMBS = {
    "deep list": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a":' * 100 + b"1" + b"}" * 100,
    "huge integer": b'{"a": ' + b"9" * 100_000 + b"}",
    "huge number": b'{"a": 1e999}',
    "nan": b'{"a": NaN}',
    "twice": b'{"a": 1, "a": 2}',
    "list": b"[]",
    "other text": b"\xff\xfe{\x00}\x00",
    "no json": b"{'a': 1}",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["config.json", "state.json", "manifest.json"])
def test_json_that_is_none_or_a_bomb_is_refused(tmp_path: Path, name: str, bomb: str) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    (folder / name).write_bytes(BOMBS[bomb])
    if name != "manifest.json":
        renew_manifest(folder)
    refused(folder, rf"{name}: (not JSON|not a JSON object|nested deeper)")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_terabyte_is_refused_at_once(tmp_path: Path, name: str) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    os.truncate(folder / name, 2**40)  # a hole, which takes no room
    refused(folder, rf"{name}: (1099511627776 bytes long, its manifest says|larger than)")
    if name.endswith(".json") and name != "manifest.json":
        files = json.loads((folder / "manifest.json").read_text())["files"]
        change_manifest(folder / "manifest.json", files=files | {name: RECORD | {"bytes": 2**40}})
        refused(folder, rf"{name}: larger than 16 MiB")


def test_more_tensors_than_memory_are_refused_at_once(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    write_header(folder / "model.safetensors", {"a": {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]}}, 2**42)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    size = (folder / "model.safetensors").stat().st_size
    change_manifest(folder / "manifest.json", files=files | {"model.safetensors": RECORD | {"bytes": size}})
    refused(folder, "4096.0 GiB of tensors are more than this machine's memory holds")


def write_header(file: Path, header: object, data_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, file.stat().st_size + data_bytes)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **rest: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | rest


HEADERS: dict[str, tuple[object, int]] = {
    "too many bytes": ({"a": entry()}, 9),
    "too few bytes": ({"a": entry()}, 7),
    "other shape": ({"a": entry(shape=[3])}, 8),
    "a hole": ({"a": entry(offsets=[8, 16])}, 16),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, 12),
    "shared": ({"a": entry(), "b": entry()}, 8),
    "backwards": ({"a": entry(shape=[0], offsets=[8, 0])}, 8),
    "negative": ({"a": entry(shape=[-2], offsets=[0, -8])}, 0),
    "negative twice": ({"a": entry(shape=[-1, -2])}, 8),
    "large": ({"a": entry(shape=[2**61, 8], offsets=[0, 2**64])}, 8),
    "overflow": ({"a": entry(shape=[2**47, 2**47, 0], offsets=[0, 0])}, 0),
    "many sides": ({"a": entry(shape=[1] * 65, offsets=[0, 4])}, 4),
    "true": ({"a": entry(shape=[True, 2])}, 8),
    "fraction": ({"a": entry(shape=[2.0])}, 8),
    "text": ({"a": entry(shape=["2"])}, 8),
    "unknown type": ({"a": entry(dtype="F4")}, 8),
    "float8": ({"a": entry(dtype="F8_E4M3", shape=[8])}, 8),
    "complex": ({"a": entry(dtype="C64", shape=[1])}, 8),
    "type of another type": ({"a": entry(dtype=["F32"])}, 8),
    "more keys": ({"a": entry(code="import os")}, 8),
    "no keys": ({"a": {}}, 8),
    "no entry": ({"a": None}, 8),
    "list": ([], 0),
    "twice": (b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}", 8),
    "deep": (b'{"a":' * 200 + b"1" + b"}" * 200, 0),
    "no utf-8": (b'{"\xff": {}}', 0),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_headers_of_another_form_are_refused(tmp_path: Path, name: str, case: str) -> None:
    """Also where a manifest says that the file is as it should be."""
    folder = save(CheckpointStore(tmp_path, 1), 1)
    write_header(folder / name, *HEADERS[case])
    renew_manifest(folder)
    refused(folder, rf"{name}: .*damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_header_that_claims_too_much_and_a_pickle_are_refused(tmp_path: Path, name: str) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    for content in ((2**60).to_bytes(8, "little") + b"{}" * 50, pickle.dumps({"a": 1}) * 10, b"PK\x03\x04" * 10):
        (folder / name).write_bytes(content)
        renew_manifest(folder)
        refused(folder, rf"{name}: .*damaged")


def test_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    text = json.dumps({"a": entry("BOOL", [1], [0, 1])}).encode()
    (folder / "optimizer.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\x02")
    renew_manifest(folder)
    refused(folder, "neither true nor false")


# Format 1


OLD = Path(__file__).parent / "checkpoint_v1" / "run-20261124-120004-s42" / "step-00000006"


def test_format_1_is_still_read() -> None:
    checkpoint = load_checkpoint(OLD)
    assert (checkpoint.format_version, checkpoint.step, set(checkpoint.tensors)) == (1, 6, {"model", "optimizer", "weights"})
    assert checkpoint.state["seed"] == 42
    assert inspect_checkpoint(OLD).tensor_names == ("optimizer", "weights")
    for name, tensors in checkpoint.tensors.items():
        expected = load_file(OLD / f"{name}.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())


@pytest.mark.parametrize("change", [{"format_version": 0}, {"format_version": 2}, {"step": "6"}, {"tensors": ["../x"]}, {"state": []}])
def test_damage_in_format_1_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / OLD.name))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | change))
    refused(folder, r"state\.json: not the state of a TrackNet checkpoint")

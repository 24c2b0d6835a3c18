"""The note that a sharded run leaves for its restart: taken whole, or refused in one line."""

import json

import pytest

from tracknet.errors import UserError
from tracknet.schema.training import TrainingConfig
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.size_note import FILE, read_size_note, remove_size_note, write_size_note


def sizes_after_one_failure() -> dict[str, MicroBatchSize]:
    size = MicroBatchSize(8, TrainingConfig())
    size.back_off(0)
    return {"whole_model": size}


def test_a_note_is_read_as_it_was_written_and_goes(tmp_path):
    sizes = sizes_after_one_failure()
    write_size_note(tmp_path, sizes, 4)
    noted = read_size_note(tmp_path, sizes)
    assert noted is not None
    restored = MicroBatchSize(8, TrainingConfig())
    assert restored.restore(noted["whole_model"])
    assert restored.as_json() == sizes["whole_model"].as_json()
    remove_size_note(tmp_path, 4)  # a checkpoint that was being written when memory ran out lacks the sizes
    assert read_size_note(tmp_path, sizes) == noted
    remove_size_note(tmp_path, 5)
    assert read_size_note(tmp_path, sizes) is None
    remove_size_note(tmp_path, 6)


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: [],
        lambda note: {},
        lambda note: {"frozen_backbone": note["whole_model"]},
        lambda note: {"whole_model": 3},
        lambda note: {"whole_model": note["whole_model"] | {"value": 3}},
        lambda note: {"whole_model": note["whole_model"] | {"failures": [1]}},
        lambda note: {"whole_model": note["whole_model"] | {"failures": ["1"] * 4}},
        lambda note: {"whole_model": note["whole_model"] | {"clean_steps": "4"}},
        lambda note: {"whole_model": {key: value for key, value in note["whole_model"].items() if key != "climbing"}},
    ],
)
def test_a_note_of_something_else_is_refused_in_one_line(damage, tmp_path):
    sizes = sizes_after_one_failure()
    write_size_note(tmp_path, sizes, 4)
    note = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(note | {"sizes": damage(note["sizes"])}))
    with pytest.raises(UserError, match="remove it to go on") as raised:
        read_size_note(tmp_path, sizes)
    assert "\n" not in str(raised.value)


def test_a_note_that_is_no_json_is_refused_in_one_line(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff{")
    with pytest.raises(UserError, match="remove it to go on"):
        read_size_note(tmp_path, ["whole_model"])

"""A model goes to the hub, played by a server on this machine, and comes back; nothing else goes along, and a refusal is one line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, Hub, running_hub
from huggingface_hub import constants
from small_models import small_model, windows
from test_card import DETECTION, ORIGIN
from transformers.utils import hub as transformers_hub

from tracknet.errors import ConfigError, UserError
from tracknet.models import TrackNetModel
from tracknet.training.checkpoint_store import CheckpointStore

REPO = "name/repo"
FILES = {"config.json", "model.safetensors", "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def scored_model() -> TrackNetModel:
    model = small_model("vit").eval()
    model.config.detection, model.config.trained_on = dict(DETECTION), dict(ORIGIN)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With an optimizer and the trained weights beside the model."""
    model = scored_model()
    tensors = {"model": dict(model.state_dict()), "optimizer": {"0.exp_avg": torch.ones(5)}, "weights": dict(model.state_dict())}
    return CheckpointStore(tmp_path / "run", 1).save(400, model.model_texts(), tensors, {}, True)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_checkpoint_goes_to_the_hub_and_comes_back_in_a_users_program(checkpoint: Path, tmp_path: Path) -> None:
    """As a user does it: a process of its own, with nothing patched, which learns of the hub from the environment."""
    code = f"""
from tracknet.models import TrackNetModel
TrackNetModel.from_pretrained({str(checkpoint)!r}).push_to_hub({REPO!r})
TrackNetModel.from_pretrained({REPO!r}).save_pretrained({str(tmp_path / "back")!r})
"""
    with running_hub() as hub:
        told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert hub.files == {REPO: bytes_in(checkpoint)}
        assert list(hub.large.values()) == [(checkpoint / "model.safetensors").read_bytes()], "the weights alone go through LFS"
    assert bytes_in(tmp_path / "back") == bytes_in(checkpoint)


def test_the_files_that_arrive_make_a_model_folder(hub: Hub, tmp_path: Path) -> None:
    model = scored_model()
    model.push_to_hub(REPO)
    assert hub.files.keys() == {REPO}
    assert hub.files[REPO].keys() == FILES
    model.save_pretrained(tmp_path / "own")
    assert hub.files[REPO] == bytes_in(tmp_path / "own")
    (tmp_path / "got").mkdir()
    for name, content in hub.files[REPO].items():
        (tmp_path / "got" / name).write_bytes(content)
    loaded = TrackNetModel.from_pretrained(tmp_path / "got")
    assert torch.equal(loaded(*windows(1)), model(*windows(1)))
    assert loaded.config.detection == DETECTION


def test_a_later_push_replaces_the_card_that_is_there(hub: Hub) -> None:
    model = scored_model()
    model.push_to_hub(REPO)
    first = hub.files[REPO]["README.md"]
    model.config.detection["threshold"] = 0.61
    model.push_to_hub(REPO)
    assert hub.files[REPO]["README.md"] == first.replace(b"0.37", b"0.61")


def test_saving_into_a_checkpoints_folder_pushes_no_optimizer(hub: Hub, checkpoint: Path) -> None:
    model = TrackNetModel.from_pretrained(checkpoint)
    model.save_pretrained(checkpoint, push_to_hub=True, repo_id=REPO)
    assert hub.files == {REPO: bytes_in(checkpoint)}
    assert (checkpoint / "optimizer.safetensors").is_file()


# Refusals


def refusal(push: Any, *, kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        push()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_access_it_says_how_to_log_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    line = refusal(lambda: scored_model().push_to_hub(REPO))
    assert line.startswith(f"push_to_hub: {REPO} was not uploaded: the hub refuses access (401); log in with `hf auth login`")
    assert hub.files == {}


@pytest.mark.parametrize(
    ("part", "status"), [("/preupload/", 403), ("/commit/", 403), ("/validate-yaml", 500), ("/commit/", 507), ("/lfs-put/", 403)]
)
def test_a_hub_that_refuses_at_any_stage_gets_one_line_and_no_file(part: str, status: int, hub: Hub) -> None:
    hub.refuses[part] = status
    line = refusal(lambda: scored_model().push_to_hub(REPO))
    assert line.startswith(f"push_to_hub: {REPO} was not uploaded: ")
    assert str(status) in line
    assert not hub.files[REPO]


def test_without_a_network_it_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as other:
        closed = other.url
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert "was not uploaded: " in refusal(lambda: scored_model().push_to_hub(REPO))


def test_names_that_no_repository_has_and_tags_are_refused(hub: Hub) -> None:
    assert "looks like owner/name" in refusal(lambda: scored_model().push_to_hub("a/b/c"), kind=ConfigError)
    assert "tags cannot be given" in refusal(lambda: scored_model().push_to_hub(REPO, tags=["fast"]), kind=ConfigError)
    assert hub.asked == []

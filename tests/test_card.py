"""The model card: what the hub reads from it, what it tells a reader, and that it says nothing that config.json does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from small_checkpoints import MODEL_TEXTS, assert_good, names_in, save, tensors_of
from small_models import FAMILIES, HEATMAP_WH, INPUT_WH, data_config, small_model, vit

from tracknet.errors import ConfigError, UserError
from tracknet.models import TrackNetConfig, TrackNetModel, build_model
from tracknet.models.card import model_card
from tracknet.training.checkpoint import CheckpointError, inspect_checkpoint, load_checkpoint, verify_checkpoint
from tracknet.training.checkpoint_store import CheckpointStore
from tracknet.training.manifest import FileRecord, Manifest, read_manifest

DETECTION = {"threshold": 0.37, "protocol": "tracknetv2", "f1": 0.87654, "games": ["game8", "game10"], "frames": 731, "step": 400}
BEFORE = {"data": "padel", "licence": "MIT", "train_games": ["p1"], "val_games": ["p2"]}
ORIGIN: dict[str, Any] = {
    "data": "tennis",
    "licence": None,
    "train_games": ["game1", "game2"],
    "val_games": ["game8", "game10"],
    "step": 400,
}


def config_of(**fields: Any) -> TrackNetConfig:
    known: dict[str, Any] = {"architecture": "vit_heatmap", "frames": 3, "background": True, "input_size": INPUT_WH}
    known |= {"heatmap_size": HEATMAP_WH, "sigma": 2.0, "detection": DETECTION, "trained_on": ORIGIN}
    return TrackNetConfig(**known | fields)


def front_of(config: TrackNetConfig) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(model_card(config).split("---\n")[1])
    return front


def test_the_hub_reads_the_front_matter() -> None:
    front = front_of(config_of())
    assert front["library_name"] == "tracknet"
    assert {"tracknet", "ball-tracking", "vit_heatmap"} <= set(front["tags"])
    assert front["metrics"] == ["f1"]
    data = ModelCard(model_card(config_of())).data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type, result.dataset_split) == ("f1", 0.8765, "tennis", "validation")
    assert result.metric_name == "F1, protocol tracknetv2, threshold 0.37 chosen on these games"
    assert result.dataset_name == "tennis: game8, game10"


def test_a_reader_learns_how_it_was_scored_and_how_to_run_it() -> None:
    text = model_card(config_of())
    for words in (
        "F1 0.8765 at a detection threshold of 0.37, by the protocol `tracknetv2`",
        "on 731 labelled frames of the validation games game8, game10",
        "the best F1 in the evaluation after 400 updates",
        "on the games that chose the threshold, and on which training chooses its best checkpoint, so other footage may score lower",
        "Trained on: game1, game2.",
        "Validated on: game8, game10.",
        "from tracknet import BallTracker",
        "python -m tracknet.scripts.predict --checkpoint",
        "3 neighbouring frames",
        "96 x 64 px",
    ):
        assert words in text, words
    assert "one frame in" in model_card(config_of(frames=1, background=False))


def test_weights_that_were_not_evaluated_carry_no_score_of_their_own() -> None:
    later = config_of(trained_on=ORIGIN | {"step": 450})
    assert "model-index" not in front_of(later)
    assert "These weights have 450 updates and were not evaluated themselves." in model_card(later)
    assert "were not evaluated" not in model_card(config_of())


def test_a_model_without_a_past_says_so() -> None:
    bare = config_of(detection=None, trained_on=None)
    assert front_of(bare)["license"] == "other"
    assert "model-index" not in front_of(bare)
    for words in ("What it was trained on is not on record.", "No threshold was chosen", "Training data: not on record.", "random weights"):
        assert words in model_card(bare), words
    assert "no evaluation has found a ball" in model_card(config_of(detection=None))


@pytest.mark.parametrize(
    ("licence", "pretrained", "expected", "words"),
    [
        ("Apache-2.0", None, "apache-2.0", "Training data: Apache-2.0 (`tennis`)."),
        ("CC-BY-4.0", "facebook/dinov2-small", "apache-2.0", "the weights of `facebook/dinov2-small`, Apache-2.0"),
        (None, None, "other", "Training data: none is on record for `tennis`"),
        ("all rights reserved", None, "other", "Training data: all rights reserved"),
        ("MIT", "facebook/convnextv2-tiny-1k-224", "other", "CC-BY-NC-4.0"),
        ("MIT", "facebook/dinov3-vits16-pretrain-lvd1689m", "other", "DINOv3 License"),
        ("MIT", "somebody/dinov2-tuned", "other", "see the card of `somebody/dinov2-tuned`"),
        ("MIT", "dinov2-small", "other", "see the card of `dinov2-small`"),
        ("MIT", "/home/me/dinov2", "other", "see the card of `/home/me/dinov2`"),
        ("MIT", "../dinov2", "other", "see the card of `../dinov2`"),
    ],
)
def test_the_licences_of_code_data_and_backbone_are_told_apart(licence, pretrained, expected, words) -> None:
    config = config_of(trained_on=ORIGIN | {"licence": licence}, pretrained=pretrained)
    assert front_of(config)["license"] == expected
    assert words in model_card(config)
    assert "Code: Apache-2.0." in model_card(config)
    assert front_of(config).get("base_model") == (pretrained if pretrained and pretrained[0].isalpha() and "/" in pretrained else None)


@pytest.mark.parametrize(
    ("own", "before", "expected", "words"),
    [
        ("MIT", BEFORE, "apache-2.0", "Training data of the weights it started from: MIT (`padel`)."),
        ("MIT", BEFORE | {"licence": "CC-BY-NC-4.0"}, "other", "started from: CC-BY-NC-4.0 (`padel`)."),
        ("MIT", BEFORE | {"licence": None}, "other", "started from: none is on record for `padel`"),
        (None, BEFORE, "other", "Training data: none is on record for `tennis`"),
        ("MIT", None, "other", "started from: not on record."),
    ],
)
def test_weights_that_started_from_others_are_under_the_strictest_licence(own, before, expected, words) -> None:
    config = config_of(trained_on=ORIGIN | {"licence": own, "started_from": [BEFORE, before]})
    text = model_card(config)
    assert front_of(config)["license"] == expected
    assert words in text
    assert "Those had seen the data `padel`: trained on p1, validated on p2." in text
    assert ("What those were trained on is not on record." in text) == (before is None)
    assert ("trained from random weights" in text) == (before is not None)


STRANGE = [
    'x: "y" --- license: mit #',
    "# <script>alert(1)</script>",
    "![seen](https://example.org/x.png) [here](https://example.org)",
    "*a* __b__ ~~c~~ | d | `e` ``f`` $g$ &amp; <b>h</b> \\",
]


def shape_and_text(text: str) -> tuple[list[str], str]:
    """The kinds of the Markdown's parts without the plain text, which is the second value."""
    parts = [part for block in MarkdownIt().enable("strikethrough").parse(text) for part in (block.children or [block])]
    plain = "".join(part.content for part in parts if part.type in ("text", "text_special", "code_inline"))
    return [part.type for part in parts if part.type not in ("text", "text_special")], plain


@pytest.mark.parametrize("strange", STRANGE)
def test_names_from_a_file_stay_text(strange: str) -> None:
    def card_with(name: str) -> str:
        origin = {"data": name, "licence": name, "train_games": [name], "val_games": [name]}
        chosen = DETECTION | {"games": [name], "protocol": name}
        return model_card(config_of(trained_on=origin | {"step": 400, "started_from": [origin]}, detection=chosen, pretrained=name))

    data = ModelCard(card_with(strange)).data
    assert (data.license, data.library_name, data.base_model) == ("other", "tracknet", None)
    bodies = [card_with(name).split("---\n", 2)[2] for name in (strange, "plain")]
    (shape, text), (plain_shape, plain_text) = map(shape_and_text, bodies)
    assert shape == plain_shape
    assert text == plain_text.replace("plain", strange)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("trained_on", ORIGIN | {key: "a\n# b"}) for key in ("data", "licence")),
        ("trained_on", ORIGIN | {"train_games": ["a\x1b[2J"]}),
        ("trained_on", ORIGIN | {"val_games": []}),
        ("trained_on", ORIGIN | {"step": -1}),
        ("trained_on", ORIGIN | {"step": True}),
        ("trained_on", ORIGIN | {"more": 1}),
        ("trained_on", ORIGIN | {"started_from": None}),
        ("trained_on", ORIGIN | {"started_from": [3]}),
        ("trained_on", ORIGIN | {"started_from": [BEFORE | {"data": "a\u2028b"}]}),
        ("pretrained", 3),
        ("pretrained", "a\nb"),
    ],
)
def test_a_past_that_is_none_is_one_clear_line(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {field} is .*; set it to null$") as caught:
        config_of(**{field: value})
    assert str(caught.value).isprintable()


# Where it is written


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_card_is_a_function_of_config_json(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    model.config.detection, model.config.trained_on = dict(DETECTION), dict(ORIGIN)
    model.save_pretrained(tmp_path / "first")
    loaded = TrackNetModel.from_pretrained(tmp_path / "first")
    assert loaded.config.detection == DETECTION
    assert loaded.config.trained_on == ORIGIN
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_bytes() == (tmp_path / "first" / "README.md").read_bytes()
    from_file = TrackNetConfig.from_dict(json.loads((tmp_path / "first" / "config.json").read_text()))
    assert model_card(from_file) == (tmp_path / "first" / "README.md").read_text()


def test_a_local_backbone_gives_its_name_and_not_this_machines_path(tmp_path: Path) -> None:
    folder = tmp_path / "secret-place" / "dinov2-tiny"
    small_model("vit").network.backbone.save_pretrained(folder)
    config = vit()
    config.pretrained_model_name = str(folder)
    model = build_model(config, data_config(), INPUT_WH)
    assert model.config.pretrained == "dinov2-tiny"
    assert "secret-place" not in "".join(model.model_texts().values())


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    model = small_model("unet")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file is a file; give the model a folder$"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match=r"^the model cannot be saved to .*: Not a directory$"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


# In a checkpoint


def without_card(folder: Path) -> None:
    """As an older TrackNet has left it."""
    manifest = read_manifest(folder)
    (folder / "README.md").unlink()
    files = {name: record for name, record in manifest.files.items() if name != "README.md"}
    (folder / "manifest.json").write_text(Manifest(manifest.step, manifest.tensor_names, files).as_text())


def test_a_checkpoint_proves_its_card(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    assert (folder / "README.md").read_text() == MODEL_TEXTS["README.md"]
    for change in (lambda: (folder / "README.md").write_text("# TrackNot\n"), lambda: (folder / "README.md").unlink()):
        change()
        for read in (inspect_checkpoint, verify_checkpoint, load_checkpoint):
            with pytest.raises(CheckpointError, match=r"README\.md"):
                read(folder)


def test_a_checkpoint_from_before_there_were_cards_is_valid(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, 1), 1)
    without_card(folder)
    assert assert_good(folder) == 1
    verify_checkpoint(folder)
    files = dict(read_manifest(folder).files)
    for wrong in (files | {"notes.md": FileRecord(0, "0" * 64)}, {name: files[name] for name in files if name != "config.json"}):
        (folder / "manifest.json").write_text(Manifest(1, ("optimizer", "weights"), wrong).as_text())
        with pytest.raises(CheckpointError, match="not the manifest"):
            inspect_checkpoint(folder)


def test_pruning_takes_our_card_and_leaves_a_users(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    without_card(save(store, 1))
    (tmp_path / "step-00000001" / "README.md").write_text("mine")
    save(store, 2)
    assert [file.name for file in (tmp_path / "step-00000001").iterdir()] == ["README.md"]
    assert (tmp_path / "step-00000001" / "README.md").read_text() == "mine"
    save(store, 3)
    assert names_in(tmp_path) == {"step-00000001", "step-00000003", "last"}


def test_a_deletion_that_was_cut_short_leaves_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    unlink, count = Path.unlink, []

    def fail_after(file: Path, *arguments: Any, **options: Any) -> None:
        count.append(file)
        if len(count) > allowed:
            raise OSError(5, "Input/output error")
        unlink(file, *arguments, **options)

    for allowed in range(7):
        count.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fail_after)
            save(store, 2 + 2 * allowed)
        save(store, 3 + 2 * allowed)
        assert names_in(tmp_path) == {f"step-{3 + 2 * allowed:08d}", "last"}


def test_what_a_checkpoint_is_made_of_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        CheckpointStore(tmp_path, 1).save(1, {"config.json": "{}"}, tensors_of(1), {}, False)
    assert not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)

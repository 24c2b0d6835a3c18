"""What `train.log` tells in time: footage on both sides before the first step, and a network that learns nothing at each evaluation."""

import signal

import numpy as np
from clips import write_clip
from stopped_runs import train
from test_train import arguments, only_run

from tracknet.scripts.train import main
from tracknet.training import run
from tracknet.training.provenance import warn_of_known_games


def log_of(output):
    return (only_run(output / "logs") / "train.log").read_text()


def test_a_clip_on_both_sides_is_told_before_the_first_step(clips, tmp_path):
    train(arguments(clips, tmp_path, "training.epochs=1"))  # both games of these clips show the same
    text = log_of(tmp_path)
    assert "run folder" in text
    assert text.index("frames of game2/Clip1 (val_games) are copies") < text.index("step 1/")


def test_the_clips_are_compared_once_and_on_the_main_rank(clips, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(run, "log_leaks", lambda datasets, stop_requested: compared.append(stop_requested()))
    train(arguments(clips, tmp_path, "training.epochs=1"))
    assert compared == [False]


def test_a_signal_that_comes_while_they_are_compared_is_heard_there(clips, tmp_path, monkeypatch):
    heard = []

    def compare(_datasets, stop_requested):
        signal.raise_signal(signal.SIGTERM)
        heard.append(stop_requested())

    monkeypatch.setattr(run, "log_leaks", compare)
    assert main(arguments(clips, tmp_path, "training.epochs=1")) == 75
    assert heard == [True]
    assert (only_run(tmp_path / "checkpoints") / "last" / "config.json").is_file()


def test_a_network_that_has_learned_nothing_is_named_at_each_evaluation_and_not_before(clips, tmp_path):
    settings = ["training.epochs=2", "training.optimizer.lr=1e-12", "training.evaluation.threshold=0.99"]
    train(arguments(clips, tmp_path, *settings))
    text = log_of(tmp_path)
    assert text.count("no peak reaches the threshold 0.99 on 20 frames with a ball") == 2
    assert text.index("step 1/") < text.index("no peak reaches")
    assert "training.optimizer.lr" in text[text.index("no peak reaches") :]


def test_a_network_that_finds_the_ball_is_left_in_peace(tmp_path):
    for game in ("game1", "game2"):
        xy = write_clip(tmp_path / "root" / game / "Clip1", count=20, size_wh=(128, 96))
    assert np.ptp(xy[:, 0]) > 64
    sizes = ["data.preprocess.resize=[128,96]", "model.heatmap.size=[128,96]"]
    train(
        arguments(
            tmp_path / "root",
            tmp_path / "out",
            *sizes,
            "training.epochs=6",
            "training.evaluation.every_epochs=6",
            "training.optimizer.lr=2e-2",
            "training.ema_decay=0",
        )
    )
    text = log_of(tmp_path / "out")
    assert "no peak reaches" not in text
    assert "in one place" not in text


def test_games_are_known_by_their_data_and_in_all_that_the_weights_go_back_to(caplog):
    own = {"data": "tennis", "licence": None, "train_games": ["game1"], "val_games": ["game2", "game3"], "step": 0}
    other = {"data": "padel", "licence": None, "train_games": ["game2"], "val_games": ["game9"]}
    for trained_on in (None, own, own | {"started_from": [None, other, other | {"data": "tennis", "train_games": ["game8"]}]}):
        warn_of_known_games(trained_on)
    assert caplog.messages == []
    warn_of_known_games(own | {"started_from": [other | {"data": "tennis", "train_games": ["game3", "game2"]}, other]})
    assert [message.split(",")[0] for message in caplog.messages] == ["training.init_from: its weights were trained on game2"]
    assert "game2, game3, which data.split.val_games has now" in caplog.text


def test_a_licence_that_no_card_can_hold_is_refused_before_decoding(clips, tmp_path, capfd):
    assert main(arguments(clips, tmp_path, 'data.licence="MIT\\n# x"')) == 2
    assert "data.licence: 'MIT\\n# x' holds a control character" in capfd.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("*"))

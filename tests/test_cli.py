"""The command line of training: what it prints where, and with which code it leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from tracknet.errors import DataError
from tracknet.scripts import train
from tracknet.utils.config import build_cfg

CHECKOUT = Path(__file__).resolve().parents[1]
EXAMPLES = [
    [],
    ["--data", "tracknet", "--model", "vit_heatmap", "--training", "default"],
    ["training.optimizer.lr=1e-4"],
    ["--data", "demo", "--model", "demo", "--training", "demo"],
]
MISTAKES = [
    (["training.batchsize=3"], "training.batch_size"),
    (["training.batch_size=many"], "training.batch_size"),
    (["training.batch_size=0"], "training.batch_size"),
    (["training.seed"], "key=value"),
    (["--data", "nowhere"], "demo, tennis, tracknet"),
    (["--data", "../data/demo"], "demo, tennis, tracknet"),
    (["--dry-rnu"], "--dry-run"),
    (["--outputdir", "x"], "--output-dir"),
    (["--dry"], "--dry-run"),
    (["-x"], "-x"),
    (["--training.epochs=3"], "training.epochs=3"),
    (["--seed", "x"], "--seed"),
    (["--seed"], "--seed"),
    (["--seed", "-1"], "--seed"),
    (["--output-dir", ""], "--output-dir"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--config", "x.yaml", "--data", "demo"], "--config and --data"),
    (["--config", "x.yaml", "--training", "default"], "--config and --training"),
    (["model={}", "model=null"], "model is null"),
    (["model=["], "broken YAML"),
    (["model={backbone:{freeze:true}}"], "model.backbone"),
    (["training=3"], "training is 3"),
    (["training={scheduler: {name: foo}}"], "training.scheduler.name"),
    (["training.optimizer.name=sgd", "training.epochs=0"], "training.epochs"),
    (["data.root=a\nb", "training.epochs=x\ny"], "training.epochs"),
]


def start(*arguments: str, folder: Path = CHECKOUT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the real module in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", EXAMPLES)
def test_a_dry_run_prints_the_configuration_as_yaml_and_nothing_else(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, "--output-dir", "out", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    printed = yaml.safe_load(out)
    assert set(printed) == {"data", "model", "training", "runtime"}
    assert err == ""
    assert "${" not in out
    assert printed["runtime"]["output_root"] == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if "training.optimizer.lr=1e-4" in arguments:
        assert printed["training"]["optimizer"]["lr"] == 1e-4


def test_the_printed_yaml_rebuilds_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKNET_TIMESTAMP", "20300102-030405")
    assert train.main(["--data", "demo", "--model", "demo", "--training", "demo", "--seed", "3", "training.epochs=2", "--dry-run"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(first, encoding="utf-8")
    assert train.main(["--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_mistake_is_one_line_on_stderr_and_code_2(
    arguments: list[str], words: str, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments, "--dry-run"] if dry_run and arguments != ["--seed"] else arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.endswith("\n")
    assert words in err


def test_the_nearest_option_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--outputdir", "x"])
    assert "did you mean --output-dir?" in capsys.readouterr().err


def test_broken_yaml_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "mine.yaml").write_text("epochs: 1\nseed: [1\n")
    monkeypatch.setenv("TRACKNET_CONFIG_DIR", str(tmp_path))
    assert train.main(["--training", "mine", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/training/mine.yaml:3: ")


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_only_rank_0_prints_the_configuration(
    rank: str, speaks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert train.main(["--dry-run"]) == 0
    assert bool(capsys.readouterr().out) is speaks


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([], None),
        (["--resume"], "auto"),
        (["--resume", "auto"], "auto"),
        (["--resume", "runs/step-1"], "runs/step-1"),
        (["--resume=a=b/step-1"], "a=b/step-1"),
        (["--resume", "training.epochs=4"], "auto"),
        (["--resume", "--seed", "3"], "auto"),
    ],
)
def test_resume(arguments: list[str], resume: str | None) -> None:
    parsed, overrides = train.parse_arguments(["training.epochs=3", *arguments])
    assert parsed.resume == resume
    assert overrides == ["training.epochs=3", *[text for text in arguments if text == "training.epochs=4"]]


def test_a_path_that_looks_like_an_override_is_a_path_where_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.parse_arguments(["--resume", "a=b/c"])[0].resume == "auto"
    (tmp_path / "a=b" / "c").mkdir(parents=True)
    parsed, overrides = train.parse_arguments(["--resume", "a=b/c", "training.epochs=4"])
    assert (parsed.resume, overrides) == ("a=b/c", ["training.epochs=4"])


def test_the_help_of_resume_says_which_run_is_continued() -> None:
    text = " ".join(train.build_parser().format_help().split())
    assert "the newest run of the same names and seed under the output folder, or the run folder or checkpoint PATH" in text


def test_what_training_raises_and_returns_becomes_the_exit_code_and_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "exit.json"
    monkeypatch.setenv("TRACKNET_EXIT_FILE", str(record))

    def fails(cfg: DictConfig, resume: str | None) -> int:
        raise DataError("Label.csv:3: two\nlines")

    def interrupted(cfg: DictConfig, resume: str | None) -> int:
        raise KeyboardInterrupt

    arguments = ["--output-dir", str(tmp_path / "out"), "--data", "demo"]

    def terminated(cfg: DictConfig, resume: str | None) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    saved = "stopped by a signal and saved; --resume auto continues it"
    unsaved = "stopped by a signal before the first step; start it again, with --resume auto where a run is to go on"
    for body, code, shown, recorded in (
        (fails, 1, "Label.csv:3: two lines", "Label.csv:3: two lines"),
        (interrupted, 130, "interrupted", "interrupted"),
        (lambda cfg, resume: 75, 75, "", saved),  # training itself has logged it
        (terminated, 75, unsaved, unsaved),
    ):
        monkeypatch.setattr("tracknet.training.run.train", body)
        assert train.main(arguments) == code
        assert capsys.readouterr().err.strip() == shown
        assert json.loads(record.read_text()) == {"code": code, "message": recorded}
        record.unlink()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr("tracknet.training.run.train", lambda cfg, resume: 0)
    assert train.main(arguments) == 0


def test_a_failure_of_one_rank_alone_is_told_by_that_rank_once_the_speaker_had_time_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(train.time, "sleep", lambda seconds: waited.append(seconds) or capsys.readouterr())
    for local_rank, told in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert train.main(["--data", "nowhere"]) == 2
        assert len(waited) == told
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_programming_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cfg: DictConfig, resume: str | None) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("tracknet.training.run.train", broken)
    with pytest.raises(ZeroDivisionError):
        train.main(["--output-dir", str(tmp_path), "--data", "demo"])


def test_training_gets_the_configuration_and_the_resume_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("TRACKNET_TIMESTAMP", "20300102-030405")
    monkeypatch.setattr("tracknet.training.run.train", lambda cfg, resume: seen.append((cfg, resume)) or 0)
    assert train.main(["--data", "demo", "--seed", "5", "--output-dir", str(tmp_path), "training.epochs=3", "--resume"]) == 0
    assert seen == [(build_cfg("demo", overrides=["training.epochs=3"], seed=5, output_dir=tmp_path), "auto")]


def test_help_imports_no_torch() -> None:
    done = start("-X", "importtime", "-m", "tracknet.scripts.train", "--help")
    assert done.returncode == 0
    assert "--output-dir" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "omegaconf" in imported
    assert not imported & {"torch", "transformers", "accelerate", "wandb", "cv2", "numpy"}


def test_a_dry_run_imports_no_torch() -> None:
    code = "import sys; from tracknet.scripts.train import main; assert main(['--dry-run']) == 0; print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in run.stderr.split()} & {"torch", "transformers", "accelerate", "wandb", "cv2", "numpy"}


def test_the_module_leaves_with_the_code() -> None:
    done = start("-m", "tracknet.scripts.train", "--nope")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_a_reader_may_leave_early() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tracknet.scripts.train", "--dry-run"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tracknet.scripts.train", "--dry-run"]
        done = subprocess.run(command, cwd=CHECKOUT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "stdout" in done.stderr

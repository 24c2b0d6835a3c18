import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clips import write_games
from omegaconf import OmegaConf

from tracknet.scripts import cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_games(tmp_path / "data", ["a", "b", "c"], clips=2)
    return tmp_path


def arguments(root: Path, *more: str) -> list[str]:
    games = ["data.split.train_games=[a]", "data.split.val_games=[b]", "data.split.test_games=[c]"]
    return [
        "--data",
        "tennis",
        f"data.root={root / 'data'}",
        f"data.cache_dir={root / 'cache'}",
        *games,
        *more,
    ]


def test_all_sides_are_decoded_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache.main(arguments(root, "data.cache_form=jpeg")) == 0
    assert capsys.readouterr().out.startswith(f"decoded 6 clips (48 frames)\n{root / 'cache' / 'frames'} holds 6 clips (48 frames)")
    names = [path.name for path in (root / "cache" / "frames").iterdir()]
    assert sorted(name[0] for name in names if name.endswith(".jpegs")) == ["a", "a"]  # what scores a model is raw
    assert cache.main(arguments(root, "data.cache_form=jpeg")) == 0
    assert capsys.readouterr().out.startswith("decoded 0 clips (0 frames)\n")


def test_it_makes_no_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.main(arguments(root, "--output-dir", str(root / "out"))) == 0
    assert not (root / "out").exists()


def test_a_dry_run_prints_the_configuration_and_decodes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache.main(arguments(root, "--dry-run", "data.cache_limit_gb=2.5")) == 0
    assert OmegaConf.create(capsys.readouterr().out).data.cache_limit_gb == 2.5
    assert not (root / "cache").exists()


def test_what_has_no_room_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache.main(arguments(root, "data.cache_limit_gb=0")) == 0
    assert "no room for 6 clips (48 frames): they are decoded whenever they are read\n" in capsys.readouterr().out


def test_broken_clips_end_it_or_are_skipped(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data" / "b" / "Clip1" / "0003.png").write_bytes(b"no picture")
    assert cache.main(arguments(root)) == 1
    assert re.search(r"^\S*0003\.png: unreadable picture \(no known picture format\)$", capsys.readouterr().err, re.MULTILINE)
    assert cache.main(arguments(root, "data.on_error=skip")) == 0
    assert "skipped 1 broken clips (data.on_error=skip)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["data.cache_form=png"], r"data\.cache_form.*one of raw, jpeg"),
        (["data.cache_limit_gb=-1"], r"data\.cache_limit_gb.*>= 0"),
        (["--dats", "x"], r"unknown option --dats; did you mean --data\?"),
        (["data.split.val_games=[z]"], r"z"),
    ],
)
def test_a_mistake_is_one_line(root: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str) -> None:
    assert cache.main(arguments(root, *more)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(line, error)


def test_a_disk_that_is_full_fails(root: Path) -> None:
    disk = root / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("a small disk cannot be mounted here")
    try:
        command = [sys.executable, "-m", "tracknet.scripts.cache", *arguments(root), f"data.cache_dir={disk}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert ended.returncode == 1
    assert "6 of 6 clips are not in" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_help_imports_no_torch() -> None:
    call = "try:\n    cache.main(['--help'])\nexcept SystemExit:\n    pass\n"
    code = f"import sys\nfrom tracknet.scripts import cache\n{call}assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    assert "data.cache_limit_gb" in ended.stdout

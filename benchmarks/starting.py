"""How long it takes until something happens: `uv run python benchmarks/starting.py`, about four minutes.

Every figure is of new processes, with warm files. What is measured to the first step is the tennis recipe on real tennis, all of its
pictures in the cache, Weights & Biases disabled.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from footage import video_clips
from ratios import Row, alternate, seconds, significant, spread_of, time_ratio

SCRIPTS = ("train", "predict", "evaluate", "export", "report", "cache")
TORCH = "import torch"
LIBRARIES = "import torch, transformers, accelerate, wandb, av, cv2"
# transformers' names load what they need on first use, and making any optimizer of torch imports torch._dynamo
IN_USE = f"{LIBRARIES}; from transformers import PreTrainedModel; torch.optim.AdamW([torch.zeros(1)])"
GAMES = {"train": ["game1", "game2", "game3", "game5", "game7"], "val": ["game8", "game10"]}
FIRST_STEP = "step 1/"


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def first_step(folder: Path) -> None:
    """Starts training and returns when the log has the first step; then the process is ended."""
    games = [f"data.split.{side}_games=[{','.join(names)}]" for side, names in GAMES.items()]
    settings = [f"data.root={folder / 'clips'}", f"data.cache_dir={folder / 'cache'}", f"training.output_dir={folder / 'runs'}", *games]
    command = ["--data", "tennis", "--model", "unet", "--training", "tennis", *settings, "training.tracking.log_every_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tracknet.scripts.train", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if FIRST_STEP in line:
            break
    else:
        raise RuntimeError("".join(said))
    process.kill()
    process.wait()


def help_rows(count: int) -> list[Row]:
    rows = []
    for script in SCRIPTS:
        times = [seconds(partial(python, "-m", f"tracknet.scripts.{script}", "--help")) for _ in range(count + 1)][1:]
        rows.append(Row(f"`{script} --help`", "", "< 1 s", spread_of(times), "seconds, not a ratio"))
    return rows


def ratio_row(what: str, mine: partial[None], code: str, target: str, pairs: int, remark: str = "") -> Row:
    """How many times as long as some imports it takes."""
    taken, importing = alternate(mine, partial(python, "-c", code), pairs=pairs)
    figures = f"{significant(median(taken))} and {significant(median(importing))} s"
    return Row(what, f"`{code}`", target, time_ratio(taken, importing), f"{figures}{remark}")


def rows(pairs: int = 6) -> list[Row]:
    """All rows. Raises NoFootageError."""
    dry = partial(python, "-m", "tracknet.scripts.train", "--data", "tennis", "--model", "unet", "--training", "tennis", "--dry-run")
    made = [*help_rows(pairs), ratio_row("`train --dry-run`", dry, TORCH, "< 1.2", pairs)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video_clips(folder / "clips", [*GAMES["train"], *GAMES["val"]])
        first_step(folder)  # fills the cache
        step = partial(first_step, folder)
        remark = "; what any training with these libraries imports: transformers' model class and torch._dynamo, by its optimizers"
        made.append(ratio_row("start to the first step done", step, IN_USE, "< 1.5", pairs, remark))
        made.append(ratio_row("the same", step, LIBRARIES, "< 1.5", pairs, "; the bare imports alone, which load no model class"))
        time.sleep(1.0)  # workers of the last process go
    return made


if __name__ == "__main__":
    for row in rows():
        print(row)

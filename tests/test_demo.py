"""The synthetic rallies are hard in the way that real ones are: the ball is known by its motion."""

from pathlib import Path

import pytest
from test_train import metrics_of

from tracknet.scripts.train import main

STEPS = 700


def best_f1(output: Path, frames: int) -> float:
    """F1 on the demo's unseen courts after `STEPS` steps on windows of `frames` frames, without the background."""
    settings = [
        f"data.sequence.length={frames}",
        "data.background=none",
        f"training.max_steps={STEPS}",
        "training.evaluation.every_epochs=2",
        "training.data_loader.num_workers=0",
        "training.tracking.previews=0",
    ]
    assert main(["--data", "demo", "--model", "demo", "--training", "demo", "--output-dir", str(output), *settings]) == 0
    return max(line["val/f1_tracknetv2"] for line in metrics_of(output) if "val/f1_tracknetv2" in line)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_frame_in_stays_far_below_three_frames_in_after_the_same_steps(tmp_path):
    one, three = best_f1(tmp_path / "one", 1), best_f1(tmp_path / "three", 3)
    print(f"one frame {one:.3f}, three frames {three:.3f}")
    assert three >= 0.5  # otherwise both have just learned nothing
    assert one <= three - 0.15

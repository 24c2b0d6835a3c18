"""One real window can be learnt by heart: rendering, loss, step and decoding agree on where the ball is."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from clips import first_frames_of_real_clip

from tracknet.data.dataset import WindowDataset
from tracknet.data.formats import read_clips
from tracknet.data.frames import FrameStore
from tracknet.evaluation.detection import detect
from tracknet.geometry import resize_points
from tracknet.losses import frame_losses
from tracknet.models import build_model
from tracknet.schema.training import OPTIMIZERS
from tracknet.training.gradient import SummedLoss
from tracknet.training.microbatch import MicroBatchSize
from tracknet.training.optimization import LearningRate, build_optimizer
from tracknet.training.ranks import Ranks
from tracknet.training.step import TrainingStep
from tracknet.utils.config import build_cfg, typed

STEPS = 200
LR = 5e-3  # at 1e-2 the last bits of a sum decide whether the worst peak ends at 0.8 or at 1.3 px


@pytest.mark.slow
def test_200_steps_on_one_real_window_put_every_peak_within_one_pixel_of_its_label(tmp_path):
    first_frames_of_real_clip(tmp_path / "root", count=3)
    config = typed(build_cfg("tennis", "unet", "tennis", ["training.batch_size=1"], dry_run=True))
    index, _ = read_clips(tmp_path / "root", ["game1"], "stop")
    store = FrameStore(tmp_path / "cache", (512, 288))
    store.prepare(index.clips[0])
    dataset = WindowDataset(index, store, config.data.sequence, background=True, seed=0, training=None)
    batch = dataset.batch([(0, 0)])

    torch.manual_seed(0)
    model = build_model(config.model, config.data, (512, 288))
    optimizer = build_optimizer(OPTIMIZERS["adamw"](lr=LR), model.parameters())
    summed_loss = SummedLoss(
        model,
        lambda logits, target: frame_losses(logits, target, config.training.loss),
        nominal_frames=3,
        sigma=config.model.heatmap.sigma,
        seed=0,
        autocast=nullcontext,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
    )
    training_step = TrainingStep(
        summed_loss,
        optimizer,
        ranks=Ranks(Accelerator(cpu=True)),
        micro_batch=MicroBatchSize(1, config.training),
        clip_norm=5.0,
        describe=dataset.describe,
    )
    learning_rate = LearningRate(config.training.scheduler, optimizer, base=LR, total_steps=STEPS, steps_per_epoch=100)
    for step in range(STEPS):
        learning_rate.apply(step)
        training_step(batch, step, stop=False)

    model.eval()
    detections, _ = detect(model, batch, index, torch.device("cpu"), nullcontext)
    row = detections.row
    assert len(row) == 3
    found, truth = (resize_points(xy.astype(float), (1280, 720), (512, 288)) for xy in (detections.xy_px, index.xy_px[row]))
    distance_input_px = np.linalg.norm(found - truth, axis=1)
    assert (distance_input_px <= 1).all(), distance_input_px
    assert (detections.score >= 0.5).all(), detections.score

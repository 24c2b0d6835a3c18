"""Properties that hold for every network: shapes, independence of the micro-batch, gradients, freezing, precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, HEATMAP_WH, INPUT_WH, convnext, data_config, small_model, vit, windows
from torch import Tensor, nn

from tracknet.data.batch import empty_pictures
from tracknet.heatmap import render_heatmaps
from tracknet.models import TrackNetModel, build_model

families = pytest.mark.parametrize("family", FAMILIES)


@families
@given(height=st.integers(17, 120), width=st.integers(17, 120), frames=st.integers(1, 5), background=st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_picture_size_and_window_gives_one_heatmap_per_frame(
    family: str, height: int, width: int, frames: int, background: bool
) -> None:
    model = small_model(family, frames, background).eval()
    pictures, median = windows(2, frames, (height, width))
    with torch.no_grad():
        logits = model(pictures, median if background else None)
    expected_hw = round(height * HEATMAP_WH[1] / INPUT_WH[1]), round(width * HEATMAP_WH[0] / INPUT_WH[0])
    assert logits.shape == (2, frames, *expected_hw)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@families
def test_windows_that_do_not_fit_the_network_are_refused(family: str) -> None:
    model = small_model(family)
    pictures, median = windows(1)
    with pytest.raises(ValueError, match="3 frames, got 2"):
        model(pictures[:, :2], median)
    with pytest.raises(ValueError, match="takes a background"):
        model(pictures)
    with pytest.raises(ValueError, match="takes no background"):
        small_model(family, background=False)(pictures, median)


@families
def test_single_frames_where_sequences_are_off(family: str) -> None:
    data = data_config(frames=5)
    data.sequence.enabled = False
    assert build_model(FAMILIES[family](), data, INPUT_WH).config.frames == 1


@families
def test_training_starts_near_no_ball(family: str) -> None:
    logits = small_model(family)(*windows(2), dropout_keys=torch.arange(2))
    assert logits.sigmoid().mean() < 0.1


@families
@pytest.mark.parametrize("normalize", [True, False])
def test_pictures_are_normalised_inside(family: str, normalize: bool) -> None:
    model = build_model(FAMILIES[family](), data_config(normalize=normalize), INPUT_WH)
    pictures, median = windows(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if not normalize:
        mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    seen = model._pictures(pictures, median)
    torch.testing.assert_close(seen[:, :, :3], (pictures / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[:, :, 3:], (pictures / 255 - median[:, None] / 255) / std, rtol=1e-5, atol=1e-5)


@families
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_the_order_of_the_pictures_in_memory_changes_no_bit(family: str, background: bool, channels_last: bool, count: int) -> None:
    model = small_model(family, background=background)
    model.use_channels_last(channels_last)
    pictures, median = windows(count)
    found = []
    for order in (torch.clone, as_in_a_batch):
        model.zero_grad()
        seen = model._pictures(order(pictures), order(median) if background else None)
        assert seen.is_contiguous()  # what follows is then the same computation
        logits = model(order(pictures), order(median) if background else None, torch.arange(count))
        logits.square().mean().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def as_in_a_batch(pictures: Tensor) -> Tensor:
    """The same in the memory of a `Batch`."""
    copy = empty_pictures(*pictures.shape[:-3], size_wh=(pictures.shape[-1], pictures.shape[-2]))
    assert copy.shape == pictures.shape
    assert not copy.is_contiguous()
    return copy.copy_(pictures)


@families
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_layout_asked_for_reaches_weights_and_features_and_changes_only_last_bits(family: str, channels_last: bool) -> None:
    model = small_model(family).eval()
    with torch.no_grad():
        expected = model(*windows(2))
        model.use_channels_last(channels_last)
        found = model(*windows(2))
        features: list[Tensor] = []
        convolution = next(module for module in model.network.modules() if isinstance(module, nn.Conv2d) and module.weight.shape[-1] > 1)
        convolution.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
        model(*windows(2))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert convolution.weight.is_contiguous(memory_format=memory_format)
    if family == "unet":
        assert features[0].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("size_hw", [(64, 96), (37, 53)])
def test_a_batch_equals_its_splits(family: str, size_hw: tuple[int, int]) -> None:
    model = small_model(family).double().train()
    pictures, median = windows(5, size_hw=size_hw)
    whole = model(pictures, median)
    for size in (1, 2):
        parts = [model(p, m) for p, m in zip(pictures.split(size), median.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_a_batch_equals_its_splits_with_dropout() -> None:
    torch.manual_seed(0)
    model = build_model(vit(dropout=0.4), data_config(), INPUT_WH).double().train()
    pictures, median = windows(4)
    keys = torch.tensor([7, -3, 2**62, 7])
    whole = model(pictures, median, keys)
    parts = [model(pictures[i : i + 1], median[i : i + 1], keys[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    assert not torch.allclose(model(pictures, median, keys + 1), whole)
    torch.testing.assert_close(model.eval()(pictures, median), model(pictures, median, keys), rtol=0, atol=0)
    with pytest.raises(ValueError, match="dropout_keys"):
        model.train()(pictures, median)


@families
@pytest.mark.parametrize("background", [True, False])
def test_gradient_reaches_every_parameter(family: str, background: bool) -> None:
    model = small_model(family, background=background)
    pictures, median = windows(2)
    model(pictures, median if background else None).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


@families
def test_every_frame_and_the_background_matter(family: str) -> None:
    model = small_model(family).eval()
    with torch.no_grad():  # the input adapter starts by ignoring the difference
        for name, parameter in model.named_parameters():
            if name.startswith("network.adapter"):
                parameter.add_(0.1)
    pictures, median = windows(1)
    before = model(pictures, median)
    for frame in range(3):
        changed = pictures.clone()
        changed[:, frame] = 255 - changed[:, frame]
        assert not torch.allclose(model(changed, median), before)
    assert not torch.allclose(model(pictures, 255 - median), before)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_the_adapter_starts_as_the_identity_on_rgb(family: str) -> None:
    adapter = small_model(family).network.adapter
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(adapter(x), x[:, :3])


@families
def test_a_frozen_backbone_stays_while_the_rest_trains(family: str) -> None:
    config = FAMILIES[family]()
    config.backbone.freeze = True
    torch.manual_seed(0)
    model = build_model(config, data_config(), INPUT_WH).train()
    backbone = model.network.backbone
    assert model.training
    assert not any(module.training for module in backbone.modules())
    frozen = {id(p) for p in model.backbone_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(*windows(2)).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) in frozen), name

    model.freeze_backbone(False)
    assert all(module.training for module in backbone.modules())
    assert all(p.requires_grad for p in model.parameters())
    model.eval().freeze_backbone(True)
    assert not any(module.training for module in model.modules())


@families
def test_a_frozen_backbone_keeps_no_graph_unless_the_adapter_needs_it(family: str) -> None:
    for background in (True, False):
        model = small_model(family, background=background)
        model.freeze_backbone(True)
        needs_grad: list[bool] = []
        last = list(model.network.backbone.modules())[-1]
        last.register_forward_hook(lambda _module, _input, output, seen=needs_grad: seen.append(output.requires_grad))
        pictures, median = windows(1)
        model(pictures, median if background else None)
        assert needs_grad == [background and family != "unet"]


@families
def test_no_layer_depends_on_the_rest_of_the_batch(family: str) -> None:
    assert not [m for m in small_model(family).modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(family: str, dtype: torch.dtype) -> None:
    model = small_model(family)
    pictures, median = windows(2)
    full = model(pictures, median)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(pictures, median)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, full, rtol=0, atol=0.1)
    logits.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def overfit(model: TrackNetModel, steps: int, lr: float) -> Tensor:
    """Distance in cells between peak and truth of each frame after training on one window with a ball drawn into noise."""
    pictures, median = windows(1)
    pictures //= 4
    median //= 4
    xy_input = torch.tensor([[[20.0, 14.0], [50.0, 30.0], [80.0, 50.0]]])
    pictures = torch.maximum(pictures, (render_heatmaps(xy_input, torch.ones(1, 3) > 0, (64, 96), 2.5) * 255)[:, :, None].byte())
    xy_heatmap = (xy_input + 0.5) / 2 - 0.5
    target = render_heatmaps(xy_heatmap, torch.ones(1, 3) > 0, (32, 48), 1.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(pictures, median), target, reduction="sum").backward()
        optimizer.step()
    peaks = model.eval()(pictures, median).flatten(2).argmax(dim=2)
    found = torch.stack([peaks % 48, peaks // 48], dim=-1)
    return (found - xy_heatmap).norm(dim=-1)


@families
def test_one_window_can_be_learnt(family: str) -> None:
    steps, lr = (200, 1e-3) if family == "vit" else (120, 5e-3)
    assert overfit(small_model(family), steps, lr).max() < 1.0


@pytest.mark.parametrize("return_stages", [(1,), (2, 3), (1, 4)])
@pytest.mark.parametrize("fuse", ["sum", "concat"])
def test_convnext_takes_any_stages_and_builds_none_in_vain(fuse: str, return_stages: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build_model(convnext(fuse, return_stages), data_config(), INPUT_WH)
    logits = model(*windows(1, size_hw=(50, 77)))
    assert logits.shape == (1, 3, 25, round(77 / 2))
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(model.network.backbone.encoder.stages) == max(return_stages)

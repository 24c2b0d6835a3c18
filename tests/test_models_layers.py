"""Small parts of the networks: the half-pixel rule on grids, keyed dropout, every setting of the decoder."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import INPUT_WH, data_config, unet, vit, windows
from torch import Tensor, nn

from tracknet.geometry import resize_points
from tracknet.models import TrackNetModel, build_model
from tracknet.models.decoder import SqueezeExcite, UpsamplingDecoder, upsample_layer
from tracknet.models.layers import KeyedChannelDropout, PerSampleConv1x1, keyed_uniform, resample
from tracknet.models.vit import tokens_to_grid
from tracknet.schema.model import DecoderConfig


def coordinate_map(cells_hw: tuple[int, int], picture_hw: tuple[int, int], stride_hw: tuple[float, float]) -> Tensor:
    """(1, 2, h, w) float64: x and y in input px of each cell's centre."""
    y, x = torch.meshgrid(torch.arange(cells_hw[0]).double(), torch.arange(cells_hw[1]).double(), indexing="ij")
    return torch.stack([(x + 0.5) * stride_hw[1] - 0.5, (y + 0.5) * stride_hw[0] - 0.5])[None]


def expected_map(size_hw: tuple[int, int], picture_hw: tuple[int, int]) -> Tensor:
    """The same for the heatmap's cells, by `geometry`."""
    y, x = torch.meshgrid(torch.arange(size_hw[0]).double(), torch.arange(size_hw[1]).double(), indexing="ij")
    xy = resize_points(torch.stack([x, y], dim=-1), (size_hw[1], size_hw[0]), (picture_hw[1], picture_hw[0]))
    return xy.permute(2, 0, 1)[None]


@given(
    picture=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    stride=st.sampled_from([2, 4, 8]),
    multiple=st.sampled_from([8, 16]),
    share=st.floats(0.3, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_resampling_a_padded_grid_keeps_the_half_pixel_rule(picture: tuple[int, int], stride: int, multiple: int, share: float) -> None:
    padded = tuple(side + -side % multiple for side in picture)
    cells = (padded[0] // stride, padded[1] // stride)
    size_hw = (max(round(picture[0] * share), 1), max(round(picture[1] * share), 1))
    got = resample(coordinate_map(cells, picture, (stride, stride)), (picture[0] / stride, picture[1] / stride), size_hw)
    want = expected_map(size_hw, picture)
    assert got.shape == want.shape
    inside = (
        (want >= 0.5 * stride).all(dim=1) & (want[:, 0] < picture[1] - stride) & (want[:, 1] < picture[0] - stride)
    )  # no clamped border
    torch.testing.assert_close(got[:, :, inside[0]], want[:, :, inside[0]], rtol=0, atol=1e-5)


@given(grid=st.tuples(st.integers(2, 12), st.integers(2, 12)), prefix=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_tokens_lie_on_the_grid_row_by_row_without_the_prefix(grid: tuple[int, int], prefix: int) -> None:
    rows, columns = grid
    patches = torch.arange(rows * columns).float()
    tokens = torch.cat([torch.full((prefix,), -1.0), patches])[None, :, None].expand(2, -1, 3)
    assert torch.equal(tokens_to_grid(tokens, grid)[1, 2], patches.view(rows, columns))


class PatchMeans(nn.Module):
    """Stands for a ViT: each token is its patch's mean, after a class token and four registers."""

    def forward(self, pixel_values: Tensor) -> "PatchMeans":
        means = F.avg_pool2d(pixel_values, 14).flatten(2).transpose(1, 2)
        self.last_hidden_state = torch.cat([torch.full_like(means[:, :1], 9.0).expand(-1, 5, -1), means], dim=1)
        return self


@pytest.mark.parametrize("picture_hw", [(288, 512), (98, 140), (61, 83)])
def test_the_patch_grid_spans_the_whole_picture(picture_hw: tuple[int, int]) -> None:
    """Coordinates painted into the picture come back at the heatmap's cells where `geometry` has them."""
    network = build_model(vit(), data_config(), INPUT_WH).network
    network.backbone = PatchMeans()
    picture = F.pad(coordinate_map(picture_hw, picture_hw, (1, 1)), (0, 0, 0, 0, 0, 1))
    features = network.patch_features(picture)
    assert features.shape[-2:] == (-(-picture_hw[0] // 14), -(-picture_hw[1] // 14))
    size_hw = (picture_hw[0] // 2, picture_hw[1] // 2)
    got = resample(features, (features.shape[-2], features.shape[-1]), size_hw)[:, :2]
    want = expected_map(size_hw, picture_hw)
    inside = (want >= 14).all(dim=1) & (want[:, 0] < picture_hw[1] - 15) & (want[:, 1] < picture_hw[0] - 15)
    assert inside.any()
    torch.testing.assert_close(got[:, :, inside[0]], want[:, :, inside[0]], rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["bilinear", "nearest", "deconv", "pixelshuffle"])
def test_each_doubling_is_symmetric_about_its_cells(name: str) -> None:
    """With a kernel that is, flipping before or after is the same: no half cell is lost to one side."""
    torch.manual_seed(0)
    layer = upsample_layer(name, 4, 3).double()
    for parameter in layer.parameters():
        if name == "deconv" and parameter.dim() == 4:
            parameter.data = parameter.data + parameter.data.flip(-1)
        if name == "pixelshuffle":  # the channels of an output's two columns
            columns = parameter.data.view(3, 2, 2, -1)
            parameter.data = (columns + columns.flip(2)).view(parameter.shape)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    assert layer(x).shape == (2, 3, 10, 14)
    torch.testing.assert_close(layer(x.flip(-1)), layer(x).flip(-1))


def test_the_unet_halves_symmetrically() -> None:
    """Flipping kernels and picture flips the features: cell i is centred on input px 2i + 0.5."""
    encoder = build_model(unet(), data_config(), INPUT_WH).network.backbone.double()
    x = torch.randn(1, 18, 32, 48, dtype=torch.float64)
    before = encoder(x)
    for parameter in encoder.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.flip(-1)
    for features, flipped in zip(before, encoder(x.flip(-1)), strict=True):
        torch.testing.assert_close(flipped.flip(-1), features)


def test_dropout_drops_whole_channels_keeps_the_mean_and_depends_on_the_key_alone() -> None:
    dropout = KeyedChannelDropout(0.3, stream=1).train()
    x = torch.ones(4000, 16, 2, 3)
    keys = torch.arange(4000)
    y = dropout(x, keys)
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
    values = y[:, :, 0, 0]
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (values == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    order = torch.randperm(4000)
    assert torch.equal(dropout(x, keys[order]), y[order])
    assert torch.equal(dropout(x, keys), y)
    other = KeyedChannelDropout(0.3, stream=2).train()(x, keys)[:, :, 0, 0]
    both = ((values == 0) & (other == 0)).float().mean().item()
    assert both == pytest.approx(0.09, abs=0.01)  # two places draw independently


def test_keyed_numbers_are_uniform_and_neighbouring_keys_unrelated() -> None:
    numbers = keyed_uniform(torch.arange(-500, 500), 256, stream=0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 16, 0, 1) / numbers.numel()
    assert (counts - 1 / 16).abs().max() < 0.003
    centred = numbers - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 0.002
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 0.002


def decoder_layers(**changes: object) -> UpsamplingDecoder:
    return UpsamplingDecoder(8, DecoderConfig(**{**asdict(DecoderConfig(channels=[12, 8])), **changes}))


def kinds(module: nn.Module) -> list[type]:
    return [type(m) for m in module.modules()]


def test_every_key_of_the_decoder_changes_it() -> None:
    x = torch.randn(2, 8, 3, 5)
    assert decoder_layers()(x, None).shape == (2, 8, 12, 20)
    assert decoder_layers(channels=[12, 10, 6])(x, None).shape == (2, 6, 24, 40)
    assert nn.ConvTranspose2d in kinds(decoder_layers(upsample="deconv"))
    assert nn.PixelShuffle in kinds(decoder_layers(upsample="pixelshuffle"))
    assert len(decoder_layers(blocks_per_stage=3).stages[0].blocks) == 3
    for name, kind in {"group": nn.GroupNorm, "layer": nn.LayerNorm}.items():
        assert any(issubclass(k, kind) for k in kinds(decoder_layers(norm=name)))
    assert not any("Norm" in k.__name__ for k in kinds(decoder_layers(norm="none")))
    for name, kind in {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}.items():
        assert kind in kinds(decoder_layers(activation=name))
    deep = decoder_layers(use_depthwise=True)
    assert [m.groups for m in deep.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)] == [12, 8]
    attention = [m for m in decoder_layers(use_se=True, se_reduction=4).modules() if isinstance(m, SqueezeExcite)]
    assert [m.squeeze.out_channels for m in attention] == [3, 2]
    assert [s.dropout.probability for s in decoder_layers(dropout=0.25).stages] == [0.25, 0.25]


@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "deconv", "pixelshuffle"])
@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_every_decoder_trains(upsample: str, norm: str) -> None:
    changes = {"upsample": upsample, "norm": norm, "use_depthwise": norm == "layer", "use_se": True, "dropout": 0.1}
    model: TrackNetModel = build_model(vit(**changes), data_config(), INPUT_WH)
    logits = model(*windows(2), dropout_keys=torch.arange(2))
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_heads_convolution_is_the_plain_one_in_training_too() -> None:
    torch.manual_seed(0)
    head = PerSampleConv1x1(5, 3, kernel_size=1).double()
    features = torch.randn(4, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(features, head.weight, head.bias)
    torch.testing.assert_close(head(features), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(head.eval()(features), expected, rtol=0, atol=0)
    head.train()
    parts = [features, *head.parameters()]
    ours, plain = (torch.autograd.grad(maps.square().sum(), parts) for maps in (head(features), expected))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

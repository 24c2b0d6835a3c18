"""Rendering and decoding are inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracknet.heatmap import decode_peaks, render_heatmaps


def logits_of(probability: torch.Tensor) -> torch.Tensor:
    return torch.logit(probability.clamp(1e-12, 1 - 1e-12))


@given(st.floats(1, 46), st.floats(1, 30), st.floats(1.0, 4.0))
def test_decoding_finds_the_rendered_position_to_a_hundredth_of_a_cell(x, y, sigma):
    xy = torch.tensor([[x, y]], dtype=torch.float64)
    target = render_heatmaps(xy, torch.tensor([True]), (32, 48), sigma)
    found, score = decode_peaks(logits_of(target * 0.9))
    assert found[0].tolist() == pytest.approx([x, y], abs=1e-2)
    assert float(score[0]) <= 0.9 + 1e-6


def test_a_peak_in_the_corner_is_found_there():
    target = render_heatmaps(torch.tensor([[[0.0, 0.0], [47.0, 31.0]]]), torch.ones(1, 2, dtype=torch.bool), (32, 48), 2.0)
    found, _ = decode_peaks(logits_of(target))
    assert found.tolist() == [[[0, 0], [47, 31]]]


def test_a_frame_without_a_ball_is_an_all_zero_target_whatever_its_coordinates():
    xy = torch.tensor([[float("nan"), 3.0], [5.0, 5.0]])
    target = render_heatmaps(xy, torch.tensor([False, True]), (8, 8), 1.0)
    assert torch.equal(target[0], torch.zeros(8, 8))
    assert target[1, 5, 5] == 1


def test_rendering_many_at_once_equals_one_by_one():
    xy = torch.rand(2, 3, 2) * 20
    visible = torch.tensor([[True, False, True], [True, True, False]])
    together = render_heatmaps(xy, visible, (16, 24), 2.5)
    for b in range(2):
        for t in range(3):
            assert torch.equal(together[b, t], render_heatmaps(xy[b, t], visible[b, t], (16, 24), 2.5))

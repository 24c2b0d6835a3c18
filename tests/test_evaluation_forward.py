"""On a CPU windows go through a network one after the other, and nothing of the answer shows it."""

import pytest
import torch
from small_models import small_model
from torch import Tensor

from tracknet.evaluation.forward import logits_of


@pytest.mark.parametrize("background", [True, False])
def test_on_a_cpu_no_more_than_one_window_is_in_the_network_at_once(background: bool) -> None:
    model = small_model("unet", 3, background).train(False)
    width, height = model.config.input_size
    frames = torch.randint(0, 256, (3, 3, 3, height, width), dtype=torch.uint8)
    beside = frames[:, 0] if background else None
    given = []

    def network(windows: Tensor, backgrounds: Tensor | None, keys: Tensor | None) -> Tensor:
        given.append((len(windows), None if backgrounds is None else len(backgrounds)))
        logits: Tensor = model(windows, backgrounds, keys)
        return logits

    with torch.no_grad():
        together, whole = logits_of(network, frames, beside), model(frames, beside)
    assert given == [(1, 1 if background else None)] * 3
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-4)

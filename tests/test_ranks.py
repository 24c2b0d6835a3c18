"""What ends one rank ends all of them, in one line."""

import pytest
import torch
from accelerate import Accelerator

from tracknet.errors import UserError
from tracknet.training.ranks import Ranks


def allocate_far_too_much():
    return torch.empty(2**60, dtype=torch.uint8)


def misuse():
    return torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize("method", ["together", "on_main"])
def test_memory_that_runs_out_on_the_way_is_a_line_and_other_errors_keep_their_traceback(method):
    run = getattr(Ranks(Accelerator(cpu=True)), method)
    with pytest.raises(UserError, match=r"^out of memory: .*choose a smaller model") as raised:
        run(allocate_far_too_much)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(misuse)

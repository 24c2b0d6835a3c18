"""The precision map: what is asked for, what the device has."""

import pytest
import torch

from tracknet.errors import ConfigError
from tracknet.schema.training import TrainingConfig
from tracknet.training.precision import resolve_precision, supported_precisions

CPU, OLD_GPU, GPU = ("fp32",), ("fp16", "fp32"), ("bf16", "fp16", "fp32")


@pytest.mark.parametrize(
    ("precision", "amp", "supported", "expected"),
    [
        ("auto", False, CPU, "fp32"),
        ("auto", False, OLD_GPU, "fp16"),
        ("auto", False, GPU, "bf16"),
        (None, True, GPU, "bf16"),
        (None, True, CPU, "fp32"),
        (None, False, GPU, "fp32"),
        ("fp16", False, GPU, "fp16"),
        ("fp32", False, GPU, "fp32"),
    ],
)
def test_precision_map(precision, amp, supported, expected):
    assert resolve_precision(TrainingConfig(precision=precision, amp=amp), supported) == expected


@pytest.mark.parametrize(
    ("precision", "amp", "supported"), [("fp16", False, CPU), ("bf16", False, CPU), ("bf16", False, OLD_GPU), ("fp32", True, GPU)]
)
def test_what_cannot_be_had_is_refused_with_the_alternatives(precision, amp, supported):
    with pytest.raises(ConfigError, match=r"training\.precision.*auto"):
        resolve_precision(TrainingConfig(precision=precision, amp=amp), supported)


def test_a_cpu_trains_in_fp32_only():
    # accelerate would train fp32 under the name of fp16 there, without a word
    assert supported_precisions(torch.device("cpu")) == ("fp32",)

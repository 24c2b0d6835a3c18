"""Exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tracknet.errors import UserError
from tracknet.training.sharding import as_sharded


class Ema:
    """Averages of a model's floating-point parameters, in fp32, on the parameters' devices and sharded as they are.

    `average <- d * average + (1 - d) * weight` after every step, with `d = min(decay, (1 + n) / (10 + n))` where n counts the updates
    before this one. Averaging of iterates: Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992; the exponential form and its
    warm-up: `tf.train.ExponentialMovingAverage` with `num_updates`.

    Buffers are not averaged: the model that holds the averages (`averaged`) has its own current buffers.

    Args:
        model: on its final device already; its parameters may be frozen and unfrozen later.
        decay: above 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay is {decay}, not between 0 and 1")
        floating = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
        self._names = [name for name, _ in floating]
        self._weights: list[Tensor] = [p for _, p in floating]
        self._averages = [p.detach().to(torch.float32, copy=True) for p in self._weights]
        self._decay = decay
        self.updates = 0  # how many there were; part of the state

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the present weights; to be called once after every optimizer step."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        weights = [w.detach().to(torch.float32) for w in self._weights]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the averages inside, and bit for bit its own weights again afterwards, whatever happened inside.

        The weights are copied into the tensors that the model has, so that views of them (flat buffers, optimizer) stay true.
        """
        own = [w.detach().clone() for w in self._weights]
        try:
            self._overwrite_weights(self._averages)
            yield
        finally:
            self._overwrite_weights(own)

    @torch.no_grad()
    def _overwrite_weights(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._weights, values)

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, fp32, not copied; with `updates` they are the whole state."""
        return dict(zip(self._names, self._averages, strict=True))

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from saved averages; they are copied.

        Args:
            tensors: what `state_tensors` gave, or a model file written inside `averaged`, whose buffers are left out here.
            updates: the value of `updates` then.

        Raises:
            UserError: an average is not there or has another shape; nothing has been changed then.
        """
        for name, average in zip(self._names, self._averages, strict=True):
            if name not in tensors:
                raise UserError(f"the saved averages lack {name}: they are of another model")
            if tensors[name].shape != average.shape:
                saved, own = list(tensors[name].shape), list(average.shape)
                raise UserError(f"the saved average {name} has shape {saved}, the model's has {own}: they are of another model")
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(as_sharded(tensors[name], average))
        self.updates = updates

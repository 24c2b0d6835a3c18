"""The gradient of a summed loss, micro-batch by micro-batch: what every way of making a step has in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from tracknet.data.batch import Batch
from tracknet.errors import ConfigError
from tracknet.geometry import resize_points
from tracknet.heatmap import render_heatmaps

NORM_PIECE = 1 << 16  # numbers


class SummedLoss:
    """Adds the gradient of a micro-batch's summed loss to the parameters' `.grad`."""

    def __init__(
        self,
        model: nn.Module,
        frame_losses: Callable[[Tensor, Tensor], Tensor],
        *,
        nominal_frames: int,
        sigma: float,
        seed: int,
        autocast: Callable[[], AbstractContextManager[None]],
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ) -> None:
        """Takes its parts.

        Args:
            model: `(frames, background, dropout_keys) -> logits`, see `tracknet.models`.
            frame_losses: (logits, target) -> loss of each frame, (B, T).
            nominal_frames: frames of a full batch of one rank. The sum is divided by it before the backward pass, which keeps fp16 in
                range; whoever makes the update multiplies by it again.
            sigma: of the Gaussian targets, in heatmap cells.
            seed: of the run, for dropout.
            autocast: the precision that the forward pass runs in.
            scaler: of fp16's loss; disabled otherwise.
            device: where the model is.
        """
        self.model, self.scaler, self.nominal_frames = model, scaler, nominal_frames
        self._frame_losses, self._sigma, self._seed = frame_losses, sigma, seed
        self._autocast, self._device = autocast, device
        scaler.scale(torch.zeros(1, device=device))  # it makes its scale at its first use, which a rank without samples would never reach

    def backward(self, batch: Batch, step: int) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            batch: of b samples, in host memory.
            step: the update's number in the run.

        Returns:
            (b,), each sample's loss summed over its labelled frames.
        """
        keys = dropout_keys(self._seed, step, batch.sample_index)
        _seed_generators(self._device, int(keys[0]))  # for dropout inside a pretrained backbone, which takes no keys
        batch, keys = batch.to(self._device), keys.to(self._device)
        with self._autocast():
            logits = self.model(batch.frames, batch.background, keys)
        height, width = batch.frames.shape[-2:]
        size_hw = (logits.shape[-2], logits.shape[-1])
        xy_heatmap = resize_points(batch.xy_input, (width, height), (size_hw[1], size_hw[0]))
        losses = self._frame_losses(logits, render_heatmaps(xy_heatmap, batch.visible, size_hw, self._sigma))
        per_sample = torch.where(batch.labeled, losses, torch.zeros_like(losses)).sum(dim=1)
        torch.autograd.backward(self.scaler.scale(per_sample.sum() / self.nominal_frames))
        return per_sample.detach()


class Gradients:
    """The gradients of the trainable parameters. A lone process takes those that autograd makes. Of several ranks, each is moved as soon as
    it is there into its place in one buffer, which a single collective reduces; what further micro-batches give is added there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, flat: bool) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        first = self._parameters[0]
        size = sum(p.numel() for p in self._parameters)
        self._buffer = torch.zeros(size, dtype=first.dtype, device=first.device) if flat else None
        self._places = {} if self._buffer is None else dict(zip(self._parameters, self._places_in(self._buffer), strict=True))
        # each knows its place alone: one that knew its parameter would keep it in memory for ever, a circle that Python does not see
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(_move, place))  # type: ignore[no-untyped-call]
            for p, place in self._places.items()
        ]

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def tensors(self) -> list[Tensor]:
        """All gradients, to be changed in place: the one buffer, or one for each parameter."""
        for parameter in self._parameters:
            if parameter.grad is None:  # the batch was empty, or the loss does not depend on it
                parameter.grad = self._places[parameter].zero_() if self._places else torch.zeros_like(parameter)
        return [self._buffer] if self._buffer is not None else [p.grad for p in self._parameters if p.grad is not None]

    def close(self) -> None:
        """Leaves the parameters alone from here on."""
        for hook in self._hooks:
            hook.remove()

    def _places_in(self, buffer: Tensor) -> Iterator[Tensor]:
        """A view for each parameter, with its strides: to one laid out otherwise would be added slowly."""
        start = 0
        for parameter in self._parameters:
            yield buffer.as_strided(parameter.shape, parameter.stride(), start)
            start += parameter.numel()


@torch.no_grad()
def _move(place: Tensor, parameter: Tensor) -> None:
    """Puts a new gradient into its place; one that is there already has been added to there."""
    if parameter.grad is not None and parameter.grad is not place:
        parameter.grad = place.copy_(parameter.grad)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all numbers, a float64 scalar (float32 on MPS).

    In pieces of 64 Ki numbers: on a CPU torch sums one long float32 vector so roughly that the norm of 14 M gradients was wrong by 3e-4.
    """
    pieces: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() <= NORM_PIECE:
            pieces.append(tensor)
        else:
            pieces += torch.split(tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()), NORM_PIECE)
    norms = torch.stack(torch._foreach_norm(pieces))
    return norms.to(accumulation_dtype(norms.device)).square().sum()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """For sums over many samples; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuses a model whose normalisation mixes the samples of a micro-batch: its update would depend on the size of that.

    Args:
        model: as it is trained from here on; batch normalisation in evaluation mode, as in a frozen backbone, is exact.

    Raises:
        ConfigError: names the layers.
    """
    mixing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats)
    ]
    if mixing:
        more = f" and {len(mixing) - 1} more" if len(mixing) > 1 else ""
        raise ConfigError(
            f"the model normalises over the samples of a micro-batch (BatchNorm: {mixing[0]}{more}); its updates would depend on how"
            " a step is cut; choose a backbone with GroupNorm or LayerNorm, or freeze it with model.backbone.freeze=true"
        )


def _seed_generators(device: torch.device, seed: int) -> None:
    """Seeds torch's global generators that a forward pass can draw from: the device's, and the CPU's, for layer drop.

    `torch.manual_seed` does the same for every kind of device there is, and notes a traceback for each that is not in use: 0.25 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def dropout_keys(seed: int, step: int, sample_index: Tensor) -> Tensor:
    """A number for each sample that its dropout is drawn from: the same whatever the micro-batch, the rank or the attempt.

    Args:
        seed: of the run.
        step: the update's number.
        sample_index: (B,) int64.

    Returns:
        (B,) int64, >= 0, on the samples' device.
    """
    # odd multipliers (of splitmix64 and xxhash) spread neighbouring seeds, steps and samples; int64 wraps around
    base = (seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F) % 2**62
    return (sample_index * 0x165667B19E3779F9 + base) & (2**62 - 1)

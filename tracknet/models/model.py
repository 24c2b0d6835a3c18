"""The one model class: uint8 windows in, logits out, saved and loaded as a transformers folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tracknet.errors import ConfigError, UserError, shown
from tracknet.models.card import CARD_NAME, model_card
from tracknet.models.configuration import TrackNetConfig
from tracknet.models.folder import CONFIG_NAME, loading_problem, quiet_transformers
from tracknet.models.hub import upload_errors
from tracknet.models.networks import HeatmapNetwork, build_network
from tracknet.models.unet import UnetHeatmap

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of pixels / 255: what torchvision and transformers train with
IMAGENET_STD = (0.229, 0.224, 0.225)

# What transformers and PyTorch raise on a `config.json` whose values are of other types than they take for granted.
BAD_CONFIG_ERRORS = (AttributeError, LookupError, TypeError, ValueError, StrictDataclassError)


class TrackNetModel(PreTrainedModel):
    """Finds the ball in every frame of a window; see `forward` for shapes and `build_model` for making one."""

    config_class = TrackNetConfig
    main_input_name = "frames"

    config: TrackNetConfig
    network: HeatmapNetwork
    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: TrackNetConfig) -> None:
        super().__init__(config)
        self.network = build_network(config)
        self.backbone_frozen = False
        mean = torch.tensor(IMAGENET_MEAN if config.normalize else (0.0, 0.0, 0.0))
        std = torch.tensor(IMAGENET_STD if config.normalize else (1.0, 1.0, 1.0))
        # Saved with the weights: transformers builds on the meta device, where buffers that are not saved stay unset.
        self.register_buffer("pixel_scale", (1.0 / (255.0 * std)).view(3, 1, 1))
        self.register_buffer("pixel_shift", (-mean / std).view(3, 1, 1))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every layer initialises itself where it is made."""

    def forward(self, frames: Tensor, background: Tensor | None = None, dropout_keys: Tensor | None = None) -> Tensor:
        """Logits of the ball's heatmap in every frame.

        Args:
            frames: uint8 (B, T, 3, H, W), RGB, T as in the configuration; any H and W.
            background: uint8 (B, 3, H, W), the clip's median picture under the same geometry; None where the configuration has none.
            dropout_keys: int64 (B,), one per sample; needed in training with dropout above 0. The same key gives the same mask.

        Returns:
            (B, T, h, w) float, with h = round(H * heatmap height / input height), and w alike; float32 under autocast.

        Raises:
            ValueError: another T than the network's, or a background where it has none, or none where it needs one.
        """
        if frames.shape[1] != self.config.frames:
            raise ValueError(f"the network takes windows of {self.config.frames} frames, got {frames.shape[1]}")
        if (background is not None) != self.config.background:
            raise ValueError(f"the network takes {'a' if self.config.background else 'no'} background picture beside the frames")
        size_hw = self.config.heatmap_size_hw((frames.shape[-2], frames.shape[-1]))
        logits: Tensor = self.network(self._pictures(frames, background), size_hw, dropout_keys)
        return logits

    def _pictures(self, frames: Tensor, background: Tensor | None) -> Tensor:
        """Normalised float (B, T, 3, H, W), or (B, T, 6, H, W) with the difference frame - background on the same scale."""
        # Plane by plane from here on, whatever the order in memory of the pictures: so that no last bit depends on where they come from,
        # and because the arithmetic is 2 to 4 times as fast in that order. The conversion to float has to write new memory anyway.
        values = frames.to(self.pixel_scale.dtype, memory_format=torch.contiguous_format)
        pictures = values * self.pixel_scale + self.pixel_shift
        if background is None:
            return pictures
        difference = (values - background.contiguous()[:, None]) * self.pixel_scale
        return torch.cat([pictures, difference], dim=2)

    def use_channels_last(self, enabled: bool) -> None:
        """The order in memory of weights and features: the channels of a pixel together, or plane by plane.

        Speed and last bits depend on it, nothing else. Where this is not called, weights lie plane by plane and the U-Net's features with
        the channels together.
        """
        module: nn.Module = self  # transformers' own `to` hides these types
        module.to(memory_format=torch.channels_last if enabled else torch.contiguous_format)
        if isinstance(self.network, UnetHeatmap):
            self.network.channels_last = enabled

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, from safetensors alone, and with nothing missing or left over; a local folder never asks the hub.

        Args:
            pretrained_model_name_or_path: folder with `config.json` and `model.safetensors`, or an identifier on the hub.
            *args: to transformers.
            **kwargs: to transformers; `use_safetensors` is always true, `ignore_mismatched_sizes` never honoured.

        Returns:
            The model in evaluation mode; with `output_loading_info`, also transformers' report.

        Raises:
            ConfigError: no such model, a `config.json` that describes none, no safetensors weights, or weights that do not fit it.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # mismatches are named and refused below
        try:
            with quiet_transformers():
                loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"model {pretrained_model_name_or_path}: {error}") from error
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"model {pretrained_model_name_or_path} cannot be loaded ({' '.join(str(error).split())})") from error
        except BAD_CONFIG_ERRORS as error:
            reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()))}"
            raise ConfigError(
                f"model {pretrained_model_name_or_path}: its config.json describes no network of this program ({reason})"
            ) from error
        model, report = loaded
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if problem := loading_problem(report, kinds, harmless=lambda _: False):
            raise ConfigError(f"model {pretrained_model_name_or_path}: its weights do not fit its config.json: {problem}")
        return (model, report) if wants_report else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' own (`config.json`, `model.safetensors`), with the card (`README.md`) that the configuration gives.

        Without its progress bar, and under the module's names: left alone it writes the backbone's tensors under the names of older
        versions, which `load_state_dict` would not know again.

        Args:
            save_directory: the folder; made if need be. Files of these names in it are replaced.
            *args: to transformers.
            **kwargs: to transformers; `save_original_format` is always false. `push_to_hub=True` sends what this call has written.

        Raises:
            ConfigError: it is a file.
            UserError: it cannot be written, or the hub refuses or cannot be reached.
        """
        folder = Path(save_directory)
        kwargs["save_original_format"] = False
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; give the model a folder")
        with quiet_transformers(), upload_errors(kwargs.get("repo_id", folder.name)) if kwargs.get("push_to_hub") else _disk_errors(folder):
            super().save_pretrained(save_directory, *args, **kwargs)
            if (folder / CONFIG_NAME).is_file():  # transformers writes on the main process only
                self._write_card(folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' own: makes the repository if need be and commits `config.json`, `model.safetensors` and `README.md`.

        Args:
            repo_id: such as `name/repo`.
            **kwargs: to transformers: `private`, `commit_message`, `revision`, `create_pr`, `token` and others; `tags` is refused.

        Returns:
            What the hub says of the commit.

        Raises:
            ConfigError: `tags` was given.
            UserError: the hub refuses or cannot be reached.
        """
        if kwargs.get("tags"):
            raise ConfigError("push_to_hub: tags cannot be given; the card is made from config.json and has its own")
        with upload_errors(repo_id):
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, after it has put a card of its own there: ours takes its place."""
        self._write_card(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_card(self, folder: Path) -> None:
        (folder / CARD_NAME).write_text(self.model_texts()[CARD_NAME], encoding="utf-8")

    def model_texts(self) -> dict[str, str]:
        """The texts of a model folder by file name, as `save_pretrained` writes them: `config.json` and `README.md`."""
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        return {CONFIG_NAME: self.config.to_json_string(), CARD_NAME: model_card(self.config)}

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that `freeze_backbone` holds still; the rest (input, fusion, decoder, head) always trains."""
        yield from self.network.backbone.parameters()

    def freeze_backbone(self, frozen: bool) -> None:
        """Whether the backbone's parameters stay as they are; a frozen backbone is in evaluation mode even in training."""
        self.backbone_frozen = frozen
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TrackNetModel":
        """Training mode, except for a frozen backbone."""
        super().train(mode)
        if self.backbone_frozen:
            self.network.backbone.eval()
        return self


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Within, a file that cannot be written is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the model cannot be saved to {folder}: {error.strerror or error}") from error


AutoConfig.register("tracknet", TrackNetConfig, exist_ok=True)
AutoModel.register(TrackNetConfig, TrackNetModel, exist_ok=True)

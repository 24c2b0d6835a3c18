"""Types and defaults of `configs/data/*.yaml`."""

from dataclasses import dataclass, field

from tracknet.schema.bounds import bounded


@dataclass
class SplitConfig:
    """Names of the game folders on each side; a game never stands on two."""

    train_games: list[str] = field(default_factory=list)
    val_games: list[str] = field(default_factory=list)
    test_games: list[str] = field(default_factory=list)  # for tracknet.scripts.evaluate alone; training never looks at them


@dataclass
class PreprocessConfig:
    """What happens to every picture before the network; `flip_prob` is for training only."""

    resize: list[int] | None = bounded(None, low=8, length=2)  # (width, height); null keeps the original size
    normalize: bool = True  # subtract the ImageNet mean and divide by its deviation, on the device
    flip_prob: float = bounded(0.0, low=0.0, high=1.0)  # left-right

    @property
    def resize_wh(self) -> tuple[int, int] | None:
        """`resize` as a pair, px; None keeps the original size."""
        return None if self.resize is None else (self.resize[0], self.resize[1])


@dataclass
class SequenceConfig:
    """Windows of `length` neighbouring frames of one clip; the next window starts `stride` frames later."""

    enabled: bool = True
    length: int = bounded(3, low=1)
    stride: int = bounded(1, low=1)

    @property
    def window_frames(self) -> int:
        """T, the frames that go into the network together: `length`, or 1 where sequences are not enabled."""
        return self.length if self.enabled else 1


@dataclass
class AugmentConfig:
    """Training only; one draw for all frames of a window."""

    scale: list[float] = bounded(factory=lambda: [1.0, 1.0], above=0.0, length=2)  # smallest, largest
    brightness: float = bounded(0.0, low=0.0, high=1.0)  # gain is drawn from 1 - b to 1 + b
    reverse_prob: float = bounded(0.0, low=0.0, high=1.0)  # plays the window backwards
    crop: list[int] | None = bounded(None, low=8, length=2)  # (width, height) in input px; null keeps the whole picture
    crop_ball_prob: float = bounded(0.75, low=0.0, high=1.0)  # share of the crops that hold the ball


@dataclass
class SyntheticConfig:
    """The embedded demo's rallies, drawn by `tracknet.data.synthetic`."""

    seed: int = bounded(0, low=0)
    size: list[int] = bounded(factory=lambda: [512, 288], low=64, length=2)  # (width, height)
    clips_per_game: int = bounded(2, low=1)
    frames_per_clip: int = bounded(60, low=1)


@dataclass
class DataConfig:
    root: str | None = None  # folder with the games; null only with `synthetic`
    licence: str | None = None  # of footage and labels, for the model card; null where none is known
    split: SplitConfig = field(default_factory=SplitConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    background: str = bounded("none", choices=("none", "median"))
    on_error: str = bounded("stop", choices=("stop", "skip"))
    cache_dir: str | None = None  # decoded frames; null is $TRACKNET_CACHE_DIR, else ~/.cache/tracknet
    cache_form: str = bounded("raw", choices=("raw", "jpeg"))  # of training's frames; jpeg takes a seventh, its pixels are a JPEG's
    cache_limit_gb: float | None = bounded(None, low=0.0)  # 1e9 bytes; null is no limit; what does not fit is decoded at each reading
    synthetic: SyntheticConfig | None = None

"""Networks that find the ball. Importing this registers `TrackNetModel` with transformers' `AutoConfig` and `AutoModel`."""

from tracknet.models.build import build_model
from tracknet.models.configuration import TrackNetConfig
from tracknet.models.initialise import load_weights_from
from tracknet.models.model import TrackNetModel

__all__ = ["TrackNetConfig", "TrackNetModel", "build_model", "load_weights_from"]

"""Networks that find the ball. Importing this registers `TrackNetModel` with transformers' `AutoConfig` and `AutoModel`."""

from tracknet.models.build import build_model
from tracknet.models.configuration import TrackNetConfig
from tracknet.models.initialise import check_init_from, load_weights_from
from tracknet.models.model import TrackNetModel
from tracknet.models.pretrained import check_pretrained

__all__ = ["TrackNetConfig", "TrackNetModel", "build_model", "check_init_from", "check_pretrained", "load_weights_from"]

"""TrackNet: `from tracknet import BallTracker` finds the ball in a video."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracknet.inference.tracker import BallTracker

__all__ = ["BallTracker"]


def __getattr__(name: str) -> Any:
    """Loads the tracker, and PyTorch with it, when it is first asked for."""
    if name == "BallTracker":
        from tracknet.inference.tracker import BallTracker

        return BallTracker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

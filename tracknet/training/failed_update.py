"""An update that failed on one rank, which the others must not build on."""

from tracknet.errors import UserError
from tracknet.training.ranks import Ranks
from tracknet.training.refusals import HalfMadeUpdateError


class FailedUpdate:
    """Remembers that memory ran out inside an update on this rank, where no collective was left to tell the others."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.reason: UserError | None = None  # of the last update, on this rank

    def raise_on_all(self, own: UserError | None = None) -> None:
        """Raises on all ranks what keeps any of them from going on. All ranks call this, before they build on the last update.

        Args:
            own: this rank's reason, besides an update that failed here.
        """
        failures = self._ranks.gather([failure for failure in (self.reason, own) if failure])
        if failures:
            raise min(failures, key=lambda failure: not isinstance(failure, HalfMadeUpdateError))

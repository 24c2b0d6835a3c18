"""The processes of a run and the few things that they tell each other."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would hold the process group for ever: gloo's threads then abort at exit
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from tracknet.data.prepare import on_all_ranks
from tracknet.errors import UserError
from tracknet.out_of_memory import is_out_of_memory
from tracknet.training.lost_peer import naming_lost_peers

Result = TypeVar("Result")


class Ranks:
    """This process among the others. Every method here is called by all ranks in the same order, or they wait for ever.

    Where another process has gone, each method raises `PeerLostError`, or the `UserError` that it left with.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by its sum over the ranks, in place, to the same bits on each. All ranks call this."""
        if self.size > 1:
            with naming_lost_peers():
                dist.all_reduce(tensor)
        return tensor

    def copy_from_main_(self, tensors: list[Tensor]) -> None:
        """Overwrites tensors by those of the main rank. All ranks call this."""
        if self.size > 1:
            with naming_lost_peers():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' lists joined in the order of the ranks; also a barrier."""
        if self.size == 1:
            return items
        with naming_lost_peers():
            return list(gather_object(items))

    def from_main(self, value: Any) -> Any:
        """The main rank's value."""
        if self.size == 1:
            return value
        with naming_lost_peers():
            return broadcast_object_list([value])[0]

    def together(self, action: Callable[[], Result]) -> Result:
        """Runs something on every rank; a `UserError` on any of them, or memory that runs out, is raised on all."""
        return on_all_ranks(lambda: _memory_is_the_users(action), self.gather)

    def on_main(self, action: Callable[[], Result]) -> Result | None:
        """Runs something on the main rank alone; a `UserError` there, or memory that runs out, is raised on all: none waits for a dead one.

        Returns:
            its result on the main rank, None on the others.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = _memory_is_the_users(action)
            except UserError as failure:
                error = failure
        error = self.from_main(error)
        if error is not None:
            raise error
        return result


def _memory_is_the_users(action: Callable[[], Result]) -> Result:
    """Runs something; running out of memory is a mistake outside the program, and one line."""
    try:
        return action()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {' '.join(str(error).split())}; choose a smaller model or free some memory") from error

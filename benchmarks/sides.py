"""The sides of a comparison in processes of their own, on the same cores."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

import cv2
import torch
from ratios import Action


class Side:
    """A process that does the same thing on some cores whenever it is called, and otherwise waits."""

    def __init__(self, make: Callable[..., Action], cores: int, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, make, cores, arguments))
        self._process.start()
        other_end.close()
        self._connection.recv()

    def __call__(self) -> None:
        self._connection.send(None)
        self._connection.recv()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, make: Callable[..., Action], cores: int, arguments: tuple[object, ...]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    cv2.setNumThreads(cores)
    action = make(*arguments)
    connection.send(None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        action()
        connection.send(None)

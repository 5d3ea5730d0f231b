"""A transport between threads of one process: the twin of MPI, for tests and for running a federation without a launcher."""

from __future__ import annotations

import collections
import os
import select
import threading
import time
from typing import NoReturn

from privfl.errors import InternalError
from privfl.transport.base import Frame, check_limits, check_peer


class Aborted(InternalError):  # noqa: N818  (an event of this world)
    """Another rank of this in-process world called :meth:`InProcess.abort`."""


class InProcess:
    """One rank of a world of threads. Frames are copied when sent, as on a wire."""

    def __init__(self, rank: int, world: list[InProcess]) -> None:
        self.rank = rank
        self._world = world
        self._inbox: collections.deque[Frame] = collections.deque()
        self._lock = threading.Lock()
        self._aborted = False
        self._ready, self._ring = os.pipe()
        os.set_blocking(self._ready, False)
        os.set_blocking(self._ring, False)

    @property
    def size(self) -> int:
        return len(self._world)

    @property
    def sites_here(self) -> int:
        return len(self._world) - 1

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        check_peer(self.rank, self.size, to)
        check_limits(head, bulk)
        self._world[to]._deliver(Frame(self.rank, bytes(head), bytes(bulk)))

    def _deliver(self, frame: Frame | None) -> None:
        with self._lock:
            if frame is None:
                self._aborted = True
            else:
                self._inbox.append(frame)
        # A full pipe already holds a wake-up call.
        with _ignoring_errors():
            os.write(self._ring, b"\0")

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        watched = [self._ready] if wake is None else [self._ready, wake]
        while True:
            with _ignoring_errors():
                os.read(self._ready, 4096)
            with self._lock:
                if self._aborted:
                    raise Aborted("another rank ended the job")
                if self._inbox:
                    return self._inbox.popleft()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select(watched, [], [], left)
            if wake in readable or not readable:
                return None

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        """Nothing to give up: the other ranks may still send, and nobody will read it."""

    def abort(self, code: int) -> NoReturn:
        for rank in self._world:
            rank._deliver(None)
        raise Aborted("this rank ended the job")

    def __del__(self) -> None:
        os.close(self._ready)
        os.close(self._ring)


class _ignoring_errors:  # noqa: N801  (reads as a statement)
    """Leave out BlockingIOError: an empty or a full pipe are both fine here. contextlib.suppress costs twice as much."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        return kind is BlockingIOError


def connect(size: int) -> list[InProcess]:
    """The ``size`` ranks of a new in-process world."""
    world: list[InProcess] = []
    world.extend(InProcess(rank, world) for rank in range(size))
    return world

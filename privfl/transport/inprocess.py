"""A transport between threads of one process, for tests and for running a federation without a
launcher.
"""

from __future__ import annotations

import collections
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError
from privfl.transport.base import Frame, check_limits, check_members, check_peer


class Aborted(InternalError):  # noqa: N818  (an event of this world)
    """A rank of this world of threads called :meth:`InProcess.abort`."""


class _Sum:
    """A sum of words, complete when rank 0 and all members have added theirs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._complete = threading.Event()
        self._missing: set[int] | None = None
        self._total: NDArray[np.uint64] | None = None

    def add(self, rank: int, members: Sequence[int], words: NDArray[np.uint64]) -> None:
        with self._lock:
            self._missing = {0, *members} if self._missing is None else self._missing
            self._missing.discard(rank)
            self._total = words.copy() if self._total is None else self._total + words
            if not self._missing:
                self._complete.set()

    def wait(self, timeout: float) -> NDArray[np.uint64] | None:
        return self._total if self._complete.wait(timeout) else None


class _Part:
    """One rank's part in a sum. A member's is done at once, because its words are copied.

    Args:
        total: The sum, at rank 0; None at a member.
        words: Where rank 0 gets the sum; shape (words,).
        forget: Called when rank 0 has it.
    """

    def __init__(
        self, total: _Sum | None, words: NDArray[np.uint64], forget: Callable[[], object]
    ) -> None:
        self._total, self._words, self._forget = total, words, forget

    def done(self, timeout: float) -> bool:
        if self._total is None:
            return True
        total = self._total.wait(timeout)
        if total is None:
            return False
        self._words[:] = total
        self._forget()
        return True


class InProcess:
    """One rank of a world of threads; made by :func:`connect`. Frames are copied when sent."""

    def __init__(
        self,
        rank: int,
        world: list[InProcess],
        sums: collections.defaultdict[tuple[object, ...], _Sum],
    ) -> None:
        self.rank = rank
        self._world = world
        self._sums = sums
        self._reduced: collections.Counter[tuple[int, ...]] = collections.Counter()
        self._inbox: collections.deque[Frame] = collections.deque()
        self._lock = threading.Lock()
        self._aborted = False
        # A byte in this pipe wakes the rank that waits in select().
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

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
        # A full pipe will wake the rank anyway.
        with _ignoring_blocking():
            os.write(self._wake_writer, b"\0")

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        watched = [self._wake_reader] if wake is None else [self._wake_reader, wake]
        while True:
            with _ignoring_blocking():
                os.read(self._wake_reader, 4096)
            with self._lock:
                if self._aborted:
                    raise Aborted("another rank ended the job")
                if self._inbox:
                    return self._inbox.popleft()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select(watched, [], [], left)
            if wake in readable or not readable:
                return None

    def reduce(self, members: Sequence[int], words: NDArray[np.uint64]) -> _Part:
        ranks = check_members(self.rank, self.size, members)
        self._reduced[ranks] += 1
        # Every rank counts its sums of one set of members, and so finds the same sum.
        key = (ranks, self._reduced[ranks])
        total = self._sums[key]
        total.add(self.rank, ranks, words)
        return _Part(total if self.rank == 0 else None, words, lambda: self._sums.pop(key, None))

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        """Nothing to do: what other ranks still send is never read."""

    def abort(self, code: int) -> NoReturn:
        for rank in self._world:
            rank._deliver(None)
        raise Aborted("this rank ended the job")

    def __del__(self) -> None:
        os.close(self._wake_reader)
        os.close(self._wake_writer)


class _ignoring_blocking:  # noqa: N801  (reads as a statement)
    """Suppress BlockingIOError, because an empty and a full pipe are both fine here.

    contextlib.suppress takes twice as long.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        return kind is BlockingIOError


def connect(size: int) -> list[InProcess]:
    """The transports of the ``size`` ranks of a new world, in order of rank."""
    world: list[InProcess] = []
    sums: collections.defaultdict[tuple[object, ...], _Sum] = collections.defaultdict(_Sum)
    world.extend(InProcess(rank, world, sums) for rank in range(size))
    return world

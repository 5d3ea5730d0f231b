"""A wrapper around any transport that keeps what crossed the wire, for replays and audits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from privfl.transport.base import Frame, Reduction, Transport


@dataclass(frozen=True)
class Recorded:
    """One frame as one rank saw it: ``sent`` by ``rank`` to ``peer``, or received from it; or
    its words in a sum (``summed``).
    """

    rank: int
    peer: int
    sent: bool
    head: bytes
    bulk: bytes
    summed: bool = False


class Recording:
    """Behaves as ``inner`` and calls ``keep`` with a copy of every frame sent and received."""

    def __init__(self, inner: Transport, keep: Callable[[Recorded], None]) -> None:
        self._inner = inner
        self._keep = keep
        self.rank = inner.rank
        self.size = inner.size
        self.sites_here = inner.sites_here

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        self._inner.send(to, head, bulk)
        self._keep(Recorded(self.rank, to, True, bytes(head), bytes(bulk)))

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        frame = self._inner.receive(timeout, wake)
        if frame is not None:
            self._keep(Recorded(self.rank, frame.peer, False, bytes(frame.head), bytes(frame.bulk)))
        return frame

    def reduce(self, members: Sequence[int], words: NDArray[np.uint64]) -> Reduction:
        mine = words.tobytes()
        part = self._inner.reduce(members, words)
        if self.rank:
            self._keep(Recorded(self.rank, 0, True, b"", mine, summed=True))
        return part

    def flush(self, timeout: float) -> bool:
        return self._inner.flush(timeout)

    def close(self) -> None:
        self._inner.close()

    def abort(self, code: int) -> NoReturn:
        self._inner.abort(code)

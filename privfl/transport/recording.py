"""A wrapper around any transport that records what crosses the wire, for replays and audits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from privfl.transport.base import Frame, Reduction, Transport


@dataclass(frozen=True)
class Recorded:
    """One frame at one rank, or the words that it adds to a sum.

    Attributes:
        rank: The rank at which it was recorded.
        peer: The rank at the other end.
        sent: Whether ``rank`` sent it to ``peer``; otherwise ``rank`` received it.
        head: The head of the frame; empty for words of a sum.
        bulk: The bulk of the frame, or the words as bytes.
        summed: Whether it is words of a sum.
    """

    rank: int
    peer: int
    sent: bool
    head: bytes
    bulk: bytes
    summed: bool = False


class Recording:
    """A transport that behaves as another one and records every frame and every sum's words.

    Args:
        inner: The transport that does the work.
        keep: Called with a copy of each frame after it was sent or received, and of the words that
            a rank other than 0 adds to a sum.
    """

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
        summand = words.tobytes()
        part = self._inner.reduce(members, words)
        if self.rank:
            self._keep(Recorded(self.rank, 0, True, b"", summand, summed=True))
        return part

    def flush(self, timeout: float) -> bool:
        return self._inner.flush(timeout)

    def close(self) -> None:
        self._inner.close()

    def abort(self, code: int) -> NoReturn:
        self._inner.abort(code)

"""The interface that every transport has, and that ``privfl.transport.conformance`` checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError

# No single message is larger: MPI counts end at 2 GiB in some libraries, and smaller pieces are
# faster anyway.
CHUNK = 64 << 20
HEAD_LIMIT = 256


@dataclass(frozen=True)
class Frame:
    """One message: a small ``head`` (at most HEAD_LIMIT bytes) and a flat ``bulk`` (at most
    CHUNK bytes).

    ``peer`` is the rank it came from.
    """

    peer: int
    head: bytes
    bulk: bytes | memoryview


class Reduction(Protocol):
    """One sum under way; see :meth:`Transport.reduce`."""

    def done(self, timeout: float) -> bool:
        """Wait until this rank's part is over; False if that took longer than ``timeout``
        seconds.
        """
        ...


class Transport(Protocol):
    """Point-to-point frames between rank 0 and every other rank, and sums of words into rank 0.

    Frames between two ranks arrive in the order they were sent, whole or not at all. No call blocks
    longer than its timeout.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def sites_here(self) -> int:
        """How many ranks other than 0 share this machine with this one, itself included."""
        ...

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        """Start sending and return at once.

        ``bulk`` must not change until :meth:`flush` has returned True.

        Raises:
            ValueError: no such peer, or head or bulk beyond the limits.
        """
        ...

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        """The next frame, or None after ``timeout`` seconds (None: no limit) or as soon as
        descriptor ``wake`` is readable.

        Raises:
            ProtocolError: what arrived is not a frame, or was damaged on the way.
        """
        ...

    def reduce(self, members: Sequence[int], words: NDArray[np.uint64]) -> Reduction:
        """Start adding the ``words`` of all members, modulo 2^64, to those of rank 0, in place
        there, and return at once.

        Collective: rank 0 and exactly the members call it, all in the same order of sums, with
        arrays of the same shape (words,). The first call for a set of members that is not all ranks
        may block until all of them have made it. ``words`` must not change until it is
        :meth:`Reduction.done`.
        """
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until everything sent has left; False if that took longer than ``timeout``
        seconds.
        """
        ...

    def close(self) -> None:
        """Give up receiving; to be called after the last flush."""
        ...

    def abort(self, code: int) -> NoReturn:
        """End all ranks at once: for the case that one of them no longer answers."""
        ...


def check_limits(head: bytes, bulk: bytes | memoryview) -> None:
    """Raise ValueError if a frame is larger than a transport must carry."""
    if len(head) > HEAD_LIMIT:
        raise ValueError(f"a head of {len(head)} bytes exceeds {HEAD_LIMIT}")
    if memoryview(bulk).nbytes > CHUNK:
        raise ValueError(
            f"a payload of {memoryview(bulk).nbytes} bytes exceeds one chunk of {CHUNK}"
        )


def check_peer(rank: int, size: int, to: int) -> None:
    """Raise ValueError unless ``rank`` may talk to ``to``: only pairs with rank 0 are connected."""
    if not 0 <= to < size or to == rank or 0 not in (rank, to):
        raise ValueError(f"rank {rank} of {size} has no connection to rank {to}")


def check_members(rank: int, size: int, members: Sequence[int]) -> tuple[int, ...]:
    """The members of a sum in order of rank; ValueError unless they are ranks other than 0, and
    this rank is one of them or rank 0.
    """
    names = tuple(sorted(set(members)))
    if not names or names[0] < 1 or names[-1] >= size or (rank and rank not in names):
        raise ValueError(f"rank {rank} of {size} cannot take part in a sum of the ranks {names}")
    return names


# A reduction ends within this time, or another member is gone.
REDUCE_SECONDS = 120.0


def finish(part: Reduction) -> None:
    """Wait for a sum that the transport makes.

    Raises:
        PrivflError: If it takes too long, because another member is gone.
    """
    if not part.done(REDUCE_SECONDS):
        raise PrivflError(
            f"a sum by MPI_Reduce did not end within {REDUCE_SECONDS:.0f} s: another rank is gone "
            f"or stuck; path star survives that"
        )

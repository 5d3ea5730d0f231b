"""The interface of every transport, which ``privfl.transport.conformance`` checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError

# The largest bulk of a frame, in bytes: MPI counts end at 2 GiB in some libraries, and smaller
# pieces are faster anyway.
CHUNK = 64 << 20
# The largest head of a frame, in bytes.
HEAD_LIMIT = 256


@dataclass(frozen=True)
class Frame:
    """One received message.

    Attributes:
        peer: The rank that sent it.
        head: At most HEAD_LIMIT bytes.
        bulk: At most CHUNK bytes, contiguous.
    """

    peer: int
    head: bytes
    bulk: bytes | memoryview


class Reduction(Protocol):
    """This rank's part in a sum that has been started; see :meth:`Transport.reduce`."""

    def done(self, timeout: float) -> bool:
        """Wait until this rank's part is done.

        At rank 0 the sum is complete then. At a member, its words may change again.

        Args:
            timeout: The longest time to wait, in seconds.

        Returns:
            Whether it is done.
        """
        ...


class Transport(Protocol):
    """Frames between rank 0 and every other rank, and sums of words into rank 0.

    Frames between two ranks arrive in the order in which they were sent, whole or not at all. No
    call blocks longer than its timeout.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    @property
    def sites_here(self) -> int:
        """How many ranks other than 0 run on this machine, this one included."""
        ...

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        """Start sending a frame and return at once.

        Args:
            to: The rank that receives it. Rank 0 may send to every other rank, and every other rank
                to rank 0.
            head: At most HEAD_LIMIT bytes.
            bulk: At most CHUNK contiguous bytes, which must not change until :meth:`flush` has
                returned True.

        Raises:
            ValueError: If this rank may not send to rank ``to``, or if ``head`` or ``bulk`` is too
                long. Nothing is sent then.
        """
        ...

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        """Wait for the next frame from any rank.

        Args:
            timeout: The longest time to wait, in seconds; None for no limit.
            wake: A file descriptor that ends the waiting as soon as it is readable.

        Returns:
            The frame; None if the time is over or ``wake`` is readable.

        Raises:
            ProtocolError: If what arrived is not a frame, or was damaged on the way.
        """
        ...

    def reduce(self, members: Sequence[int], words: NDArray[np.uint64]) -> Reduction:
        """Start a sum of words modulo 2^64 and return at once.

        Collective: rank 0 and exactly the members call it, for several sums in the same order. The
        first call for a set of members that is not all ranks may block until all of them have made
        it.

        Args:
            members: Ranks other than 0.
            words: What this rank adds; shape (words,), the same at all. At rank 0 the sum of all,
                its own words included, replaces it. It must not change until the returned part is
                done.

        Raises:
            ValueError: If a member is not a rank other than 0, or if this rank is neither a member
                nor rank 0.
        """
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until all frames have been sent.

        Args:
            timeout: The longest time to wait, in seconds.

        Returns:
            Whether they have.
        """
        ...

    def close(self) -> None:
        """Stop receiving; to be called after the last :meth:`flush`."""
        ...

    def abort(self, code: int) -> NoReturn:
        """End all ranks at once, because one of them no longer answers.

        Args:
            code: The exit code of the job.
        """
        ...


def check_limits(head: bytes, bulk: bytes | memoryview) -> None:
    """Refuse a frame that is larger than a transport must carry.

    Raises:
        ValueError: If ``head`` or ``bulk`` is too long.
    """
    if len(head) > HEAD_LIMIT:
        raise ValueError(f"a head of {len(head)} bytes exceeds {HEAD_LIMIT}")
    if memoryview(bulk).nbytes > CHUNK:
        raise ValueError(
            f"a payload of {memoryview(bulk).nbytes} bytes exceeds one chunk of {CHUNK}"
        )


def check_peer(rank: int, size: int, to: int) -> None:
    """Refuse a pair of ranks that is not connected: one of the two must be rank 0.

    Raises:
        ValueError: If ``rank`` cannot send to rank ``to``.
    """
    if not 0 <= to < size or to == rank or 0 not in (rank, to):
        raise ValueError(f"rank {rank} of {size} has no connection to rank {to}")


def check_members(rank: int, size: int, members: Sequence[int]) -> tuple[int, ...]:
    """The members of a sum, sorted and each once.

    Raises:
        ValueError: If a member is not a rank other than 0, or if this rank is neither a member nor
            rank 0.
    """
    ranks = tuple(sorted(set(members)))
    if not ranks or ranks[0] < 1 or ranks[-1] >= size or (rank and rank not in ranks):
        raise ValueError(f"rank {rank} of {size} cannot take part in a sum of the ranks {ranks}")
    return ranks


# A reduction that takes longer is an error: another member is gone.
REDUCE_SECONDS = 120.0


def finish(part: Reduction) -> None:
    """Wait until this rank's part in a sum is done.

    Raises:
        PrivflError: If that takes longer than REDUCE_SECONDS, because another rank is gone.
    """
    if not part.done(REDUCE_SECONDS):
        raise PrivflError(
            f"a sum by MPI_Reduce did not end within {REDUCE_SECONDS:.0f} s: another rank is gone "
            "or stuck; path star survives that"
        )

"""Checks that every transport must pass.

Each check runs on all ranks at once, and the ranks send to each other.

To check a transport of your own, start at least three ranks and call :func:`run` at every one of
them with its transport.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privfl.transport.base import CHUNK, HEAD_LIMIT, Frame, Transport
from privfl.transport.memory import forbid_reading

_SECONDS = 30.0


def run(transport: Transport) -> list[str]:
    """Run all checks on this rank. Collective over the transport's ranks.

    Args:
        transport: This rank's transport, which must have at least 3 ranks.

    Returns:
        The names of the checks, all of which passed.

    Raises:
        AssertionError: If the transport fails a check; it says which rank noticed what.
        ValueError: If the transport has fewer than 3 ranks.
    """
    if transport.size < 3:
        raise ValueError("the conformance checks need at least 3 ranks")
    for check in CHECKS:
        check(transport)
        _meet(transport)
    return [check.__name__.removeprefix("_check_") for check in CHECKS]


def _peers(transport: Transport) -> list[int]:
    return list(range(1, transport.size)) if transport.rank == 0 else [0]


def _collect(transport: Transport, count: int) -> dict[int, list[Frame]]:
    """``count`` frames from each peer, in order of arrival; no peer may send more meanwhile."""
    received: dict[int, list[Frame]] = {peer: [] for peer in _peers(transport)}
    for _ in range(count * len(received)):
        frame = transport.receive(_SECONDS)
        assert frame is not None, f"rank {transport.rank}: nothing arrived within {_SECONDS:.0f} s"
        received[frame.peer].append(frame)
    assert all(len(frames) == count for frames in received.values()), (
        f"rank {transport.rank}: frames of one peer came twice or not at all"
    )
    return received


def _meet(transport: Transport) -> None:
    """A barrier: rank 0 lets the others go on when all of them have answered."""
    assert transport.flush(_SECONDS)
    if transport.rank == 0:
        for peer in _peers(transport):
            transport.send(peer, b"done?")
        assert all(frames[0].head == b"done" for frames in _collect(transport, 1).values())
        for peer in _peers(transport):
            transport.send(peer, b"go on")
    else:
        assert _collect(transport, 1)[0][0].head == b"done?"
        transport.send(0, b"done")
        assert _collect(transport, 1)[0][0].head == b"go on"
    assert transport.flush(_SECONDS)


def _in_silence(transport: Transport, part: Callable[[], None]) -> None:
    """Run ``part`` while no rank sends to this one: first at rank 0, then at all others."""
    if transport.rank == 0:
        part()
        for peer in _peers(transport):
            transport.send(peer, b"your turn")
        _collect(transport, 1)
    else:
        _collect(transport, 1)
        part()
        transport.send(0, b"done")
    _meet(transport)


def _pattern(length: int, key: int) -> bytes:
    block = bytes((i * 7 + key) % 251 for i in range(4096))
    return (block * (length // len(block) + 1))[:length]


def _check_identity(transport: Transport) -> None:
    assert 0 <= transport.rank < transport.size
    assert 1 <= transport.sites_here <= transport.size - 1 or transport.rank == 0


def _check_sizes_both_ways(transport: Transport) -> None:
    """Payloads around every limit arrive whole and in order, and the two directions do not wait
    for each other.
    """
    sizes = [0, 1, 4095, 4096, 4097, 1 << 20, CHUNK]
    for peer in _peers(transport):
        for number, size in enumerate(sizes):
            transport.send(peer, b"h" * number, _pattern(size, transport.rank))
    for peer, frames in _collect(transport, len(sizes)).items():
        for number, frame in enumerate(frames):
            assert frame.head == b"h" * number, (
                f"rank {transport.rank}: message {number} from {peer} is out of order"
            )
            assert bytes(frame.bulk) == _pattern(sizes[number], peer), (
                f"{sizes[number]} bytes from {peer} are damaged"
            )


def _check_many_unreceived(transport: Transport) -> None:
    """Many frames may be on their way at once, and the sender need not hold their buffers."""
    count = 200
    for peer in _peers(transport):
        for number in range(count):
            transport.send(peer, number.to_bytes(4, "little"), _pattern(5000, number))
    for frames in _collect(transport, count).values():
        for number, frame in enumerate(frames):
            assert int.from_bytes(frame.head, "little") == number
            assert bytes(frame.bulk) == _pattern(5000, number)


def _check_memoryview_payload(transport: Transport) -> None:
    """A contiguous buffer can be a payload, and so can a slice of a larger one."""
    whole = bytearray(_pattern(100_000, 1))
    for peer in _peers(transport):
        transport.send(peer, b"slice", memoryview(whole)[10_000:90_000])
    for frames in _collect(transport, 1).values():
        assert bytes(frames[0].bulk) == _pattern(100_000, 1)[10_000:90_000]


def _check_limits(transport: Transport) -> None:
    """A frame that is too large, or for a rank that is not connected, is refused unsent."""
    peer = _peers(transport)[0]
    refused: list[Callable[[], None]] = [
        lambda: transport.send(peer, b"x" * (HEAD_LIMIT + 1)),
        lambda: transport.send(peer, b"x", bytes(CHUNK + 1)),
        lambda: transport.send(transport.rank, b"x"),
        lambda: transport.send(transport.size, b"x"),
        lambda: transport.send(-1, b"x"),
    ]
    if transport.rank > 0:
        other = 1 if transport.rank != 1 else 2
        refused.append(lambda: transport.send(other, b"x"))
    for attempt in refused:
        try:
            attempt()
        except ValueError:
            continue
        raise AssertionError(f"rank {transport.rank}: a send beyond the limits was accepted")


def _check_timeout(transport: Transport) -> None:
    """A receive that gets nothing ends on time and uses little processor time."""

    def wait() -> None:
        wall, processor = time.monotonic(), time.process_time()
        assert transport.receive(0.3) is None
        assert 0.2 < time.monotonic() - wall < 5.0, "a receive did not end at its timeout"
        # Ranks that are threads share one clock of processor time.
        assert time.process_time() - processor < 0.2 * transport.size, "waiting uses the processor"
        assert transport.receive(0.0) is None

    _in_silence(transport, wait)


def _check_wake(transport: Transport) -> None:
    """A readable descriptor ends the waiting; one that is not readable does not."""
    reader, writer = socket.socketpair()

    def wait() -> None:
        writer.send(b"x")
        started = time.monotonic()
        assert transport.receive(30.0, reader.fileno()) is None
        assert time.monotonic() - started < 5.0, "a readable descriptor did not end the waiting"
        reader.recv(1)

    with reader, writer:
        _in_silence(transport, wait)
        for peer in _peers(transport):
            transport.send(peer, b"awake")
        for _ in _peers(transport):
            frame = transport.receive(_SECONDS, reader.fileno())
            assert frame is not None, "a descriptor that is not readable ended the waiting"
            assert frame.head == b"awake"


def _check_reduce(transport: Transport) -> None:
    """Sums of words modulo 2^64 reach rank 0 whole and in order, for several sets of members and
    several at a time.
    """
    for members in (range(1, transport.size), [transport.size - 1, 1], [1]):
        if transport.rank and transport.rank not in members:
            continue
        sizes = [1, 1000, 1 << 18]
        arrays = [_numbers(size, number, transport.rank) for number, size in enumerate(sizes)]
        parts = [transport.reduce(list(members), words) for words in arrays]
        assert all(part.done(_SECONDS) for part in parts), (
            f"rank {transport.rank}: a sum did not end"
        )
        if transport.rank == 0:
            for number, (size, words) in enumerate(zip(sizes, arrays, strict=True)):
                expected = sum(_numbers(size, number, rank) for rank in (0, *members))
                assert np.array_equal(words, expected), (
                    f"sum {number} of the ranks {list(members)} is wrong"
                )


def _numbers(size: int, number: int, rank: int) -> NDArray[np.uint64]:
    return (np.arange(size, dtype=np.uint64) + np.uint64(number)) * np.uint64(
        (0x9E3779B97F4A7C15 * (rank + 1)) % 2**64
    )


def _check_members_of_a_sum(transport: Transport) -> None:
    """A sum of other ranks than peers, or without this rank, is refused."""
    words = np.zeros(1, dtype=np.uint64)
    wrong: list[list[int]] = [[], [0, 1], [transport.size], [-1]]
    for members in wrong + ([[1 if transport.rank != 1 else 2]] if transport.rank else []):
        try:
            transport.reduce(members, words)
        except ValueError:
            continue
        raise AssertionError(f"rank {transport.rank}: a sum of the ranks {members} was accepted")


def _check_unreadable_memory(transport: Transport) -> None:
    """Frames and sums still work between processes that may not read each other's memory.

    This is the last check, because it cannot be undone.
    """
    forbid_reading()
    _meet(transport)
    _check_sizes_both_ways(transport)
    _check_reduce(transport)


CHECKS = [
    _check_identity,
    _check_sizes_both_ways,
    _check_many_unreceived,
    _check_memoryview_payload,
    _check_limits,
    _check_timeout,
    _check_wake,
    _check_reduce,
    _check_members_of_a_sum,
    _check_unreadable_memory,
]

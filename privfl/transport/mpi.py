"""The transport over MPI: the only module that imports mpi4py, and only when a function is called.

Facts it is built on (measured with MPICH 5.0 and Open MPI 5.0):

- A blocking receive occupies a core and delays signals. So every receive is an Irecv, polled with
  growing pauses.
- A request that is dropped before it completed corrupts messages on some networks. So requests and
  buffers live until they are done.
- Counts beyond 2 GiB fail in some libraries. So no message is larger than a chunk.
- MPICH copies large messages straight out of another process's memory (CMA), which fails if that
  process forbids it. So CMA is switched off.
"""

from __future__ import annotations

import array
import collections
import os
import select
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError, ProtocolError
from privfl.transport.base import CHUNK, HEAD_LIMIT, Frame, check_limits, check_members, check_peer

_MAGIC = 0x70724D31
# Magic, length of head, length of bulk, CRC-32 of head and bulk. The CRC notices damage; protection
# against forgery is in the payloads.
_ENVELOPE = struct.Struct("<IIQI")
# A payload that fits here travels with its envelope in one message.
_INLINE = 4096
_ENVELOPE_BYTES = _ENVELOPE.size + HEAD_LIMIT + _INLINE
_TAG_ENVELOPE, _TAG_BULK = 1, 2
_FIRST_WAIT, _LONGEST_WAIT, _GROWTH = 50e-6, 2e-3, 1.5
# Through shared memory MPICH moves 8 KiB for each call that polls it, and its queues hold 64 such
# cells.
_BURST = 64


# No process may need to read another's memory: the switches of MPICH and of Open MPI.
WITHOUT_CMA = {"MPIR_CVAR_CH4_CMA_ENABLE": "0", "OMPI_MCA_smsc": "^cma"}


def start() -> MPITransport:
    """Initialise MPI and return this rank's transport. Collective over all ranks.

    Raises:
        PrivflError: If no MPI library can be loaded.
    """
    import mpi4py

    # The agent is a single thread that only moves bytes; some libraries are slower with more thread
    # support.
    mpi4py.rc.threads = False
    for name, value in WITHOUT_CMA.items():
        os.environ.setdefault(name, value)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PrivflError(
            "no MPI library can be loaded: install one into this environment with `pip install "
            "'privfl[mpich]'`, or load your cluster's MPI module first"
        ) from error
    return MPITransport(MPI, MPI.COMM_WORLD)


def over(comm: Any) -> MPITransport:
    """This rank's transport over an mpi4py communicator of the user's program.

    Collective over the ranks of ``comm``.
    """
    from mpi4py import MPI

    return MPITransport(MPI, comm)


def library() -> tuple[str, str]:
    """The MPI library: the first line of its version, and the path of its shared object ('' if the
    system does not show it).
    """
    import mpi4py

    mpi4py.rc.threads = False
    from mpi4py import MPI

    path = ""
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            paths = [line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")]
        path = next(
            (p for p in paths if os.path.basename(p).startswith(("libmpi.so", "libmpich.so"))), ""
        )
    return MPI.Get_library_version().split("\n")[0].strip(), path


class _Incoming:
    """The one receive that is posted for a peer: for an envelope, and then for its payload if that
    did not fit the envelope.
    """

    def __init__(self, comm: Any, peer: int) -> None:
        self._comm = comm
        self.peer = peer
        self._envelope = bytearray(_ENVELOPE_BYTES)
        self._expected: tuple[bytes, NDArray[np.uint8], int] | None = None
        self.request: Any = comm.Irecv(self._envelope, source=peer, tag=_TAG_ENVELOPE)

    @property
    def large(self) -> bool:
        """Whether a payload that did not fit its envelope is under way."""
        return self._expected is not None

    def completed(self) -> Frame | None:
        """Take what has arrived and post the next receive; returns the frame if it is complete.

        After an error nothing more is received from this peer.

        Raises:
            ProtocolError: If what arrived is not a frame, or was damaged on the way.
        """
        self.request = None
        if self._expected is None:
            head, digest, bulk = self._open_envelope()
            if not isinstance(bulk, bytes):
                self._expected = (head, bulk, digest)
                self.request = self._comm.Irecv(bulk, source=self.peer, tag=_TAG_BULK)
                return None
        else:
            head, bulk, digest = self._expected
            self._expected = None
        frame = Frame(self.peer, head, bulk if isinstance(bulk, bytes) else bulk.data.toreadonly())
        if _digest(head, frame.bulk) != digest:
            raise ProtocolError(f"a message from rank {self.peer} was damaged on the way")
        self.request = self._comm.Irecv(self._envelope, source=self.peer, tag=_TAG_ENVELOPE)
        return frame

    def _open_envelope(self) -> tuple[bytes, int, bytes | NDArray[np.uint8]]:
        """(head, digest, payload), or instead of a payload that did not fit a buffer of its length.

        Lengths are checked before anything is allocated.
        """
        magic, head_length, bulk_length, digest = _ENVELOPE.unpack_from(self._envelope)
        if magic != _MAGIC or head_length > HEAD_LIMIT or bulk_length > CHUNK:
            raise ProtocolError(
                f"rank {self.peer} sent something that is not a privfl message; do all ranks run "
                "one version?"
            )
        start = _ENVELOPE.size + head_length
        head = bytes(self._envelope[_ENVELOPE.size : start])
        if bulk_length > _INLINE:
            return head, digest, np.empty(bulk_length, dtype=np.uint8)
        return head, digest, bytes(self._envelope[start : start + bulk_length])


class _Reduction:
    """This rank's part in a sum; it holds the buffer until MPI is done with it."""

    def __init__(self, transport: MPITransport, request: Any, words: NDArray[np.uint64]) -> None:
        self._transport, self._request, self._words = transport, request, words
        transport.reductions.add(self)

    def done(self, timeout: float) -> bool:
        is_done = self._transport.wait_until(self._request.Test, timeout)
        if is_done:
            self._transport.reductions.discard(self)
        return is_done


class MPITransport:
    """One rank of an MPI communicator. Making it is collective over the communicator's ranks.

    Args:
        mpi: The module mpi4py.MPI.
        comm: The communicator, which is duplicated.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi = mpi
        # A communicator of its own, so that this transport's messages and those of the user's
        # program cannot be confused.
        self._comm = comm.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        here = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        count = array.array("i", [0])
        here.Allreduce([array.array("i", [self.rank > 0]), mpi.INT], [count, mpi.INT])
        self.sites_here: int = count[0]
        here.Free()
        peers = range(1, self.size) if self.rank == 0 else range(1)
        self._incoming = [_Incoming(self._comm, peer) for peer in peers if peer != self.rank]
        self._outgoing: list[tuple[Any, bytes | memoryview, int]] = []
        self.reductions: set[_Reduction] = set()
        self._inbox: collections.deque[Frame] = collections.deque()
        self._among: dict[tuple[int, ...], Any] = {}

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        check_peer(self.rank, self.size, to)
        check_limits(head, bulk)
        length = memoryview(bulk).nbytes
        envelope = _ENVELOPE.pack(_MAGIC, len(head), length, _digest(head, bulk)) + head
        if length <= _INLINE:
            envelope += bytes(bulk)
        self._start(envelope, to, _TAG_ENVELOPE)
        if length > _INLINE:
            self._start(bulk, to, _TAG_BULK)
        # So that earlier messages proceed while the next piece is being made.
        self._progress_sends()

    def _start(self, buffer: bytes | memoryview, to: int, tag: int) -> None:
        request = self._comm.Isend([buffer, self._mpi.BYTE], dest=to, tag=tag)
        self._outgoing.append((request, buffer, memoryview(buffer).nbytes))

    def _progress(self) -> bool:
        """Let MPI work; returns whether anything completed."""
        large = (
            bool(self.reductions)
            or any(incoming.large for incoming in self._incoming)
            or any(length > _ENVELOPE_BYTES for _, _, length in self._outgoing)
        )
        return any(self._progress_once() for _ in range(_BURST if large else 1))

    def _progress_once(self) -> bool:
        moved = self._progress_sends()
        for incoming in self._incoming:
            if incoming.request is not None and incoming.request.Test():
                moved = True
                frame = incoming.completed()
                if frame is not None:
                    self._inbox.append(frame)
        return moved

    def _progress_sends(self) -> bool:
        pending = [sending for sending in self._outgoing if not sending[0].Test()]
        moved = len(pending) < len(self._outgoing)
        self._outgoing = pending
        return moved

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_WAIT
        # What has arrived is returned before more is received: at most one frame of each peer waits
        # here, and the rest at its sender.
        while not self._inbox:
            moved = self._progress()
            if self._inbox:
                break
            if moved:
                pause = _FIRST_WAIT
            left = pause if deadline is None else min(pause, deadline - time.monotonic())
            if left <= 0.0:
                return None
            # Waiting for the descriptor is the pause, which ends early if it is readable.
            if select.select([] if wake is None else [wake], [], [], left)[0]:
                return None
            pause = min(pause * _GROWTH, _LONGEST_WAIT)
        return self._inbox.popleft()

    def reduce(self, members: Sequence[int], words: NDArray[np.uint64]) -> _Reduction:
        comm = self._comm_of(check_members(self.rank, self.size, members))
        kind = self._mpi.UINT64_T
        summand, total = (
            (self._mpi.IN_PLACE, [words, kind]) if self.rank == 0 else ([words, kind], None)
        )
        return _Reduction(self, comm.Ireduce(summand, total, op=self._mpi.SUM, root=0), words)

    def _comm_of(self, members: tuple[int, ...]) -> Any:
        """The communicator of rank 0 and exactly these members, made once."""
        if len(members) == self.size - 1:
            return self._comm
        if members not in self._among:
            everybody = self._comm.Get_group()
            group = everybody.Incl([0, *members])
            self._among[members] = self._comm.Create_group(group)
            group.Free()
            everybody.Free()
        return self._among[members]

    def flush(self, timeout: float) -> bool:
        return self.wait_until(lambda: not self._outgoing, timeout)

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Let MPI work until ``ready()`` is true, or for ``timeout`` seconds; returns whether it
        is.
        """
        deadline = time.monotonic() + timeout
        pause = _FIRST_WAIT
        while not ready():
            if self._progress():
                pause = _FIRST_WAIT
                continue
            if time.monotonic() > deadline:
                return False
            select.select([], [], [], pause)
            pause = min(pause * _GROWTH, _LONGEST_WAIT)
        return True

    def close(self) -> None:
        for incoming in self._incoming:
            if incoming.request is not None:
                incoming.request.Cancel()
                incoming.request.Wait()
        self._incoming.clear()
        # A program that opens and closes many transports must not run out of communicators, but a
        # message or a sum that is not done still needs its own.
        if not self._outgoing and not self.reductions:
            for comm in [*self._among.values(), self._comm]:
                comm.Free()
            self._among.clear()

    def abort(self, code: int) -> NoReturn:
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)


def _digest(head: bytes, bulk: bytes | memoryview) -> int:
    return zlib.crc32(bulk, zlib.crc32(head))

"""The transport over MPI: the only module that imports mpi4py, and only when :func:`start` is called.

Facts it is built on (measured with MPICH 5.0 and Open MPI 5.0): a blocking receive burns a core and delays signals, so every receive
is an Irecv polled with back-off; a request dropped before it completed corrupts messages on some networks, so requests and buffers
are kept until they are done; counts beyond 2 GiB fail in some libraries, so nothing larger than a chunk is sent.
"""

from __future__ import annotations

import array
import collections
import hashlib
import os
import select
import struct
import time
from typing import Any, NoReturn

from privfl.errors import PrivflError, ProtocolError
from privfl.transport.base import CHUNK, HEAD_LIMIT, Frame, check_limits, check_peer

_MAGIC = 0x70724D31
_ENVELOPE = struct.Struct("<IIQ32s")  # magic, length of head, length of bulk, SHA-256 of head and bulk
# A payload that fits here travels with its envelope in one message.
_INLINE = 4096
_ENVELOPE_BYTES = _ENVELOPE.size + HEAD_LIMIT + _INLINE
_TAG_ENVELOPE, _TAG_BULK = 1, 2
_FIRST_WAIT, _LONGEST_WAIT, _GROWTH = 50e-6, 2e-3, 1.5


def start() -> MPITransport:
    """Initialise MPI and return this rank's transport. Collective over all ranks.

    Raises:
        PrivflError: no MPI library can be loaded.
    """
    import mpi4py

    # The agent is a single thread that only moves bytes; some libraries are slower with more thread support.
    mpi4py.rc.threads = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PrivflError(
            "no MPI library can be loaded: install one into this environment with `pip install 'privfl[mpich]'`, "
            "or load your cluster's MPI module first"
        ) from error
    return MPITransport(MPI)


def library() -> tuple[str, str]:
    """(version line of the MPI library, path of the loaded shared object or '' where the system does not tell)."""
    import mpi4py

    mpi4py.rc.threads = False
    from mpi4py import MPI

    path = ""
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            paths = [line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")]
        path = next((p for p in paths if os.path.basename(p).startswith(("libmpi.so", "libmpich.so"))), "")
    return MPI.Get_library_version().split("\n")[0].strip(), path


class _Incoming:
    """The one receive that is posted for a peer: first an envelope, then, if the payload did not fit, the payload."""

    def __init__(self, comm: Any, peer: int) -> None:
        self._comm = comm
        self.peer = peer
        self._envelope = bytearray(_ENVELOPE_BYTES)
        self._expected: tuple[bytes, bytearray, bytes] | None = None
        self.request: Any = comm.Irecv(self._envelope, source=peer, tag=_TAG_ENVELOPE)

    def completed(self) -> Frame | None:
        """Take what has arrived, post the next receive; the frame if it is complete. After an error this peer is not heard any more."""
        self.request = None
        if self._expected is None:
            head, digest, bulk = self._open_envelope()
            if isinstance(bulk, bytearray):
                self._expected = (head, bulk, digest)
                self.request = self._comm.Irecv(bulk, source=self.peer, tag=_TAG_BULK)
                return None
        else:
            head, bulk, digest = self._expected
            self._expected = None
        frame = Frame(self.peer, head, memoryview(bulk).toreadonly())
        if _digest(head, bulk) != digest:
            raise ProtocolError(f"a message from rank {self.peer} was damaged on the way")
        self.request = self._comm.Irecv(self._envelope, source=self.peer, tag=_TAG_ENVELOPE)
        return frame

    def _open_envelope(self) -> tuple[bytes, bytes, bytes | bytearray]:
        """(head, digest, payload or an empty buffer of the announced size). Lengths are checked before anything is allocated."""
        magic, head_length, bulk_length, digest = _ENVELOPE.unpack_from(self._envelope)
        if magic != _MAGIC or head_length > HEAD_LIMIT or bulk_length > CHUNK:
            raise ProtocolError(f"rank {self.peer} sent something that is not a privfl message; do all ranks run one version?")
        start = _ENVELOPE.size + head_length
        head = bytes(self._envelope[_ENVELOPE.size : start])
        if bulk_length > _INLINE:
            return head, digest, bytearray(bulk_length)
        return head, digest, bytes(self._envelope[start : start + bulk_length])


class MPITransport:
    """One rank of an MPI world; frames go between rank 0 and every other rank."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        # A communicator of our own, so that no message of the user's program can meet ours. Collective, as the next lines.
        self._comm = mpi.COMM_WORLD.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        here = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        count = array.array("i", [0])
        here.Allreduce([array.array("i", [self.rank > 0]), mpi.INT], [count, mpi.INT])
        self.sites_here: int = count[0]
        here.Free()
        peers = range(1, self.size) if self.rank == 0 else range(1)
        self._incoming = [_Incoming(self._comm, peer) for peer in peers if peer != self.rank]
        self._outgoing: list[tuple[Any, Any]] = []
        self._inbox: collections.deque[Frame] = collections.deque()

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

    def _start(self, buffer: bytes | memoryview, to: int, tag: int) -> None:
        request = self._comm.Isend([buffer, self._mpi.BYTE], dest=to, tag=tag)
        self._outgoing.append((request, buffer))

    def _progress(self) -> bool:
        """Let MPI work; True if anything moved."""
        moved = False
        if self._outgoing:
            pending = [(request, buffer) for request, buffer in self._outgoing if not request.Test()]
            moved = len(pending) < len(self._outgoing)
            self._outgoing = pending
        for incoming in self._incoming:
            if incoming.request is not None and incoming.request.Test():
                moved = True
                frame = incoming.completed()
                if frame is not None:
                    self._inbox.append(frame)
        return moved

    def receive(self, timeout: float | None, wake: int | None = None) -> Frame | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_WAIT
        while True:
            moved = self._progress()
            if self._inbox:
                return self._inbox.popleft()
            if moved:
                pause = _FIRST_WAIT
            left = pause if deadline is None else min(pause, deadline - time.monotonic())
            if left <= 0.0:
                return None
            # Waiting on the descriptor is the pause: it ends early when there is something to read.
            if select.select([] if wake is None else [wake], [], [], left)[0]:
                return None
            pause = min(pause * _GROWTH, _LONGEST_WAIT)

    def flush(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        pause = _FIRST_WAIT
        while self._outgoing:
            if self._progress():
                pause = _FIRST_WAIT
            if not self._outgoing:
                break
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

    def abort(self, code: int) -> NoReturn:
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)


def _digest(head: bytes, bulk: bytes | bytearray | memoryview) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(bulk)
    return digest.digest()

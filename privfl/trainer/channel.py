"""Between an agent and its trainer: small JSON messages over a socket, flat vectors through
shared memory.

Vectors are written and read by position on an anonymous file descriptor and never mapped. So a
reader checks a copy that the other process can no longer change, and a file that it cut short gives
a short read instead of a crash.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from privfl.errors import InternalError

_LENGTH = struct.Struct("<I")
_LONGEST = 16 << 20

_Incoming = TypeVar("_Incoming")
_Number = TypeVar("_Number", np.float32, np.float64)


class Closed(Exception):  # noqa: N818  (an event, not an error)
    """The other process ended, or closed its end."""


class Channel(Generic[_Incoming]):
    """Length-prefixed JSON over one end of a socket pair.

    Args:
        end: the end of this process.
        incoming: the messages that the other process may send.
    """

    def __init__(self, end: socket.socket, incoming: TypeAdapter[_Incoming]) -> None:
        self._end, self._incoming = end, incoming

    def fileno(self) -> int:
        """The socket's descriptor, for select."""
        return self._end.fileno()

    def send(self, message: BaseModel) -> None:
        """Send one message.

        Raises:
            Closed: If the other process ended.
        """
        body = message.model_dump_json().encode()
        try:
            self._end.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise Closed from error

    def receive(self) -> _Incoming:
        """Wait for the next message.

        Raises:
            Closed: If the other process ended.
            InternalError: If it sent something that is not one of its messages.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _LONGEST:
            raise InternalError(f"a message of {length} bytes came from the trainer")
        try:
            return self._incoming.validate_json(self._exactly(length))
        except ValidationError as error:
            raise InternalError("something that is no message came from the trainer") from error

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece = self._end.recv(count - len(data))
            except OSError as error:
                raise Closed from error
            if not piece:
                raise Closed
            data += piece
        return data

    def close(self) -> None:
        """Close this end; the other process sees :class:`Closed`."""
        self._end.close()


class SharedVector:
    """A vector in memory that two processes reach through one file descriptor each.

    It has neither a length nor a kind of number of its own: who reads says what to expect.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def create(cls) -> SharedVector:
        """A new, empty vector; without a name, so that it vanishes with its last user."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("privfl", os.MFD_CLOEXEC))
        # A system without anonymous memory gets a file that has no name any more.
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def write(self, vector: NDArray[Any]) -> None:
        """Write all of ``vector``, of shape (count,), from the start."""
        view, start = np.ascontiguousarray(vector).view(np.uint8).data, 0
        while start < len(view):
            start += os.pwrite(self.descriptor, view[start:], start)

    def read(self, count: int, kind: type[_Number]) -> NDArray[_Number]:
        """A private copy of the first ``count`` numbers; shape (count,).

        Raises:
            InternalError: If the vector holds fewer numbers.
        """
        vector = np.empty(count, dtype=kind)
        view, start = vector.view(np.uint8).data, 0
        while start < len(view):
            count_read = os.preadv(self.descriptor, [view[start:]], start)
            if count_read == 0:
                raise InternalError("the trainer handed over a vector that is too short")
            start += count_read
        return vector

    def close(self) -> None:
        """Close the descriptor of this process."""
        os.close(self.descriptor)

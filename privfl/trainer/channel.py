"""Between an agent and its trainer: small JSON messages over a socket, flat vectors through shared memory.

Vectors are written and read by position on an anonymous file descriptor and never mapped: a reader copies first and then looks, and a
file that the other side cut short gives a short read instead of a crash.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError

_LENGTH = struct.Struct("<I")
_LONGEST = 16 << 20

_Number = TypeVar("_Number", np.float32, np.float64)


class Closed(Exception):  # noqa: N818  (an event, not an error)
    """The other side is gone."""


class Link:
    """Length-prefixed JSON over one end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            Closed: nobody listens any more.
        """
        body = json.dumps(message).encode()
        try:
            self._end.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise Closed from error

    def receive(self) -> dict[str, Any]:
        """Wait for the next message.

        Raises:
            Closed: the other side ended.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _LONGEST:
            raise InternalError(f"a message of {length} bytes came from the trainer")
        message = json.loads(self._exactly(length))
        if not isinstance(message, dict):
            raise InternalError("something that is not a message came from the trainer")
        return message

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
        self._end.close()


class SharedVector:
    """A vector in memory that two processes reach through one file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def create(cls) -> SharedVector:
        """A new, empty one; without a name, so that it vanishes with its last user."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("privfl", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:  # no anonymous memory on this system: a file that has no name any more
            return cls(os.dup(file.fileno()))

    def write(self, vector: NDArray[Any]) -> None:
        """Write all of ``vector`` from the start."""
        view, start = np.ascontiguousarray(vector).view(np.uint8).data, 0
        while start < len(view):
            start += os.pwrite(self.descriptor, view[start:], start)

    def read(self, count: int, kind: type[_Number]) -> NDArray[_Number]:
        """A private copy of the first ``count`` numbers; shape (count,).

        Raises:
            InternalError: fewer are there.
        """
        vector = np.empty(count, dtype=kind)
        view, start = vector.view(np.uint8).data, 0
        while start < len(view):
            got = os.preadv(self.descriptor, [view[start:]], start)
            if got == 0:
                raise InternalError("the trainer handed over a vector that is too short")
            start += got
        return vector

    def close(self) -> None:
        os.close(self.descriptor)

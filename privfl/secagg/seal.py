"""SEAL objects to bytes and back, in memory: the one place that saves or loads through
`tenseal.sealapi`.

sealapi saves to and loads from a path only. Here the path leads to an anonymous file in memory,
never to a named one, because some of what is saved are keys. Systems without such files are
refused: loading from a pipe ends the process, because SEAL seeks.

SEAL's format (its documentation, "Serialization"): a header of 16 bytes, `<HBBBBHQ` = magic 0xA15E,
header size, major and minor version, compression (0 none, 2 zstd), reserved, total size; then the
body. The last 2 * N * 8 bytes of a ciphertext's body are its words.
"""

from __future__ import annotations

import functools
import os
import struct
import threading
from typing import Any

import zstandard

from privfl.errors import InternalError, PrivflError, ProtocolError

_HEADER = struct.Struct("<HBBBBHQ")
_MAGIC = 0xA15E
_PLAIN, _ZSTD = 0, 2
# The largest object of these parameters is a ciphertext of 64 KiB.
_LARGEST = 1 << 20


class Memory:
    """An anonymous file in memory, which has a path while it is open (Linux)."""

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise PrivflError(
                "privfl encrypts on Linux only: this system has no files in memory, and keys must "
                "not go to a disk"
            )
        self._file = os.memfd_create("privfl", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._file}"

    def save(self, thing: Any) -> bytes:
        """What ``thing.save`` writes."""
        thing.save(self._path)  # opens the path anew, which cuts what was there
        return os.pread(self._file, _LARGEST, 0)

    def load(self, thing: Any, context: Any, saved: bytes) -> None:
        """Let ``thing.load`` read ``saved``."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, saved, 0)
        thing.load(context, self._path)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


class _Tools(threading.local):
    """A place in memory and one decompressor for each thread: neither may be used by two at
    once.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


def body_of(thing: Any) -> bytes:
    """The body of a saved SEAL object, uncompressed."""
    saved = _tools.memory.save(thing)
    magic, size, _, _, compression, _, total = _HEADER.unpack_from(saved)
    if (
        magic != _MAGIC
        or size != _HEADER.size
        or total != len(saved)
        or compression not in (_PLAIN, _ZSTD)
    ):
        raise InternalError(
            "TenSEAL saves objects in a form that privfl does not know; `privfl doctor` shows its "
            "version"
        )
    body = memoryview(saved)[size:]
    return (
        bytes(body)
        if compression == _PLAIN
        else _tools.decompressor.decompress(body, max_output_size=_LARGEST)
    )


@functools.cache
def _version() -> tuple[int, int]:
    """The (major, minor) that this TenSEAL's SEAL writes into headers."""
    from tenseal import sealapi

    _, _, major, minor, _, _, _ = _HEADER.unpack_from(_tools.memory.save(sealapi.Plaintext("0")))
    return major, minor


def load_body(thing: Any, context: Any, body: bytes) -> Any:
    """``thing`` after it loaded a body that :func:`body_of` gave, or one of the same form; SEAL
    checks it against ``context``.

    Raises:
        ProtocolError: it does not fit.
    """
    header = _HEADER.pack(_MAGIC, _HEADER.size, *_version(), _PLAIN, 0, _HEADER.size + len(body))
    try:
        _tools.memory.load(thing, context, header + body)
    except Exception as error:  # whatever SEAL raises
        raise ProtocolError(
            "something encrypted does not load: it was altered, or made with other parameters"
        ) from error
    return thing

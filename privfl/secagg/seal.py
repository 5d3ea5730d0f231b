"""SEAL objects to bytes and back, in memory: the only module that saves or loads through
`tenseal.sealapi`.

sealapi saves to and loads from paths only. Here the path is that of an anonymous file in memory,
because some of the saved objects are keys, which must not reach a disk. Systems without such files
are refused: a pipe is no substitute, because SEAL seeks and the process would end.

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
    """An anonymous file in memory, which has a path while it is open (Linux).

    Raises:
        PrivflError: If the system has no such files.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise PrivflError(
                "privfl encrypts on Linux only: this system has no files in memory, and keys must "
                "not go to a disk"
            )
        self._file = os.memfd_create("privfl", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._file}"

    def save(self, seal_object: Any) -> bytes:
        """The bytes that SEAL saves of an object."""
        seal_object.save(self._path)  # opens the path anew and so empties the file
        return os.pread(self._file, _LARGEST, 0)

    def load(self, seal_object: Any, context: Any, saved: bytes) -> None:
        """Let SEAL load an object from ``saved``."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, saved, 0)
        seal_object.load(context, self._path)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


class _Tools(threading.local):
    """One file in memory and one decompressor for each thread, because neither may serve two
    threads at once.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


def body_of(seal_object: Any) -> bytes:
    """The body that SEAL saves of an object, uncompressed.

    Raises:
        InternalError: If TenSEAL does not save objects in the form that this module knows.
    """
    saved = _tools.memory.save(seal_object)
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
    """(major, minor) of SEAL, as this TenSEAL writes them into headers."""
    from tenseal import sealapi

    _, _, major, minor, _, _, _ = _HEADER.unpack_from(_tools.memory.save(sealapi.Plaintext("0")))
    return major, minor


def load_body(seal_object: Any, context: Any, body: bytes) -> Any:
    """Load a body into a new SEAL object, and return the object.

    Args:
        seal_object: The object, for example a new ``sealapi.Ciphertext()``.
        context: The SEALContext against which SEAL checks the body.
        body: A result of :func:`body_of` for an object of this class, or bytes of the same form.

    Raises:
        ProtocolError: If SEAL refuses the body.
    """
    header = _HEADER.pack(_MAGIC, _HEADER.size, *_version(), _PLAIN, 0, _HEADER.size + len(body))
    try:
        _tools.memory.load(seal_object, context, header + body)
    except Exception as error:  # SEAL raises several classes
        raise ProtocolError(
            "something encrypted does not load: it was altered, or made with other parameters"
        ) from error
    return seal_object

"""Streams of pseudorandom words: ChaCha20 (RFC 8439), under keys from HKDF-SHA256 (RFC 5869)."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES = 32
_ZEROS = bytes(1 << 16)


def derive_key(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """A key of 32 bytes for one purpose (``info``) on one occasion (``salt``), by HKDF-SHA256."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=info).derive(secret)


class Keystream:
    """The ChaCha20 words of one key, each returned once.

    Args:
        key: 32 bytes. Two streams must never have the same key.
    """

    def __init__(self, key: bytes) -> None:
        # The nonce is zero because every key serves a single stream; 2^32 blocks of 64 bytes are
        # far more than a vector needs.
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words of 64 bits; shape (count,)."""
        stream = np.empty(count, dtype="<u8")
        view, start = stream.view(np.uint8).data, 0
        while start < len(view):
            length = min(len(_ZEROS), len(view) - start)
            start += self._cipher.update_into(
                memoryview(_ZEROS)[:length], view[start : start + length]
            )
        return stream

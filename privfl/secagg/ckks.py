"""Add-only CKKS over one flat vector, through TenSEAL.

Parameters: N = 4096 with primes of 60 and 49 bits (109 bits together, 128-bit security), symmetric keys, scale 2^36. Data live
modulo the first prime, so a sum may reach 2^22 per element; nothing is multiplied, so there are no relinearisation keys, and the
context is made once and not sent with every layer. The error of a sum of n vectors is about 2e-9 * sqrt(n) per element.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError, PrivflError, ProtocolError

_DEGREE = 4096
_PRIME_BITS = [60, 49]
_SCALE = 2.0**36
# |sum| * scale must stay below half of the 60-bit prime; one more bit is kept in reserve for the canonical embedding.
LARGEST_SUM = 2.0**22
# A decrypted sum is rounded to this grid: far below the 1e-6 that matters, far above the error of CKKS, so that what leaves
# the key holder does not carry the encryption error (Li and Micciancio 2021) and every site gets the same numbers.
GRID = 2.0**-24

_SLOTS = _DEGREE // 2
_CIPHERTEXTS_PER_BLOCK = 32
BLOCK_VALUES = _SLOTS * _CIPHERTEXTS_PER_BLOCK
_LENGTH = struct.Struct("<I")


def block_count(values: int) -> int:
    """How many blocks a vector of ``values`` elements is encrypted to."""
    return -(-values // BLOCK_VALUES)


def _tenseal() -> Any:
    import tenseal

    return tenseal


def _pack(ciphertexts: list[bytes]) -> bytes:
    return b"".join(part for ciphertext in ciphertexts for part in (_LENGTH.pack(len(ciphertext)), ciphertext))


def _unpack(block: bytes | memoryview) -> list[bytes]:
    view, start, ciphertexts = memoryview(block), 0, []
    while start < len(view):
        if start + _LENGTH.size > len(view):
            raise ProtocolError("a block of ciphertexts ends in the middle of a length")
        (length,) = _LENGTH.unpack_from(view, start)
        start += _LENGTH.size
        if start + length > len(view):
            raise ProtocolError("a block of ciphertexts ends in the middle of a ciphertext")
        ciphertexts.append(bytes(view[start : start + length]))
        start += length
    return ciphertexts


def _parse(context: Any, ciphertext: bytes) -> Any:
    try:
        vector = _tenseal().ckks_vector_from(context, ciphertext)
    except Exception as error:  # TenSEAL raises whatever protobuf or SEAL raise
        raise ProtocolError("a ciphertext does not parse: it was altered, or made with other parameters") from error
    if vector.size() > _SLOTS:
        raise ProtocolError("a ciphertext holds more values than its parameters allow")
    return vector


class SumKey:
    """The secret key shared by the sites of one run: encrypts contributions, decrypts their sum. In memory only."""

    def __init__(self, *, _context: Any = None) -> None:
        if _context is None:
            tenseal = _tenseal()
            _context = tenseal.context(
                tenseal.SCHEME_TYPE.CKKS,
                _DEGREE,
                coeff_mod_bit_sizes=_PRIME_BITS,
                encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
            )
            _context.global_scale = _SCALE
        self._context = _context

    def secret_bytes(self) -> bytes:
        """The key as bytes, to be sealed to another site and to go nowhere else."""
        return bytes(
            self._context.serialize(save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
        )

    @classmethod
    def from_secret_bytes(cls, secret: bytes) -> SumKey:
        """The key that :meth:`secret_bytes` gave.

        Raises:
            ProtocolError: the bytes hold no secret key of these parameters.
        """
        try:
            context = _tenseal().context_from(secret)
        except Exception as error:  # TenSEAL raises whatever protobuf or SEAL raise
            raise ProtocolError("the shared key does not parse") from error
        if not context.is_private() or context.global_scale != _SCALE:
            raise ProtocolError("the shared key holds no secret key for the expected parameters")
        return cls(_context=context)

    def adding_context(self) -> bytes:
        """What a party needs in order to add ciphertexts: the parameters, without any key."""
        return bytes(
            self._context.serialize(save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
        )

    def encrypt(self, vector: NDArray[np.float64], contributors: int) -> Iterator[bytes]:
        """Encrypt one contribution, block by block.

        Args:
            vector: shape (d,), finite, each element at most ``LARGEST_SUM / contributors`` in size.
            contributors: how many such vectors will be added.

        Yields:
            ``block_count(d)`` blocks.

        Raises:
            PrivflError: an element is not finite or so large that the sum might wrap.
        """
        if not np.isfinite(vector).all():
            raise PrivflError("a vector to be summed contains NaN or infinite values")
        limit = LARGEST_SUM / contributors
        if vector.size and float(np.abs(vector).max()) > limit:
            raise PrivflError(
                f"a vector to be summed has elements beyond {limit:g}, the most that {contributors} sites can add exactly"
            )
        for start in range(0, len(vector), BLOCK_VALUES):
            block = vector[start : start + BLOCK_VALUES]
            # One TenSEAL vector per ciphertext: a longer one is split by TenSEAL too, which prints a warning each time.
            yield _pack(
                [_tenseal().ckks_vector(self._context, block[i : i + _SLOTS]).serialize() for i in range(0, len(block), _SLOTS)]
            )

    def decrypt(self, block: bytes | memoryview, values: int) -> NDArray[np.float64]:
        """The ``values`` elements of a summed block, rounded to ``GRID``; shape (values,).

        Raises:
            ProtocolError: the block does not parse or holds another number of elements.
        """
        parts = [np.asarray(_parse(self._context, c).decrypt(), dtype=np.float64) for c in _unpack(block)]
        vector = np.concatenate(parts) if parts else np.empty(0)
        if len(vector) != values:
            raise ProtocolError(f"a decrypted block has {len(vector)} values, expected {values}")
        return np.rint(vector / GRID) * GRID


class Adder:
    """Adds encrypted blocks without any key. One adder serves a whole run: parsing the context takes milliseconds."""

    def __init__(self, adding_context: bytes) -> None:
        try:
            self._context = _tenseal().context_from(adding_context)
        except Exception as error:  # TenSEAL raises whatever protobuf or SEAL raise
            raise ProtocolError("the context for adding does not parse") from error
        if self._context.is_private():
            raise InternalError("the adding party was handed a secret key; the run stops")
        self._sums: list[list[Any] | None] = []

    def open(self, blocks: int) -> None:
        """Start a new sum of contributions of ``blocks`` blocks each; the one before is forgotten."""
        self._sums = [None] * blocks

    def add(self, index: int, block: bytes | memoryview) -> None:
        """Add one contributor's block ``index`` to the running sum."""
        vectors = [_parse(self._context, ciphertext) for ciphertext in _unpack(block)]
        current = self._sums[index]
        if current is None:
            self._sums[index] = vectors
            return
        if [v.size() for v in current] != [v.size() for v in vectors]:
            raise ProtocolError("two contributions to one sum differ in length")
        for running, vector in zip(current, vectors, strict=True):
            running.add_(vector)

    def block(self, index: int) -> bytes:
        """The sum of all contributions' blocks ``index``."""
        vectors = self._sums[index]
        if vectors is None:
            raise InternalError("a sum was asked for before anything was added")
        return _pack([vector.serialize() for vector in vectors])

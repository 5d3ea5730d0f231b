"""The stages in their order, block by block: quantise, pack, mask, encrypt; and after the sum
decrypt, unpack, check, rescale.

A contribution is a row of packed integers, those of the vector and then those of its checksum, in
ciphertexts of 4096. Blocks of ciphertexts leave one by one, so that sending and encrypting overlap
and nobody holds more than one contribution.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from privfl.errors import MismatchError, ProtocolError
from privfl.secagg.checksum import ROW, Checksum, checksum_length
from privfl.secagg.ckks import SEEDED_BYTES, Ring, SumKey
from privfl.secagg.layout import Layout
from privfl.secagg.masks import Masks
from privfl.secagg.packing import centred, pack, packed_length, unpack
from privfl.secagg.parameters import CIPHERTEXT_WORDS, DEGREE, Parameters
from privfl.secagg.quantise import Quantiser

# Values that are worked on at a time: they stay in the processor's cache, and are whole rows of the
# checksum.
_PIECE = 4 * ROW


def encrypt(
    vector: NDArray[np.generic], quantiser: Quantiser, checksum: Checksum, masks: Masks, key: SumKey
) -> Iterator[NDArray[np.uint64]]:
    """One member's contribution, block by block; each block is a new array of words.

    Raises:
        PrivflError: the vector does not fit; then nothing has been given out.
    """
    return (
        _words(integers, key)
        for integers in _masked(vector, quantiser, checksum, masks, key.parameters)
    )


def encrypt_seeded(
    vector: NDArray[np.generic], quantiser: Quantiser, checksum: Checksum, masks: Masks, key: SumKey
) -> Iterator[bytes]:
    """As :func:`encrypt` in half the size, for links that leave the machine: whoever adds makes
    words of a block with :func:`expand`.
    """
    masked = _masked(vector, quantiser, checksum, masks, key.parameters)
    return (
        b"".join(key.encrypt_seeded(piece) for piece in integers.reshape(-1, DEGREE))
        for integers in masked
    )


def expand(block: bytes, ring: Ring, front: bytes) -> NDArray[np.uint64]:
    """The words of a block of seeded ciphertexts; needs no key (``front`` as
    :attr:`SumKey.seeded_front`).

    Raises:
        ProtocolError: it is no such block.
    """
    pieces = [block[start : start + SEEDED_BYTES] for start in range(0, len(block), SEEDED_BYTES)]
    return np.concatenate(
        [ring.expand(piece, front) for piece in pieces] or [np.empty(0, dtype=np.uint64)]
    )


def _words(integers: NDArray[np.uint64], key: SumKey) -> NDArray[np.uint64]:
    words = np.empty((len(integers) // DEGREE, CIPHERTEXT_WORDS), dtype="<u8")
    for row, piece in zip(words, integers.reshape(-1, DEGREE), strict=True):
        key.encrypt(piece, row)
    return words.reshape(-1)


def _masked(
    vector: NDArray[np.generic],
    quantiser: Quantiser,
    checksum: Checksum,
    masks: Masks,
    parameters: Parameters,
) -> Iterator[NDArray[np.uint64]]:
    """The masked integers of a contribution, block by block, in whole ciphertexts."""
    quantiser.check(vector)
    layout = Layout(len(vector), parameters)
    checksum.blind(masks)
    return (
        _masked_block(vector, number, layout, quantiser, checksum, masks)
        for number in range(layout.blocks)
    )


def _masked_block(
    vector: NDArray[np.generic],
    number: int,
    layout: Layout,
    quantiser: Quantiser,
    checksum: Checksum,
    masks: Masks,
) -> NDArray[np.uint64]:
    integers = np.zeros(layout.ciphertexts(number) * DEGREE, dtype=np.uint64)
    where, fields = layout.values_of(number), layout.parameters.fields
    for start in range(where.start, where.stop, _PIECE):
        values = quantiser.integers(vector[start : min(start + _PIECE, where.stop)])
        checksum.add(values.astype(np.float64, copy=False))
        packed = pack(values, layout.parameters)
        at = (start - where.start) // fields
        integers[at : at + len(packed)] = packed
    here, there = layout.checks_of(number)
    if here.stop > here.start:
        integers[here] = checksum.integers()[there]
    masks.apply(integers)
    return integers


class Decryption:
    """Collects the blocks of one sum in their order.

    Nothing of it is given out before the checksum fits.
    """

    def __init__(self, values: int, checksum: Checksum, key: SumKey) -> None:
        self._layout = Layout(values, key.parameters)
        self._checksum = checksum
        self._key = key
        self._totals = np.empty(values, dtype=np.int64)
        self._checks = np.empty(checksum_length(key.parameters), dtype=np.int64)
        self._next = 0

    def add(self, block: bytes | memoryview) -> None:
        """Decrypt the next block.

        Raises:
            MismatchError: it is no block of this sum.
        """
        layout, parameters = self._layout, self._key.parameters
        if self._next >= layout.blocks or memoryview(
            block
        ).nbytes != 8 * CIPHERTEXT_WORDS * layout.ciphertexts(self._next):
            raise MismatchError
        try:
            integers = self._key.decrypt(np.frombuffer(block, dtype="<u8"))
        except ProtocolError:
            raise MismatchError from None
        where = layout.values_of(self._next)
        count = where.stop - where.start
        totals = unpack(integers[: packed_length(count, parameters)], count, parameters)
        self._totals[where] = totals
        self._checksum.add(totals.astype(np.float64))
        here, there = layout.checks_of(self._next)
        self._checks[there] = centred(integers[here], parameters.word_bits)
        self._next += 1

    def totals(self) -> NDArray[np.int64]:
        """The sums of all members' integers; shape (values,).

        Raises:
            MismatchError: a block is missing, or the checksum does not fit.
        """
        if self._next != self._layout.blocks or not self._checksum.fits(self._checks):
            raise MismatchError
        return self._totals

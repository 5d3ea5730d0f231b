"""The stages of a member in their order, block by block: quantise, pack, mask and encrypt a
vector; decrypt, unpack and check a sum.

A contribution is a row of packed integers, those of the vector and then those of its checksum, in
ciphertexts of 4096. Blocks of ciphertexts leave one by one, so that encrypting and sending overlap
and nobody holds more than one contribution.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from privfl.errors import MismatchError, ProtocolError
from privfl.secagg.checksum import ROW, Checksum, checksum_length
from privfl.secagg.ckks import SumKey
from privfl.secagg.layout import Layout
from privfl.secagg.masks import Masks
from privfl.secagg.packing import centred, pack, packed_length, unpack
from privfl.secagg.parameters import CIPHERTEXT_WORDS, DEGREE, Parameters
from privfl.secagg.quantise import Quantiser

# How many values are worked on at a time: they stay in the processor's cache, and are whole rows of
# the checksum.
_PIECE = 4 * ROW


def encrypt(
    vector: NDArray[np.generic], quantiser: Quantiser, checksum: Checksum, masks: Masks, key: SumKey
) -> Iterator[NDArray[np.uint64]]:
    """One member's contribution, block by block.

    Guarantee: to everybody but this member, key holders too, the contributions of the honest
    members reveal at most the sum of their packed integers modulo 2^P (proof 2 of
    docs/secure-aggregation.md), if ``masks`` serve no other contribution.

    Args:
        vector: What the member contributes; shape (values,).
        quantiser: Makes its elements integers.
        checksum: A new one, under the key of the attempt.
        masks: This member's masks of the attempt, unused.
        key: The key of the run.

    Returns:
        The blocks, each computed when it is asked for: a new array of words below q; shape
        (ciphertexts of the block * CIPHERTEXT_WORDS,).

    Raises:
        PrivflError: If the quantiser refuses the vector; no block has been made then.
    """
    return (
        _words(integers, key)
        for integers in _masked(vector, quantiser, checksum, masks, key.parameters)
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
    """The masked integers of a contribution, block by block, each filling whole ciphertexts."""
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
    elements, fields = layout.values_of(number), layout.parameters.fields
    for start in range(elements.start, elements.stop, _PIECE):
        values = quantiser.integers(vector[start : min(start + _PIECE, elements.stop)])
        checksum.add(values.astype(np.float64, copy=False))
        packed = pack(values, layout.parameters)
        first = (start - elements.start) // fields
        integers[first : first + len(packed)] = packed
    in_block, in_checksum = layout.checks_of(number)
    if in_block.stop > in_block.start:
        integers[in_block] = checksum.integers()[in_checksum]
    masks.apply(integers)
    return integers


class Decryption:
    """Decrypts one sum, whose blocks are added in order.

    Guarantee: :meth:`totals` returns the exact sum of the members' integers, or raises
    MismatchError but for a probability below 2^-63 (:mod:`privfl.secagg.checksum`). Nothing of a
    sum leaves this object before its checksum fits.

    Args:
        values: How many elements the vectors have.
        checksum: A new one, under the key of the attempt.
        key: The key of the run.
    """

    def __init__(self, values: int, checksum: Checksum, key: SumKey) -> None:
        self._layout = Layout(values, key.parameters)
        self._checksum = checksum
        self._key = key
        self._totals = np.empty(values, dtype=np.int64)
        self._checks = np.empty(checksum_length(key.parameters), dtype=np.int64)
        self._next = 0

    def add(self, block: bytes | memoryview) -> None:
        """Decrypt the next block: little-endian words of 64 bits.

        Raises:
            MismatchError: If the sum has no further block, or ``block`` is not of its length or not
                made of ciphertexts.
        """
        layout, parameters = self._layout, self._key.parameters
        size = memoryview(block).nbytes
        if self._next >= layout.blocks or size != (
            8 * CIPHERTEXT_WORDS * layout.ciphertexts(self._next)
        ):
            raise MismatchError
        try:
            integers = self._key.decrypt(np.frombuffer(block, dtype="<u8"))
        except ProtocolError:
            raise MismatchError from None
        elements = layout.values_of(self._next)
        count = elements.stop - elements.start
        totals = unpack(integers[: packed_length(count, parameters)], count, parameters)
        self._totals[elements] = totals
        self._checksum.add(totals.astype(np.float64))
        in_block, in_checksum = layout.checks_of(self._next)
        self._checks[in_checksum] = centred(integers[in_block], parameters.word_bits)
        self._next += 1

    def totals(self) -> NDArray[np.int64]:
        """The sums of all members' integers; shape (values,).

        Raises:
            MismatchError: If a block is missing, or the checksum does not fit.
        """
        if self._next != self._layout.blocks or not self._checksum.fits(self._checks):
            raise MismatchError
        return self._totals

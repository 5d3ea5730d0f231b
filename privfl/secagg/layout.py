"""Where the elements of a vector lie in the integers, ciphertexts and blocks of a contribution."""

from __future__ import annotations

from privfl.secagg.checksum import checksum_length
from privfl.secagg.packing import packed_length
from privfl.secagg.parameters import DEGREE, Parameters

# One mebibyte a block: small enough to stay in a cache and to overlap encryption with sending,
# large enough for the wire. A block is whole rows of the checksum.
CIPHERTEXTS_PER_BLOCK = 16
BLOCK_INTEGERS = CIPHERTEXTS_PER_BLOCK * DEGREE


class Layout:
    """The packed integers of a vector, then those of its checksum, cut into ciphertexts and blocks.

    Attributes:
        values: How many elements the vector has.
        parameters: Those of the sum.
        packed: How many integers hold the vector.
        integers: How many integers the contribution has, with the checksum's.
        blocks: How many blocks those make.
        all_ciphertexts: How many ciphertexts those make.
    """

    def __init__(self, values: int, parameters: Parameters) -> None:
        self.values = values
        self.parameters = parameters
        self.packed = packed_length(values, parameters)
        self.integers = self.packed + checksum_length(parameters)
        self.blocks = -(-self.integers // BLOCK_INTEGERS)
        self.all_ciphertexts = -(-self.integers // DEGREE)

    def ciphertexts(self, block: int) -> int:
        """How many ciphertexts block number ``block`` has."""
        return min(CIPHERTEXTS_PER_BLOCK, -(-(self.integers - block * BLOCK_INTEGERS) // DEGREE))

    def values_of(self, block: int) -> slice:
        """Which elements of the vector lie in block number ``block``."""
        per_block = BLOCK_INTEGERS * self.parameters.fields
        return slice(min(block * per_block, self.values), min((block + 1) * per_block, self.values))

    def checks_of(self, block: int) -> tuple[slice, slice]:
        """Which integers of block number ``block`` belong to the checksum, and which of the
        checksum's integers those are.
        """
        first = block * BLOCK_INTEGERS
        start, end = max(self.packed, first), min(self.integers, first + BLOCK_INTEGERS)
        end = max(start, end)
        return slice(start - first, end - first), slice(start - self.packed, end - self.packed)

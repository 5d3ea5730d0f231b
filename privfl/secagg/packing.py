"""Stage 2: two neighbouring values share one integer X of P bits, each in a field of w bits that
is wide enough for the sum of all members.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privfl.secagg.parameters import Parameters


def packed_length(values: int, parameters: Parameters) -> int:
    """How many packed integers hold ``values`` values."""
    return -(-values // parameters.fields)


def pack(
    values: NDArray[np.float64] | NDArray[np.int64], parameters: Parameters
) -> NDArray[np.uint64]:
    """The packed integers X = v0 + 2^w v1 modulo 2^64 of a vector; shape (packed_length,).

    If their number is odd, the last value is alone in its integer.

    Args:
        values: Integers; shape (values,). As float64 they must fit their fields: then two make an X
            of at most 53 bits (P <= 52), and the arithmetic is exact. As int64 they may be larger,
            and wrap.
        parameters: Those of the sum.
    """
    if parameters.fields == 1:
        return values.astype(np.int64).view(np.uint64)
    pairs = values[: len(values) // 2 * 2].reshape(-1, 2)
    integers = np.empty(packed_length(len(values), parameters), dtype=np.int64)
    factor = values.dtype.type(1 << parameters.field_bits)
    integers[: len(pairs)] = pairs[:, 0] + pairs[:, 1] * factor
    if len(values) % 2:
        integers[-1] = values[-1]
    return integers.view(np.uint64)


def unpack(sums: NDArray[np.uint64], values: int, parameters: Parameters) -> NDArray[np.int64]:
    """The sums of values that sums of packed integers hold; shape (values,).

    Args:
        sums: Sums of packed integers, of which only the lowest P bits count; shape
            (packed_length,).
        values: How many values were packed.
        parameters: Those of the sum.
    """
    if parameters.fields == 1:
        return centred(sums, parameters.word_bits)[:values]
    width = parameters.field_bits
    whole = centred(sums, parameters.word_bits)
    pairs = np.empty((len(sums), 2), dtype=np.int64)
    pairs[:, 0] = centred(sums, width)
    pairs[:, 1] = (whole - pairs[:, 0]) >> width
    return pairs.reshape(-1)[:values]


def centred(integers: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """The lowest ``bits`` bits as integers in [-2^(bits-1), 2^(bits-1)); same shape."""
    half, modulus = np.uint64(1 << (bits - 1)), np.uint64((1 << bits) - 1)
    return ((integers + half) & modulus).view(np.int64) - np.int64(half)


# Numbers too wide for one value or one packed integer travel as limbs, and join() takes sums of
# limbs for the limbs of the sum.


def limb_count(bits: int, limb_bits: int) -> int:
    """How many limbs of ``limb_bits`` bits hold a number of ``bits`` bits."""
    return -(-bits // limb_bits)


def split(numbers: NDArray[np.uint64], limb_bits: int, count: int) -> NDArray[np.uint64]:
    """The ``count`` limbs of each number, in [0, 2^limb_bits), lowest first.

    Args:
        numbers: Shape (numbers,).
        limb_bits: The bits of one limb.
        count: How many limbs each number has.

    Returns:
        The limbs of one number after those of the other; shape (numbers * count,).
    """
    shifts = np.uint64(limb_bits) * np.arange(count, dtype=np.uint64)
    return ((numbers[:, None] >> shifts) & np.uint64((1 << limb_bits) - 1)).reshape(-1)


def join(limbs: Sequence[int], limb_bits: int, count: int) -> list[int]:
    """The numbers whose limbs :func:`split` made; the sums of numbers, if ``limbs`` are sums.

    Exact, and of any size.
    """
    return [
        sum(limb << (limb_bits * index) for index, limb in enumerate(limbs[start : start + count]))
        for start in range(0, len(limbs), count)
    ]

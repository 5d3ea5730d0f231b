"""Stage 2: neighbouring values share one integer X of P bits, each in a field wide enough for
the sum of all members.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privfl.secagg.parameters import Parameters


def packed_length(values: int, parameters: Parameters) -> int:
    """How many integers hold ``values`` values."""
    return -(-values // parameters.fields)


def pack(
    values: NDArray[np.float64] | NDArray[np.int64], parameters: Parameters
) -> NDArray[np.uint64]:
    """X = v0 + 2^w v1 modulo 2^64; shape (packed_length,).

    An odd last value is alone in its integer.

    Values that keep to their fields make an X of at most 53 bits with two fields (P <= 52), so the
    arithmetic in float64 is exact. Values that may not come as int64, whose arithmetic wraps.
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
    """The ``values`` sums of values behind sums of packed integers, of which only the lowest P
    bits count; shape (values,).
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
    """The lowest ``bits`` bits as a number in [-2^(bits-1), 2^(bits-1)); same shape."""
    half, modulus = np.uint64(1 << (bits - 1)), np.uint64((1 << bits) - 1)
    return ((integers + half) & modulus).view(np.int64) - np.int64(half)


# -- numbers too wide for one value or integer: sums of limbs are the limbs of the sum


def limb_count(bits: int, limb_bits: int) -> int:
    """How many limbs of ``limb_bits`` bits hold a number of ``bits`` bits."""
    return -(-bits // limb_bits)


def split(numbers: NDArray[np.uint64], limb_bits: int, count: int) -> NDArray[np.uint64]:
    """Each number as ``count`` limbs in [0, 2^limb_bits), lowest first; shape (len(numbers) *
    count,).
    """
    shifts = np.uint64(limb_bits) * np.arange(count, dtype=np.uint64)
    return ((numbers[:, None] >> shifts) & np.uint64((1 << limb_bits) - 1)).reshape(-1)


def join(limbs: Sequence[int], limb_bits: int, count: int) -> list[int]:
    """The numbers, or sums of numbers, behind limbs or sums of limbs, exactly and of any size."""
    return [
        sum(limb << (limb_bits * place) for place, limb in enumerate(limbs[start : start + count]))
        for start in range(0, len(limbs), count)
    ]

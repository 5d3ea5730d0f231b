"""Numbers too wide for one value or one integer, as several of them: sums of limbs are the limbs of the sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def limb_count(bits: int, limb_bits: int) -> int:
    """How many limbs of ``limb_bits`` bits hold a number of ``bits`` bits."""
    return -(-bits // limb_bits)


def split(numbers: NDArray[np.uint64], limb_bits: int, count: int) -> NDArray[np.uint64]:
    """Each number as ``count`` limbs in [0, 2^limb_bits), lowest first; shape (len(numbers) * count,)."""
    shifts = np.uint64(limb_bits) * np.arange(count, dtype=np.uint64)
    return ((numbers[:, None] >> shifts) & np.uint64((1 << limb_bits) - 1)).reshape(-1)


def join(limbs: Sequence[int], limb_bits: int, count: int) -> list[int]:
    """The numbers, or sums of numbers, behind limbs or sums of limbs, exactly and of any size."""
    return [
        sum(limb << (limb_bits * place) for place, limb in enumerate(limbs[start : start + count]))
        for start in range(0, len(limbs), count)
    ]

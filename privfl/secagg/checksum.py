"""Integrity: a keyed checksum of each vector, which must fit the decrypted sum.

The key is known to the sites only.

CKKS is malleable: whoever relays a sum can add to it, multiply it by a number, replace it by an
encryption of zero, and send different sums to different sites. A checksum that is linear adds up
with the vectors it belongs to, under the same masks and the same encryption; one that is keyed
cannot be mended by who has no key; and a secret pad on top keeps multiples of a sum, which a linear
checksum alone would follow, from fitting.

Values stand in rows of 4096. For a column key K in {0 ... 2^16 - 1}^4096, a row key L_r and a pad
B, all fresh for each attempt and the same at every member,

    t = B + sum_r L_r * (sum_c K_c x_rc) mod p,        p = 2^61 - 1,

is computed four times with independent keys; the sum of n of them has n B. Whoever turns the sum
into k times itself plus d has to hit (k - 1) n B plus a keyed function of d: for k != 1 that is
uniform, because B is. For k = 1 let row r of d be d_r != 0 (|d_rc| < p): sum_c K_c d_rc = 0 mod p
for at most one value of one K_c, and otherwise t is off by a uniform amount. So four checksums fit
with probability at most (2^-16 + 2^-61)^4 < 2^-63. Products and sums of a row are exact in float64:
values of more than 26 bits are split.
"""

from __future__ import annotations

import operator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privfl.secagg.keystream import Keystream
from privfl.secagg.masks import Masks
from privfl.secagg.packing import join, limb_count, split
from privfl.secagg.parameters import DEGREE, Parameters

PRIME: Final = (1 << 61) - 1
ROW: Final = DEGREE
_COLUMNS = 4
# 26 + 16 + 12 bits: 2^53 is not reached by values of size 2^25 and keys below 2^16 over 4096
# places.
_WIDEST = 26
_HALF = 19


class Checksum:
    """The checksum of one stream of values under one key.

    Blocks are multiples of ROW long, but for the last.
    """

    def __init__(self, key: bytes, parameters: Parameters) -> None:
        self._stream = Keystream(key)
        keys = self._stream.words(ROW * _COLUMNS // 4).view("<u2")
        self._keys = keys.reshape(ROW, _COLUMNS).astype(np.float64)
        self._pads = (self._stream.words(_COLUMNS) >> np.uint64(3)).tolist()
        self._sums = [0] * _COLUMNS
        self._masks = [0] * _COLUMNS
        self._members = parameters.members
        self._wide = parameters.field_bits > _WIDEST
        self._limb_bits = _limb_bits(parameters)

    def blind(self, masks: Masks) -> None:
        """Hide this member's checksum from who knows the key: its limbs would show how it carried.

        To be called once.
        """
        self._masks = masks.blinds(_COLUMNS, PRIME)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take the next values, integers of fewer than 2^38 in size."""
        if len(values) % ROW:
            padded = np.zeros(-(-len(values) // ROW) * ROW)
            padded[: len(values)] = values
            values = padded
        rows = self._rows(values.reshape(-1, ROW))
        row_keys = (self._stream.words(len(rows)) >> np.uint64(3)).tolist()
        for column in range(_COLUMNS):
            products = map(operator.mul, row_keys[column::_COLUMNS], rows[column::_COLUMNS])
            self._sums[column] = (self._sums[column] + sum(products)) % PRIME

    def _rows(self, rows: NDArray[np.float64]) -> list[int]:
        """sum_c K_c x_rc, exactly, for every row and column key; rows one after the other."""
        if not self._wide:
            return _whole(rows @ self._keys)
        high = np.floor(rows * 2.0**-_HALF)
        low = rows - high * 2.0**_HALF
        return [
            (h << _HALF) + v
            for h, v in zip(_whole(high @ self._keys), _whole(low @ self._keys), strict=True)
        ]

    def integers(self) -> NDArray[np.uint64]:
        """A member's checksum as packed integers, to be masked and encrypted behind those of its
        vector; shape (checksum_length,).
        """
        count = limb_count(PRIME.bit_length(), self._limb_bits)
        own = [
            (s + pad + mask) % PRIME
            for s, pad, mask in zip(self._sums, self._pads, self._masks, strict=True)
        ]
        return split(np.array(own, dtype=np.uint64), self._limb_bits, count)

    def fits(self, sums: NDArray[np.int64]) -> bool:
        """Whether the checksum of a decrypted sum, taken by this object, is what the members'
        own checksums add up to.
        """
        count = limb_count(PRIME.bit_length(), self._limb_bits)
        theirs = [number % PRIME for number in join(sums.tolist(), self._limb_bits, count)]
        return theirs == [
            (s + self._members * pad) % PRIME for s, pad in zip(self._sums, self._pads, strict=True)
        ]


def checksum_length(parameters: Parameters) -> int:
    """How many packed integers a checksum takes."""
    return _COLUMNS * limb_count(PRIME.bit_length(), _limb_bits(parameters))


def _limb_bits(parameters: Parameters) -> int:
    # The limbs of all members add up below 2^(P-1), so that the centred sum is never negative.
    return parameters.word_bits - 1 - parameters.carry_bits


def _whole(numbers: NDArray[np.float64]) -> list[int]:
    return numbers.astype(np.int64).reshape(-1).tolist()

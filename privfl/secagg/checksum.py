"""Integrity: a keyed checksum of each vector, which must fit the decrypted sum.

Only the sites know the key.

CKKS is malleable: whoever relays a sum can add to it, multiply it by a number, replace it by an
encryption of zero, and send different sums to different sites. The checksum is linear, so that
checksums add up as their vectors do, under the same masks and the same encryption. It is keyed, so
that nobody without the key can adapt it to a changed sum. A secret pad keeps multiples of a sum
from fitting, which a linear checksum alone would allow.

Guarantee: a decrypted sum that differs from the members' sum fits with probability below 2^-63, if
whoever changed it does not know the key and the key serves one attempt.

Proof.

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
_CHECKSUMS = 4
# Values of size 2^25 and keys below 2^16, over 4096 columns, stay below 2^53: 25 + 16 + 12 bits.
_EXACT_BITS = 26
# Wider values are split: this many bits are the lower part.
_LOWER_BITS = 19


class Checksum:
    """The checksum of one vector or of one sum, whose values are added in order.

    Args:
        key: 32 bytes, for one attempt, the same at every member and unknown to everybody else.
        parameters: Those of the sum.
    """

    def __init__(self, key: bytes, parameters: Parameters) -> None:
        self._stream = Keystream(key)
        keys = self._stream.words(ROW * _CHECKSUMS // 4).view("<u2")
        self._keys = keys.reshape(ROW, _CHECKSUMS).astype(np.float64)
        self._pads = (self._stream.words(_CHECKSUMS) >> np.uint64(3)).tolist()
        self._sums = [0] * _CHECKSUMS
        self._masks = [0] * _CHECKSUMS
        self._members = parameters.members
        self._wide = parameters.field_bits > _EXACT_BITS
        self._limb_bits = _limb_bits(parameters)

    def blind(self, masks: Masks) -> None:
        """Mask this member's checksum modulo p before it is split into limbs; called once.

        Sums of bare limbs would show other sites, which know the key, how the single checksums
        carried.
        """
        self._masks = masks.blinds(_CHECKSUMS, PRIME)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take the next values; all calls but the last take a multiple of ROW.

        Args:
            values: Integers below 2^38 in size; shape (values,). The checksum is exact for those
                that fit a field of w bits; of larger ones it may be rounded, and not fit.
        """
        if len(values) % ROW:
            padded = np.zeros(-(-len(values) // ROW) * ROW)
            padded[: len(values)] = values
            values = padded
        rows = self._rows(values.reshape(-1, ROW))
        row_keys = (self._stream.words(len(rows)) >> np.uint64(3)).tolist()
        for number in range(_CHECKSUMS):
            products = map(operator.mul, row_keys[number::_CHECKSUMS], rows[number::_CHECKSUMS])
            self._sums[number] = (self._sums[number] + sum(products)) % PRIME

    def _rows(self, rows: NDArray[np.float64]) -> list[int]:
        """sum_c K_c x_rc, exactly, for every row and checksum; all of a row are neighbours."""
        if not self._wide:
            return _python_integers(rows @ self._keys)
        upper = np.floor(rows * 2.0**-_LOWER_BITS)
        lower = rows - upper * 2.0**_LOWER_BITS
        products = (_python_integers(part @ self._keys) for part in (upper, lower))
        return [(high << _LOWER_BITS) + low for high, low in zip(*products, strict=True)]

    def integers(self) -> NDArray[np.uint64]:
        """A member's checksum as packed integers, which are masked and encrypted after those of
        its vector; shape (checksum_length,).
        """
        count = limb_count(PRIME.bit_length(), self._limb_bits)
        own = [
            (s + pad + mask) % PRIME
            for s, pad, mask in zip(self._sums, self._pads, self._masks, strict=True)
        ]
        return split(np.array(own, dtype=np.uint64), self._limb_bits, count)

    def fits(self, sums: NDArray[np.int64]) -> bool:
        """Whether the checksum of the decrypted sum, which was added to this object, is the sum of
        the members' checksums.

        Args:
            sums: The decrypted sums of the members' :meth:`integers`; shape (checksum_length,).
        """
        count = limb_count(PRIME.bit_length(), self._limb_bits)
        received = [number % PRIME for number in join(sums.tolist(), self._limb_bits, count)]
        return received == [
            (s + self._members * pad) % PRIME for s, pad in zip(self._sums, self._pads, strict=True)
        ]


def checksum_length(parameters: Parameters) -> int:
    """How many packed integers a checksum takes."""
    return _CHECKSUMS * limb_count(PRIME.bit_length(), _limb_bits(parameters))


def _limb_bits(parameters: Parameters) -> int:
    # The limbs of all members add up below 2^(P-1), so that the centred sum is never negative.
    return parameters.word_bits - 1 - parameters.carry_bits


def _python_integers(numbers: NDArray[np.float64]) -> list[int]:
    return numbers.astype(np.int64).reshape(-1).tolist()

"""Parameters of an encrypted sum, derived from the number of members and the bits of a value.

Pure arithmetic, no TenSEAL.

With n members and values of b bits: a field has w = b + ceil(log2 n) bits, so that n values add
without touching the neighbour; an integer X of P bits holds two fields (P = 2 w), or one where two
do not fit (P = w). What is encrypted is X masked modulo 2^P and centred, times Delta = 2^k with
Delta >= 2 * 21 * n + 2. Decryption is exact with certainty if

    n * 2^(P-1) * Delta + 21 n < q / 2

for the actual prime q: the sum neither wraps modulo q nor does its error, at most 21 per
coefficient and ciphertext (SEAL's centred binomial with 21 pairs of bits), reach Delta / 2. Proof:
docs/secure-aggregation.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from privfl.errors import PrivflError

# Ring degree; 128-bit security up to 109 bits of modulus (homomorphicencryption.org, 2018), of
# which at most 60 are used here.
DEGREE = 4096
# A ciphertext is two polynomials of 64-bit words, c0 and then c1.
CIPHERTEXT_WORDS = 2 * DEGREE
LARGEST_ERROR = 21
LEAST_BITS, MOST_BITS = 12, 28
_PRIME_BITS = range(54, 61)
# The default leaves this many bits where they cost nothing.
_USUAL_MOST, _USUAL_LEAST = 24, 16


# How a sum of words comes about; the results are the same to the last bit.
SumPath = Literal["star", "reduce"]


@dataclass(frozen=True)
class Parameters:
    """What all members of a sum must agree on.

    Attributes:
        members: n, how many contributions are added.
        value_bits: b; a value is an integer of size at most 2^(b-1) - 1.
        fields: how many values share one integer, 2 or 1.
        prime: q, the modulus of the ciphertexts.
    """

    members: int
    value_bits: int
    fields: int
    prime: int

    @property
    def largest_value(self) -> int:
        """The greatest size of one value."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def field_bits(self) -> int:
        """w: the bits of one value's sum."""
        return self.value_bits + self.carry_bits

    @property
    def largest_total(self) -> int:
        """The greatest size of the sum of all members' values that its field holds."""
        return (1 << (self.field_bits - 1)) - 1

    @property
    def carry_bits(self) -> int:
        """ceil(log2 n): by how much the sum of all members is wider than one of them."""
        return (self.members - 1).bit_length()

    @property
    def word_bits(self) -> int:
        """P: the bits of one packed integer, and the modulus 2^P of masks and sums."""
        return self.fields * self.field_bits

    @property
    def delta_bits(self) -> int:
        """k: an integer is encrypted as 2^k times itself."""
        return (2 * LARGEST_ERROR * self.members + 1).bit_length()

    @property
    def exact(self) -> bool:
        """Whether decryption is exact whatever the values and the errors are."""
        largest = self.members << (self.word_bits - 1 + self.delta_bits)
        return 2 * (largest + LARGEST_ERROR * self.members) < self.prime

    @property
    def additions(self) -> int:
        """How many reduced words add up without reaching 2^64."""
        return (1 << 64) // self.prime


def derive(members: int, value_bits: int) -> Parameters:
    """Parameters that carry two values per integer, or one where two do not fit, with a prime of
    54 to 60 bits.

    Of the primes that are exact it is the largest of which the words of all members add up below
    2^64, and if there is none the smallest: then MPI can add them, and the larger the prime, the
    less time SEAL loses with trying to compress words.

    Raises:
        PrivflError: not even one value fits, or a number is out of range.
    """
    if members < 2:
        raise PrivflError(
            f"a secure sum needs at least 2 members, got {members}: the sum of one is its own "
            f"contribution"
        )
    if not LEAST_BITS <= value_bits <= MOST_BITS:
        raise PrivflError(
            f"value_bits must be between {LEAST_BITS} and {MOST_BITS}, got {value_bits}"
        )
    found = _fitting(members, value_bits, 2) or _fitting(members, value_bits, 1)
    if found is None:
        fewer = [bits for bits in range(LEAST_BITS, value_bits) if _fitting(members, bits, 1)]
        instead = f"at most {fewer[-1]} do" if fewer else "so many members do not fit at all"
        raise PrivflError(
            f"value_bits {value_bits} do not fit a sum of {members} members: {instead}"
        )
    return found


def usual_value_bits(members: int) -> int:
    """As many bits, from 16 to 24, as two values can have in one integer: more precision at no
    cost in bytes.
    """
    return next(
        (bits for bits in range(_USUAL_MOST, _USUAL_LEAST, -1) if _fitting(members, bits, 2)),
        _USUAL_LEAST,
    )


def parameters_for(members: int, value_bits: int | None, path: SumPath) -> Parameters:
    """The parameters of sums of so many members; the usual ``value_bits`` if none are given.

    Raises:
        PrivflError: so many bits do not fit so many members, or MPI cannot add their words.
    """
    parameters = derive(members, value_bits or usual_value_bits(members))
    if path == "reduce" and members > parameters.additions:
        raise PrivflError(
            f"path reduce adds at most {parameters.additions} contributions at value_bits "
            f"{parameters.value_bits}, there are {members}; "
            "lower value_bits, or use path star"
        )
    return parameters


def _fitting(members: int, value_bits: int, fields: int) -> Parameters | None:
    candidates = [
        Parameters(members, value_bits, fields, largest_prime(bits)) for bits in _PRIME_BITS
    ]
    exact = [found for found in candidates if found.exact]
    adding = [found for found in exact if members <= found.additions]
    return adding[-1] if adding else exact[0] if exact else None


@functools.cache
def largest_prime(bits: int) -> int:
    """The largest prime of so many bits that is 1 modulo 2 * DEGREE: what SEAL's
    CoeffModulus.Create chooses.
    """
    candidate = ((1 << bits) - 1) // (2 * DEGREE) * (2 * DEGREE) + 1
    while not _is_prime(candidate):
        candidate -= 2 * DEGREE
    return candidate


def _is_prime(number: int) -> bool:
    """Miller-Rabin with the first twelve primes as bases, which is a proof below 3.3e24
    (Sorenson and Webster 2015).
    """
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd, number)
        if x not in (1, number - 1) and not any(
            (x := x * x % number) == number - 1 for _ in range(twos - 1)
        ):
            return False
    return True

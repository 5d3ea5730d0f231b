"""Parameters of an encrypted sum, derived from the number of members and the bits of a value.

Pure arithmetic, no TenSEAL.

With n members and values of b bits, a field has w = b + ceil(log2 n) bits, so that a sum of n
values stays in its field; an integer X of P bits holds two fields (P = 2 w), or one if two do not
fit (P = w). What is encrypted is X masked modulo 2^P and centred, times Delta = 2^k with
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
# Bounds of the default for value_bits; more than the least only if two values share an integer.
_USUAL_MOST, _USUAL_LEAST = 24, 16


# Who adds the words: rank 0 as they arrive, or MPI. The sums are the same to the last bit.
SumPath = Literal["star", "reduce"]


@dataclass(frozen=True)
class Parameters:
    """What all members of a sum must agree on.

    Attributes:
        members: n, the number of contributions that are added.
        value_bits: b, the bits of a value with its sign; its size is at most 2^(b-1) - 1.
        fields: How many values share one integer, 2 or 1.
        prime: q, the modulus of the ciphertexts.
    """

    members: int
    value_bits: int
    fields: int
    prime: int

    @property
    def largest_value(self) -> int:
        """The largest size of one value."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def field_bits(self) -> int:
        """w: the bits of the field that holds one value, and the sum of all members' values."""
        return self.value_bits + self.carry_bits

    @property
    def largest_total(self) -> int:
        """The largest size of a sum of all members' values that its field holds."""
        return (1 << (self.field_bits - 1)) - 1

    @property
    def carry_bits(self) -> int:
        """ceil(log2 n): how many bits more a sum of n values has than one value."""
        return (self.members - 1).bit_length()

    @property
    def word_bits(self) -> int:
        """P: the bits of one packed integer, and the modulus 2^P of masks and sums."""
        return self.fields * self.field_bits

    @property
    def delta_bits(self) -> int:
        """k: an integer is encrypted as Delta = 2^k times itself."""
        return (2 * LARGEST_ERROR * self.members + 1).bit_length()

    @property
    def exact(self) -> bool:
        """Whether decryption is exact for all values and all errors of the encryption."""
        largest = self.members << (self.word_bits - 1 + self.delta_bits)
        return 2 * (largest + LARGEST_ERROR * self.members) < self.prime

    @property
    def additions(self) -> int:
        """How many words below q add up to less than 2^64."""
        return (1 << 64) // self.prime


def derive(members: int, value_bits: int) -> Parameters:
    """The parameters of sums of ``members`` contributions with values of ``value_bits`` bits.

    Two values share an integer, or one is alone in it if two do not fit. Of the primes of 54 to 60
    bits with which decryption is exact, the choice is the largest with which the words of all
    members add up to less than 2^64, so that MPI can add them; the larger the prime, the less time
    SEAL loses in trying to compress words. If there is none, the choice is the smallest exact one.

    Raises:
        PrivflError: If not even one value fits an integer, if ``value_bits`` is not between 12 and
            28, or if there are fewer than two members.
    """
    if members < 2:
        raise PrivflError(
            f"a secure sum needs at least 2 members, got {members}: the sum of one is its own "
            "contribution"
        )
    if not LEAST_BITS <= value_bits <= MOST_BITS:
        raise PrivflError(
            f"value_bits must be between {LEAST_BITS} and {MOST_BITS}, got {value_bits}"
        )
    parameters = _fitting(members, value_bits, 2) or _fitting(members, value_bits, 1)
    if parameters is None:
        possible = [bits for bits in range(LEAST_BITS, value_bits) if _fitting(members, bits, 1)]
        instead = f"at most {possible[-1]} do" if possible else "so many members do not fit at all"
        raise PrivflError(
            f"value_bits {value_bits} do not fit a sum of {members} members: {instead}"
        )
    return parameters


def usual_value_bits(members: int) -> int:
    """The default for ``value_bits``: the most, from 16 to 24, with which two values share an
    integer, because these bits cost no bytes; otherwise 16.
    """
    return next(
        (bits for bits in range(_USUAL_MOST, _USUAL_LEAST, -1) if _fitting(members, bits, 2)),
        _USUAL_LEAST,
    )


def parameters_for(members: int, value_bits: int | None, path: SumPath) -> Parameters:
    """The parameters of sums over ``path``.

    Args:
        members: How many contributions are added.
        value_bits: The bits of a value; :func:`usual_value_bits` if None.
        path: Who adds the words.

    Raises:
        PrivflError: If values of ``value_bits`` bits do not fit sums of ``members`` contributions,
            or if ``path`` is 'reduce' and the words of all members do not add up in 64 bits.
    """
    parameters = derive(members, value_bits or usual_value_bits(members))
    if path == "reduce" and members > parameters.additions:
        raise PrivflError(
            f"path reduce adds at most {parameters.additions} contributions at value_bits "
            f"{parameters.value_bits}, there are {members}; lower value_bits, or use path star"
        )
    return parameters


def _fitting(members: int, value_bits: int, fields: int) -> Parameters | None:
    candidates = [
        Parameters(members, value_bits, fields, largest_prime(bits)) for bits in _PRIME_BITS
    ]
    exact = [candidate for candidate in candidates if candidate.exact]
    addable = [candidate for candidate in exact if members <= candidate.additions]
    return addable[-1] if addable else exact[0] if exact else None


@functools.cache
def largest_prime(bits: int) -> int:
    """The largest prime of ``bits`` bits that is 1 modulo 2 * DEGREE, which SEAL's
    CoeffModulus.Create chooses too.
    """
    candidate = ((1 << bits) - 1) // (2 * DEGREE) * (2 * DEGREE) + 1
    while not _is_prime(candidate):
        candidate -= 2 * DEGREE
    return candidate


def _is_prime(number: int) -> bool:
    """Whether an odd number is prime: Miller-Rabin with the first twelve primes as bases, which is
    a proof below 3.3e24 (Sorenson and Webster 2015).
    """
    odd_factor, twos = number - 1, 0
    while odd_factor % 2 == 0:
        odd_factor, twos = odd_factor // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd_factor, number)
        if x not in (1, number - 1) and not any(
            (x := x * x % number) == number - 1 for _ in range(twos - 1)
        ):
            return False
    return True

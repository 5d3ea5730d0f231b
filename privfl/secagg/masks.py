"""Stage 3: pairwise masks on the packed integers X, which cancel in the sum of all members.

Each pair of members shares an X25519 secret, from which HKDF with the attempt's transcript as salt
derives the key of a new stream of words. One of the two adds the stream and the other subtracts it
modulo 2^P (Bonawitz et al. 2017, without the recovery of dropouts: an attempt has one set of
members).

Guarantee: the masked integers of at least two honest members are, for everybody else, uniform among
all that have the honest members' sum of X modulo 2^P. So whatever is computed from them later,
encoding errors, partial sums and what a key holder decrypts included, reveals at most that sum
(proof 2 of docs/secure-aggregation.md). It holds if each stream masks one vector only, and under
the security of X25519, HKDF and ChaCha20.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from privfl.errors import ProtocolError
from privfl.secagg.key_exchange import ExchangeKey
from privfl.secagg.keystream import Keystream

_ATTEMPT = struct.Struct("<QQ")
# Work on pieces that stay in the processor's cache.
_PIECE = 1 << 13


class Masks:
    """One member's masks for one attempt; integers are masked in order.

    Args:
        pairs: For every other member, the key of the pair's stream and whether this member adds
            the stream (the other one subtracts it).
    """

    def __init__(self, pairs: Iterable[tuple[bytes, bool]]) -> None:
        self._streams = [(Keystream(key), adds) for key, adds in pairs]

    def blinds(self, count: int, modulus: int) -> list[int]:
        """The next ``count`` masks modulo ``modulus``, for numbers that are split into limbs before
        they are summed.

        Sums of limbs show more than the sum of the numbers: how often limbs carried. If the numbers
        are masked before they are split, that depends on the masks too, and reveals no more than
        the sum.

        Args:
            count: How many numbers there are.
            modulus: That of the numbers, below 2^64.
        """
        totals = [0] * count
        for stream, adds in self._streams:
            # 128 bits for each number: at most 2^-64 from uniform.
            words = stream.words(2 * count).tolist()
            for index in range(count):
                mask = (words[2 * index] << 64) + words[2 * index + 1]
                totals[index] = (totals[index] + (mask if adds else -mask)) % modulus
        return totals

    def apply(self, integers: NDArray[np.uint64]) -> None:
        """Mask the next integers in place, modulo 2^64 and so, in their lowest P bits, modulo 2^P.

        Args:
            integers: The integers; shape (integers,).
        """
        for start in range(0, len(integers), _PIECE):
            piece = integers[start : start + _PIECE]
            for stream, adds in self._streams:
                words = stream.words(len(piece))
                if adds:
                    piece += words
                else:
                    piece -= words


class Pairs:
    """The secrets that this member shares with every other member of a run.

    Guarantee: no stream of masks serves two vectors. :meth:`masks` makes the masks of a (round,
    attempt) once, and after that only those of later ones.

    Args:
        own: This member's key of the run.
        members: The public exchange keys of all members, this one included; 32 bytes each.

    Attributes:
        members: How many members there are.

    Raises:
        ProtocolError: If ``members`` does not contain this member's key exactly once, or contains
            another key twice.
    """

    def __init__(self, own: ExchangeKey, members: Sequence[bytes]) -> None:
        if members.count(own.public) != 1 or len(set(members)) != len(members):
            raise ProtocolError(
                "the members' exchange keys do not contain this site's own key, or one of them "
                "twice"
            )
        self._own = own
        self._others = [key for key in members if key != own.public]
        self.members = len(members)
        self._last = (0, 0)

    def masks(self, round_: int, attempt: int, transcript: bytes) -> Masks:
        """The masks of one attempt.

        Args:
            round_: The number of the round.
            attempt: The number of the attempt in this round.
            transcript: A digest of everything on which the members of the attempt must agree; the
                masks of members whose transcripts differ do not cancel.

        Raises:
            ProtocolError: If the attempt is not later than the last one, because two vectors under
                the same masks would reveal their difference; or if a member's key is not a valid
                X25519 key.
        """
        if (round_, attempt) <= self._last:
            raise ProtocolError(
                f"masks were asked for attempt {attempt} of round {round_} after attempt "
                f"{self._last[1]} of round {self._last[0]}"
            )
        self._last = (round_, attempt)
        info = b"privfl mask 1" + _ATTEMPT.pack(round_, attempt)
        return Masks(
            (self._own.pair_key(other, transcript, info), self._own.public < other)
            for other in self._others
        )

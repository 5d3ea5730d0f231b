"""Stage 3: pairwise masks on the packed integers, which cancel in the sum of exactly the agreed
members.

Each pair of members shares an X25519 secret; HKDF with the attempt's transcript as salt makes it a
fresh stream of words, which one of the two adds and the other subtracts modulo 2^P (Bonawitz et al.
2017, without the recovery of dropouts: an attempt has one set of members). Given the sum of the
honest members' X modulo 2^P, their masked integers are uniform, so everything that happens to them
later, encoding errors, partial sums and whatever a key holder decrypts included, is a function of
noise and that sum.
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
    """One member's masks for one attempt. Integers are masked in order, each once.

    Args:
        pairs: for every other member the key of the pair's stream, and whether this member adds it
            (the other subtracts).
    """

    def __init__(self, pairs: Iterable[tuple[bytes, bool]]) -> None:
        self._streams = [(Keystream(key), adds) for key, adds in pairs]

    def blinds(self, count: int, modulus: int) -> list[int]:
        """The next ``count`` masks modulo any ``modulus`` below 2^64, for numbers that are split
        into limbs before they are summed.

        Sums of limbs show more of their summands than the sum of the numbers does: how often they
        carried. Numbers that were masked before they were split have nothing to show.
        """
        totals = [0] * count
        for stream, adds in self._streams:
            # 128 bits for each number: at most 2^-64 from uniform.
            words = stream.words(2 * count).tolist()
            for place in range(count):
                mask = (words[2 * place] << 64) + words[2 * place + 1]
                totals[place] = (totals[place] + (mask if adds else -mask)) % modulus
        return totals

    def apply(self, integers: NDArray[np.uint64]) -> None:
        """Mask the next integers in place, modulo 2^64; their lowest P bits are masked modulo
        2^P.
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
    """This member's secrets with all others.

    It gives masks for each (round, attempt) once, and only for later ones after that.

    Args:
        own: this member's key of the run.
        members: the public exchange keys of all members, this one included; afterwards, how many
            they are.

    Raises:
        ProtocolError: this member is not among them, a key is there twice, or one is no key.
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
        """The masks of one attempt. ``transcript``: a digest of all that its members must agree on.

        Raises:
            ProtocolError: not later than the last one: the same masks over two vectors would give
                away their difference.
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

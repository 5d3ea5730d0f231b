"""A site's part in the encrypted sums of one run: from a vector to blocks for the wire, and from
blocks to the checked sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.errors import MismatchError, ProtocolError
from privfl.secagg import (
    Checksum,
    Decryption,
    ExchangeKey,
    Layout,
    Masks,
    Pairs,
    Parameters,
    encrypt,
)
from privfl.secagg.quantise import Quantiser
from privfl.secagg.session.keys import RunKeys
from privfl.secagg.session.metrics import to_limbs
from privfl.secagg.session.roster import Roster

# Encryptions that are made ahead at most: 32 MiB of them.
_AHEAD = 512


class SumSession:
    """Opens one sum after another, each for a later (round, attempt), until one does not fit;
    then the keys are given up.
    """

    def __init__(self, roster: Roster, exchange: ExchangeKey, keys: RunKeys) -> None:
        self._roster = roster
        self.keys = keys
        self.key = keys.sums
        self._pairs = Pairs(exchange, [member.exchange_key for member in roster.members])
        self.given_up = False

    @property
    def masked_members(self) -> int:
        """Between how many members the masks are."""
        return self._pairs.members

    @property
    def parameters(self) -> Parameters:
        return self.key.parameters

    def work_ahead(self, layout: Layout) -> bool:
        """Do a little (about a millisecond) of what the next contribution will need, whatever is
        in it; False if nothing is left to do.
        """
        return not self.given_up and self.key.encrypt_ahead(min(_AHEAD, layout.all_ciphertexts))

    def open(
        self, round_: int, attempt: int, length: int, quantiser: Quantiser, facts: Any
    ) -> SumAttempt:
        """This site's part in the sum of one attempt.

        Args:
            length: values of the vector.
            facts: whatever else all members must have been told alike, as JSON: if they were not,
                the sum does not decode.

        Raises:
            ProtocolError: not later than the last one, or the keys were given up.
        """
        if self.given_up:
            raise MismatchError
        names = [member.site for member in self._roster.members]
        text = json.dumps(
            ["privfl sum 1", self._roster.digest.hex(), round_, attempt, length, names, facts],
            sort_keys=True,
        )
        transcript = hashlib.sha256(text.encode()).digest()
        masks = self._pairs.masks(round_, attempt, transcript)
        return SumAttempt(self, length, quantiser, masks, self.keys.checksum_key(transcript))

    @contextlib.contextmanager
    def until_mismatch(self) -> Iterator[None]:
        """The first sum that does not fit ends the key epoch: nothing is encrypted or decrypted
        with these keys any more.
        """
        try:
            yield
        except MismatchError:
            self.given_up = True
            raise


class SumAttempt:
    """One attempt: the contribution, once, and then the total. Made by :meth:`SumSession.open`."""

    def __init__(
        self, sums: SumSession, length: int, quantiser: Quantiser, masks: Masks, check: bytes
    ) -> None:
        self._sums, self._length, self._quantiser, self._check = sums, length, quantiser, check
        self._masks: Masks | None = masks
        self._decryption = Decryption(length, Checksum(check, sums.parameters), sums.key)

    def contribution(self, vector: NDArray[Any]) -> Iterator[NDArray[np.uint64]]:
        """The blocks of this site's contribution, each made when it is asked for.

        Raises:
            PrivflError: the vector does not fit; nothing has been given out.
            ProtocolError: another length, or a second contribution, which would be masked alike.
        """
        masks, self._masks = self._masks, None
        if masks is None or len(vector) != self._length:
            raise ProtocolError(
                f"a second contribution to one attempt, or one of another length than "
                f"{self._length}, was asked for"
            )
        return encrypt(
            vector,
            self._quantiser,
            Checksum(self._check, self._sums.parameters),
            masks,
            self._sums.key,
        )

    def wide_contribution(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
        """As :meth:`contribution`, of numbers modulo 2^64 that take several values each;
        :func:`metrics_from_totals` is the way back.
        """
        if self._masks is None:
            return self.contribution(numbers)
        hidden = numbers.astype(np.uint64)
        self._masks.apply(hidden)
        return self.contribution(to_limbs(hidden, self._sums.parameters))

    def collect(self, block: bytes | memoryview) -> None:
        """Take the next block of the total.

        Raises:
            MismatchError: it is none; the keys are given up.
        """
        with self._sums.until_mismatch():
            self._decryption.add(block)

    def total(self) -> NDArray[Any]:
        """The checked sum; shape (length,).

        Raises:
            MismatchError: it is not the sum of what the members sent; the keys are given up.
        """
        with self._sums.until_mismatch():
            return self._quantiser.numbers(self._decryption.totals())

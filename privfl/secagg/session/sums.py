"""A site's part in the secure sums of one run: from its vector to blocks for the wire, and from the
summed blocks to the checked sum.
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

# How many encryptions of zero are made ahead at most: 32 MiB of them.
_AHEAD = 512


class SumSession:
    """One site's part in all sums of a run, one after the other.

    Guarantee (mask secrecy): what the honest members of an attempt send reveals at most the sum of
    their vectors, to everybody who pools what he sees: the coordinator, the network, other sites
    with all their keys. It takes two honest members. No masks serve two vectors, because each
    (round, attempt) is opened once and only after all earlier ones; masks cancel only among
    members whose transcripts are equal.

    Guarantee (exactness): a sum that :meth:`SumAttempt.total` returns is the exact sum of the
    integers that all members sent in this attempt. Whoever alters, replays, cuts or mixes up sums
    without the keys of the run succeeds with probability below 2^-63 a sum
    (:mod:`privfl.secagg.checksum`).

    Guarantee (mismatch): the first sum that does not fit raises MismatchError, one error for all
    causes, and ends the session: :meth:`open` refuses every further attempt. So whoever probes a
    site with altered sums sees one refusal at most.

    Args:
        roster: The members of the run, whose signatures have been checked.
        exchange: This site's X25519 key of the run.
        keys: The keys that all sites of the run share.

    Attributes:
        keys: The keys of the run.
        key: The CKKS key among them.
        given_up: Whether a mismatch has ended the session.

    Raises:
        ProtocolError: If the roster does not contain this site's exchange key exactly once.
    """

    def __init__(self, roster: Roster, exchange: ExchangeKey, keys: RunKeys) -> None:
        self._roster = roster
        self.keys = keys
        self.key = keys.sums
        self._pairs = Pairs(exchange, [member.exchange_key for member in roster.members])
        self.given_up = False

    @property
    def masked_members(self) -> int:
        """How many members the masks are between."""
        return self._pairs.members

    @property
    def parameters(self) -> Parameters:
        """Those of the run's sums."""
        return self.key.parameters

    def work_ahead(self, layout: Layout) -> bool:
        """Spend about a millisecond on what the next contribution needs, which does not depend on
        its vector.

        Returns:
            Whether there was anything to do.
        """
        return not self.given_up and self.key.encrypt_ahead(min(_AHEAD, layout.all_ciphertexts))

    def open(
        self, round_: int, attempt: int, length: int, quantiser: Quantiser, facts: object
    ) -> SumAttempt:
        """This site's part in the sum of one attempt.

        Args:
            round_: The number of the round.
            attempt: The number of the attempt in this round.
            length: How many values the vector has.
            quantiser: Makes the vector integers, and the sum numbers.
            facts: Whatever else all members must agree on, as JSON. It is part of the transcript,
                so that a sum of members whose facts differ does not decode.

        Raises:
            ProtocolError: If (``round_``, ``attempt``) is not later than the last one.
            MismatchError: If an earlier sum did not fit.
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
        """End the session if a MismatchError is raised within."""
        try:
            yield
        except MismatchError:
            self.given_up = True
            raise


class SumAttempt:
    """One site's part in one attempt: its contribution, once, and then the sum of all.

    Made by :meth:`SumSession.open`; the guarantees of :class:`SumSession` are those of its
    attempts.

    Guarantee: at most one vector is masked with the masks of this attempt, and no part of a sum is
    returned before the checksum of the whole sum fits.
    """

    def __init__(
        self, sums: SumSession, length: int, quantiser: Quantiser, masks: Masks, checksum_key: bytes
    ) -> None:
        self._sums, self._length, self._quantiser = sums, length, quantiser
        self._checksum_key = checksum_key
        self._masks: Masks | None = masks
        self._decryption = Decryption(length, Checksum(checksum_key, sums.parameters), sums.key)

    def contribution(self, vector: NDArray[Any]) -> Iterator[NDArray[np.uint64]]:
        """The blocks of this site's contribution, each computed when it is asked for.

        Args:
            vector: Shape (length,).

        Returns:
            Words of 64 bits, as :func:`privfl.secagg.encrypt` returns them.

        Raises:
            PrivflError: If the quantiser refuses the vector; no block has been made then.
            ProtocolError: If the vector has another length, or the attempt already has a
                contribution: two vectors under the same masks would reveal their difference.
        """
        masks, self._masks = self._masks, None
        if masks is None or len(vector) != self._length:
            raise ProtocolError(
                "a second contribution to one attempt, or one of another length than "
                f"{self._length}, was asked for"
            )
        return encrypt(
            vector,
            self._quantiser,
            Checksum(self._checksum_key, self._sums.parameters),
            masks,
            self._sums.key,
        )

    def wide_contribution(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
        """As :meth:`contribution`, but of numbers modulo 2^64, which take several values each.

        The numbers are masked before they are split into limbs, because sums of bare limbs would
        reveal how often the limbs carried.
        :func:`~privfl.secagg.session.metrics.metrics_from_totals` takes the sums of limbs back to
        numbers.

        Args:
            numbers: Shape (length / limbs,).
        """
        if self._masks is None:
            return self.contribution(numbers)
        masked = numbers.astype(np.uint64)
        self._masks.apply(masked)
        return self.contribution(to_limbs(masked, self._sums.parameters))

    def collect(self, block: bytes | memoryview) -> None:
        """Decrypt the next block of the sum.

        Raises:
            MismatchError: If ``block`` cannot be the next block of the sum; the session has ended
                then.
        """
        with self._sums.until_mismatch():
            self._decryption.add(block)

    def total(self) -> NDArray[Any]:
        """The checked sum; shape (length,).

        Raises:
            MismatchError: If it is not the sum of what the members sent; the session has ended
                then.
        """
        with self._sums.until_mismatch():
            return self._quantiser.numbers(self._decryption.totals())

"""The secrets that the sites of one run share: made by the first site, sealed to the others, in
memory only.
"""

from __future__ import annotations

import hashlib
import hmac
import os

from privfl.errors import ProtocolError
from privfl.secagg import ExchangeKey, Parameters, SumKey
from privfl.secagg.key_exchange import open_sealed, seal
from privfl.secagg.keystream import KEY_BYTES, derive_key
from privfl.secagg.session.roster import Roster


class RunKeys:
    """The CKKS key, and a secret from which keys for checksums, digests of replicas and notes
    between sites are derived.
    """

    def __init__(self, secret: bytes, sums: SumKey) -> None:
        self._secret = secret
        self.sums = sums

    @classmethod
    def make(cls, parameters: Parameters) -> RunKeys:
        """New keys from the operating system's randomness."""
        return cls(os.urandom(KEY_BYTES), SumKey(parameters))

    def secret_bytes(self) -> bytes:
        """All of it, to be sealed to another site."""
        return self._secret + self.sums.secret_bytes()

    @classmethod
    def from_secret_bytes(cls, secret: bytes, parameters: Parameters) -> RunKeys:
        """What :meth:`secret_bytes` gave.

        Raises:
            ProtocolError: anything else.
        """
        if len(secret) <= KEY_BYTES:
            raise ProtocolError("the shared keys are too short")
        return cls(secret[:KEY_BYTES], SumKey(parameters, secret[KEY_BYTES:]))

    def tag(self, text: str, replica: bytes) -> str:
        """A keyed digest: equal tags mean equal replicas, and without the sites' key nobody can
        test a guess.
        """
        key = derive_key(self._secret, b"", b"privfl replica 1")
        return hmac.new(
            key, hashlib.sha256(text.encode()).digest() + replica, hashlib.sha256
        ).hexdigest()

    def checksum_key(self, transcript: bytes) -> bytes:
        """The key of the checksums of one attempt."""
        return derive_key(self._secret, transcript, b"privfl checksum 1")

    def seal_note(self, note: bytes, context: bytes) -> bytes:
        """A few bytes for all sites, which the coordinator relays."""
        return seal(self._note_key(), note, context)

    def open_note(self, sealed: bytes, context: bytes) -> bytes:
        """What a site sealed with :meth:`seal_note` for the same context.

        Raises:
            ProtocolError: altered, or for another context.
        """
        return open_sealed(self._note_key(), sealed, context)

    def _note_key(self) -> bytes:
        return derive_key(self._secret, b"", b"privfl note 1")


def seal_keys(keys: RunKeys, exchange: ExchangeKey, roster: Roster) -> list[tuple[int, bytes]]:
    """The keys sealed to every member but the first, which made them: (index of the member,
    sealed).
    """
    return [
        (
            index,
            exchange.seal(member.exchange_key, keys.secret_bytes(), _context(roster, member.site)),
        )
        for index, member in enumerate(roster.members[1:], 1)
    ]


def open_keys(
    sealed: bytes, exchange: ExchangeKey, roster: Roster, site: str, parameters: Parameters
) -> RunKeys:
    """The keys that the first member sealed to ``site``.

    Raises:
        ProtocolError: altered, or sealed by or to somebody else or for another roster.
    """
    secret = exchange.open(roster.members[0].exchange_key, sealed, _context(roster, site))
    return RunKeys.from_secret_bytes(secret, parameters)


def _context(roster: Roster, receiver: str) -> bytes:
    return b"privfl run keys 1" + roster.digest + receiver.encode()

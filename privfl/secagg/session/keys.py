"""The secrets that the sites of one run share: made by the first site, sealed to the others, held
in memory only.
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
    """The CKKS key of a run, and a secret of 32 bytes from which HKDF derives keys.

    The derived keys and what they are for:

    - a key for the checksums of each attempt (:meth:`checksum_key`), with which sites notice that
      a sum was altered;
    - a key for digests of replicas (:meth:`tag`), with which sites notice that their replicas
      differ;
    - a key for notes (:meth:`seal_note`), which sites send to each other through the coordinator.

    The secret itself is never used as a key. The keys of masks do not derive from it, but from the
    X25519 keys of each pair of members, so that the other sites do not know them.

    Guarantee: without the secret nobody can make a checksum, a tag or a note that a site accepts,
    test a guess of a replica, or read a note. All sites have it, the coordinator does not.

    Args:
        secret: 32 bytes.
        sums: The CKKS key.

    Attributes:
        sums: The CKKS key.
    """

    def __init__(self, secret: bytes, sums: SumKey) -> None:
        self._secret = secret
        self.sums = sums

    @classmethod
    def make(cls, parameters: Parameters) -> RunKeys:
        """New keys from the operating system's randomness."""
        return cls(os.urandom(KEY_BYTES), SumKey(parameters))

    def secret_bytes(self) -> bytes:
        """All secrets as bytes, which may leave this process only sealed to another site."""
        return self._secret + self.sums.secret_bytes()

    @classmethod
    def from_secret_bytes(cls, secret: bytes, parameters: Parameters) -> RunKeys:
        """The keys that :meth:`secret_bytes` wrote.

        Raises:
            ProtocolError: If ``secret`` does not have the form of such keys.
        """
        if len(secret) <= KEY_BYTES:
            raise ProtocolError("the shared keys are too short")
        return cls(secret[:KEY_BYTES], SumKey(parameters, secret[KEY_BYTES:]))

    def tag(self, text: str, replica: bytes) -> str:
        """HMAC-SHA256 of a replica and of ``text``, in hexadecimal: equal tags mean that both are
        equal.
        """
        key = derive_key(self._secret, b"", b"privfl replica 1")
        return hmac.new(
            key, hashlib.sha256(text.encode()).digest() + replica, hashlib.sha256
        ).hexdigest()

    def checksum_key(self, transcript: bytes) -> bytes:
        """The key of the checksums of the attempt with this transcript; 32 bytes."""
        return derive_key(self._secret, transcript, b"privfl checksum 1")

    def seal_note(self, note: bytes, context: bytes) -> bytes:
        """Encrypt and authenticate ``note`` for all sites, so that the coordinator can relay it.

        Args:
            note: What to seal.
            context: What the note is, and from which site and round; :meth:`open_note` needs the
                same.
        """
        return seal(self._note_key(), note, context)

    def open_note(self, sealed: bytes, context: bytes) -> bytes:
        """The note that a site sealed with :meth:`seal_note`.

        Raises:
            ProtocolError: If ``sealed`` was altered, or was sealed for another context.
        """
        return open_sealed(self._note_key(), sealed, context)

    def _note_key(self) -> bytes:
        return derive_key(self._secret, b"", b"privfl note 1")


def seal_keys(keys: RunKeys, exchange: ExchangeKey, roster: Roster) -> list[tuple[int, bytes]]:
    """The keys sealed to every member but the first, which made them.

    Returns:
        (index of the member in the roster, sealed keys) for each of them.
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
        ProtocolError: If ``sealed`` was altered, or was not sealed by the first member of this
            roster to ``site``.
    """
    secret = exchange.open(roster.members[0].exchange_key, sealed, _context(roster, site))
    return RunKeys.from_secret_bytes(secret, parameters)


def _context(roster: Roster, receiver: str) -> bytes:
    return b"privfl run keys 1" + roster.digest + receiver.encode()

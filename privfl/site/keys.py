"""The secrets that the sites of one run share: made by the first site, sealed to the others, in memory only."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct

from privfl.errors import ProtocolError
from privfl.federation.messages import Vector
from privfl.secagg import SumKey

_DIGEST_KEY_BYTES = 32
_LENGTH = struct.Struct("<I")


class RunKeys:
    """A CKKS key for updates, another for metrics, and a key for digests of replicas.

    Two keys, because the totals of metrics are told to the coordinator: under one key it could hand in the ciphertext of an update as a
    total of metrics and be told what is inside.
    """

    def __init__(self, digest_key: bytes, sums: dict[Vector, SumKey]) -> None:
        self._digest_key = digest_key
        self.sums = sums

    @classmethod
    def make(cls) -> RunKeys:
        """New keys from the operating system's randomness."""
        return cls(os.urandom(_DIGEST_KEY_BYTES), {"update": SumKey(), "metrics": SumKey()})

    def secret_bytes(self) -> bytes:
        """All of it, to be sealed to another site."""
        update = self.sums["update"].secret_bytes()
        return self._digest_key + _LENGTH.pack(len(update)) + update + self.sums["metrics"].secret_bytes()

    @classmethod
    def from_secret_bytes(cls, secret: bytes) -> RunKeys:
        """What :meth:`secret_bytes` gave.

        Raises:
            ProtocolError: anything else.
        """
        start = _DIGEST_KEY_BYTES + _LENGTH.size
        if len(secret) < start:
            raise ProtocolError("the shared keys are too short")
        (length,) = _LENGTH.unpack_from(secret, _DIGEST_KEY_BYTES)
        update, metrics = secret[start : start + length], secret[start + length :]
        return cls(
            secret[:_DIGEST_KEY_BYTES], {"update": SumKey.from_secret_bytes(update), "metrics": SumKey.from_secret_bytes(metrics)}
        )

    def tag(self, text: str, replica: bytes) -> str:
        """A keyed digest: equal tags mean equal replicas, and without the sites' key nobody can test a guess."""
        return hmac.new(self._digest_key, hashlib.sha256(text.encode()).digest() + replica, hashlib.sha256).hexdigest()

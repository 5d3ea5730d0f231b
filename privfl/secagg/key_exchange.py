"""Keys between two sites: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), and ChaCha20-Poly1305 (RFC
8439) for what is sealed.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from privfl.errors import ProtocolError
from privfl.secagg.keystream import derive_key

_NONCE_BYTES = 12


class ExchangeKey:
    """An X25519 key pair that lives for one run, in memory only."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )

    def pair_key(self, peer: bytes, salt: bytes, info: bytes) -> bytes:
        """A key of 32 bytes that this pair shares, the same at both ends.

        Args:
            peer: the 32 bytes of the other public key.
            salt: the occasion; ``info``: the purpose.

        Raises:
            ProtocolError: ``peer`` is not a valid X25519 key.
        """
        one, two = sorted((self.public, peer))
        return derive_key(self._shared(peer), salt, info + one + two)

    def seal(self, receiver: bytes, secret: bytes, context: bytes) -> bytes:
        """``secret`` encrypted and authenticated so that only the holder of public key
        ``receiver`` opens it.

        Args:
            receiver: the 32 bytes of the receiver's public key.
            context: what the message is and for which run; it must be the same when it is opened.
        """
        return seal(self._sealing_key(receiver, self.public, receiver, context), secret, context)

    def open(self, sender: bytes, sealed: bytes, context: bytes) -> bytes:
        """The secret that the holder of public key ``sender`` sealed to this key.

        Raises:
            ProtocolError: altered on the way, sealed by or to somebody else, or for another
                context.
        """
        return open_sealed(self._sealing_key(sender, sender, self.public, context), sealed, context)

    def _sealing_key(self, peer: bytes, sender: bytes, receiver: bytes, context: bytes) -> bytes:
        # Both public keys in their order, so that a key belongs to one direction of one pair.
        return derive_key(self._shared(peer), context, b"privfl sealing 1" + sender + receiver)

    def _shared(self, peer: bytes) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            raise ProtocolError("a public key is not a valid X25519 key") from error


def seal(key: bytes, secret: bytes, context: bytes) -> bytes:
    """``secret`` encrypted and authenticated under a shared key of 32 bytes, with a random nonce
    in front.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, secret, context)


def open_sealed(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """What :func:`seal` sealed.

    Raises:
        ProtocolError: altered, under another key, or for another context.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise ProtocolError(
            "a sealed message does not open: it was altered, or sealed to another site or run"
        ) from error

"""Sealing a secret to one receiver: X25519, HKDF-SHA256, ChaCha20-Poly1305 (RFC 7748, 5869, 8439)."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privfl.errors import ProtocolError

_NONCE_BYTES = 12


class SealingKey:
    """An X25519 key pair that lives for one run, in memory only."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    def seal(self, receiver: bytes, secret: bytes, context: bytes) -> bytes:
        """``secret`` encrypted and authenticated so that only the holder of public key ``receiver`` opens it.

        Args:
            receiver: the 32 bytes of the receiver's public key.
            context: what the message is and for which run; it must be the same when it is opened.
        """
        nonce = os.urandom(_NONCE_BYTES)
        cipher = self._cipher(receiver, sender_public=self.public, receiver_public=receiver, context=context)
        return nonce + cipher.encrypt(nonce, secret, context)

    def open(self, sender: bytes, sealed: bytes, context: bytes) -> bytes:
        """The secret that the holder of public key ``sender`` sealed to this key.

        Raises:
            ProtocolError: altered on the way, sealed by or to somebody else, or for another context.
        """
        cipher = self._cipher(sender, sender_public=sender, receiver_public=self.public, context=context)
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise ProtocolError("a sealed key does not open: it was altered, or sealed to another site or run") from error

    def _cipher(self, peer: bytes, *, sender_public: bytes, receiver_public: bytes, context: bytes) -> ChaCha20Poly1305:
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            raise ProtocolError("a public key is not a valid X25519 key") from error
        # Both public keys go into the derivation, so that a key belongs to one direction of one pair.
        info = b"privfl sealing 1" + sender_public + receiver_public
        return ChaCha20Poly1305(HKDF(hashes.SHA256(), 32, salt=context, info=info).derive(shared))

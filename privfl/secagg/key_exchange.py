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
    """An X25519 key pair of a site, new for each run and in memory only.

    Attributes:
        public: The public key; 32 bytes.
    """

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )

    def pair_key(self, peer: bytes, salt: bytes, info: bytes) -> bytes:
        """A key of 32 bytes that this site and a peer share, the same at both.

        Args:
            peer: The peer's public key; 32 bytes.
            salt: What the key is for in this case, for example a digest of what both agreed on.
            info: The purpose; keys for different purposes are independent.

        Raises:
            ProtocolError: If ``peer`` is not a valid X25519 key.
        """
        one, two = sorted((self.public, peer))
        return derive_key(self._shared(peer), salt, info + one + two)

    def seal(self, receiver: bytes, secret: bytes, context: bytes) -> bytes:
        """Encrypt and authenticate ``secret`` so that only the receiver can open it.

        Args:
            receiver: The receiver's public key; 32 bytes.
            secret: What to seal.
            context: What the message is and for which run; :meth:`open` needs the same.

        Raises:
            ProtocolError: If ``receiver`` is not a valid X25519 key.
        """
        return seal(self._sealing_key(receiver, self.public, receiver, context), secret, context)

    def open(self, sender: bytes, sealed: bytes, context: bytes) -> bytes:
        """The secret that the sender sealed to this key.

        Args:
            sender: The sender's public key; 32 bytes.
            sealed: The result of the sender's :meth:`seal`.
            context: What the sender sealed it for.

        Raises:
            ProtocolError: If ``sealed`` was altered, was sealed by or to another key or for another
                context, or if ``sender`` is not a valid X25519 key.
        """
        return open_sealed(self._sealing_key(sender, sender, self.public, context), sealed, context)

    def _sealing_key(self, peer: bytes, sender: bytes, receiver: bytes, context: bytes) -> bytes:
        # Sender before receiver, so that a key belongs to one direction of one pair.
        return derive_key(self._shared(peer), context, b"privfl sealing 1" + sender + receiver)

    def _shared(self, peer: bytes) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            raise ProtocolError("a public key is not a valid X25519 key") from error


def seal(key: bytes, secret: bytes, context: bytes) -> bytes:
    """``secret`` encrypted and authenticated (ChaCha20-Poly1305) under a shared key of 32 bytes,
    after a random nonce.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, secret, context)


def open_sealed(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The secret that :func:`seal` encrypted under ``key``.

    Raises:
        ProtocolError: If ``sealed`` was altered, or was sealed under another key or for another
            context.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise ProtocolError(
            "a sealed message does not open: it was altered, or sealed to another site or run"
        ) from error

"""Who a site is: an Ed25519 key pair (RFC 8032) that outlives runs, and the text form of its
public key.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privfl.errors import PrivflError, ProtocolError

_PREFIX = "ed25519:"


class Identity:
    """A signing key of a site.

    Args:
        private: The private key; a new one from the operating system's randomness if None.

    Attributes:
        public: The public key as other sites pin it: 'ed25519:' and 43 characters of URL-safe
            base64.
    """

    def __init__(self, private: Ed25519PrivateKey | None = None) -> None:
        self._private = Ed25519PrivateKey.generate() if private is None else private
        raw = self._private.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        self.public = _PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    @classmethod
    def from_pem(cls, pem: bytes) -> Identity:
        """The identity that :meth:`pem` wrote.

        Raises:
            PrivflError: If ``pem`` is not an Ed25519 private key, or needs a password.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise PrivflError(
                "holds no private key that can be read; make one with `privfl keys generate`"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise PrivflError(
                "holds a private key of another kind than Ed25519; make one with `privfl keys "
                "generate`"
            )
        return cls(key)

    def pem(self) -> bytes:
        """The private key as PKCS8 in PEM, unencrypted."""
        return self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def sign(self, message: bytes) -> bytes:
        """The signature of ``message``: 64 bytes, which :func:`verify` accepts for this message and
        this key only.
        """
        return self._private.sign(message)


def verify(public: str, signature: bytes, message: bytes) -> None:
    """Check a signature.

    Args:
        public: The signer's public key in its text form.
        signature: 64 bytes.
        message: What was signed.

    Raises:
        ProtocolError: If ``signature`` is not one of ``message`` by the holder of ``public``, or if
            ``public`` is not a public key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_bytes(public)).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError("a signature does not fit") from error


def public_bytes(public: str) -> bytes:
    """The 32 bytes behind the text form of a public key.

    Raises:
        ValueError: If ``public`` is not the text form of a public key.
    """
    text = public.removeprefix(_PREFIX)
    try:
        raw = base64.b64decode(text + "=", altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("is no public key") from error
    # Each key has one spelling, so that two texts that differ are two keys.
    if (
        text == public
        or len(raw) != 32
        or base64.urlsafe_b64encode(raw).decode().rstrip("=") != text
    ):
        raise ValueError("must be 'ed25519:' and 43 characters, as `privfl keys show` prints it")
    return raw


def load_identity(path: str) -> Identity:
    """The identity in a file that `privfl keys generate` wrote.

    Raises:
        PrivflError: If the file cannot be read, if other users may read or change it, or if it does
            not hold an Ed25519 private key.
    """
    file = Path(path)
    try:
        others = file.stat().st_mode & 0o077
        pem = file.read_bytes()
    except OSError as error:
        raise PrivflError(
            f"cannot read the identity {path}: {error.strerror}; make one with `privfl keys "
            f"generate {path}`"
        ) from error
    if others:
        raise PrivflError(
            f"the identity {path} may be read or changed by others; `chmod 600 {path}`"
        )
    try:
        return Identity.from_pem(pem)
    except PrivflError as error:
        raise PrivflError(f"{path} {error}") from error

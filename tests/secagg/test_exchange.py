"""A sealed secret opens for its receiver, in its context, unaltered, and for nobody else."""

from __future__ import annotations

import pytest

from privfl.errors import ProtocolError
from privfl.secagg import ExchangeKey


def test_only_the_receiver_opens():
    sender, receiver, relay = ExchangeKey(), ExchangeKey(), ExchangeKey()
    sealed = sender.seal(receiver.public, b"secret", b"run 1 to B")
    assert b"secret" not in sealed
    assert receiver.open(sender.public, sealed, b"run 1 to B") == b"secret"
    for opener, claimed, context in [
        (relay, sender.public, b"run 1 to B"),
        (receiver, relay.public, b"run 1 to B"),
        (receiver, sender.public, b"run 2 to B"),
    ]:
        with pytest.raises(ProtocolError, match="does not open"):
            opener.open(claimed, sealed, context)


def test_every_altered_bit_is_noticed():
    sender, receiver = ExchangeKey(), ExchangeKey()
    sealed = sender.seal(receiver.public, b"secret", b"c")
    for bit in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            receiver.open(sender.public, bytes(altered), b"c")
    for length in range(len(sealed)):
        with pytest.raises(ProtocolError):
            receiver.open(sender.public, sealed[:length], b"c")


def test_a_sealed_message_does_not_reflect():
    a, b = ExchangeKey(), ExchangeKey()
    sealed = a.seal(b.public, b"secret", b"c")
    with pytest.raises(ProtocolError):
        a.open(b.public, sealed, b"c")


def test_weak_public_keys_are_refused():
    with pytest.raises(ProtocolError, match="X25519"):
        ExchangeKey().seal(bytes(32), b"secret", b"c")
    with pytest.raises(ProtocolError, match="X25519"):
        ExchangeKey().seal(b"short", b"secret", b"c")


def test_keys_and_nonces_are_new_each_time():
    receiver = ExchangeKey()
    sender = ExchangeKey()
    assert ExchangeKey().public != ExchangeKey().public
    assert sender.seal(receiver.public, b"x", b"c") != sender.seal(receiver.public, b"x", b"c")

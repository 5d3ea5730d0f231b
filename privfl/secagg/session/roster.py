"""What the sites of a run must agree on before one of them uses a key, and the signatures under it.

The coordinator relays the sites' public keys. So that it cannot put its own in their place, nor invent or leave out a member, every site signs a
digest of all of them with its own identity, and checks all other signatures, against pinned identities where its site file has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from privfl.errors import PrivflError, ProtocolError
from privfl.federation.messages import Welcome
from privfl.identity import verify
from privfl.secagg import ExchangeKey, Identity, Parameters

PINNED: Final = "pinned keys"
SINGLE: Final = "single trust domain"
# One set of keys lasts for one run; a run that gives its keys up ends.
KEY_EPOCH = 1


@dataclass(frozen=True)
class Party:
    """One site as the relay presents it: name, X25519 key of this run, Ed25519 identity."""

    site: str
    exchange_key: bytes
    identity: str


@dataclass(frozen=True)
class Agreement:
    """The members of a run in their order, and the digest that all of them sign."""

    members: tuple[Party, ...]
    digest: bytes

    @classmethod
    def relayed(cls, welcome: Welcome, experiment_digest: str, parameters: Parameters) -> Agreement:
        """What the coordinator says it is.

        Raises:
            ProtocolError: a public key is none.
        """
        try:
            members = [Party(m.site, bytes.fromhex(m.exchange_key), m.identity) for m in welcome.members]
        except ValueError as error:
            raise ProtocolError("a public key is not in hexadecimal") from error
        return cls.of(welcome.run, experiment_digest, parameters, members)

    @classmethod
    def of(cls, run: str, experiment_digest: str, parameters: Parameters, members: Sequence[Party]) -> Agreement:
        """hash(run, experiment, parameters of the encryption, all keys, key epoch)."""
        text = [
            "privfl agreement 1",
            run,
            experiment_digest,
            [parameters.members, parameters.value_bits, parameters.fields, parameters.prime],
            [[party.site, party.exchange_key.hex(), party.identity] for party in members],
            KEY_EPOCH,
        ]
        return cls(tuple(members), hashlib.sha256(json.dumps(text).encode()).digest())

    def check(self, site: str, own: ExchangeKey, identity: Identity, pinned: Mapping[str, str]) -> None:
        """Hold the relayed members against what this site knows, before it signs.

        Raises:
            ProtocolError: its own keys are not there under its name, or a key is there twice.
            PrivflError: a member shows another identity than the one this site has pinned.
        """
        mine = [(party.exchange_key, party.identity) for party in self.members if party.site == site]
        if mine != [(own.public, identity.public)]:
            raise ProtocolError(
                f"the coordinator relays other keys for site {site} than those it sent: a key was swapped on the way"
            )
        for part in ("site", "exchange_key", "identity"):
            if len({getattr(party, part) for party in self.members}) != len(self.members):
                raise ProtocolError("the coordinator relays two members with one name or one key")
        for party in self.members:
            if pinned and party.site != site and pinned.get(party.site) != party.identity:
                raise PrivflError(
                    f"site {party.site} shows the key {party.identity}, but {pinned.get(party.site, 'none')} is pinned for it (peers in the file of "
                    f"site {site}); ask that site which one is right before you change anything"
                )

    def check_signatures(self, signatures: Mapping[str, str]) -> None:
        """Every member, and nobody else, signed this digest; signatures are in hexadecimal.

        Raises:
            ProtocolError: naming the first member whose signature is missing or does not fit.
        """
        if set(signatures) != {party.site for party in self.members}:
            raise ProtocolError("the coordinator relays signatures of other sites than this run's members")
        for party in self.members:
            try:
                verify(party.identity, bytes.fromhex(signatures[party.site]), self.digest)
            except (ProtocolError, ValueError) as error:
                raise ProtocolError(
                    f"the signature of site {party.site} under this run's keys does not fit: a key was swapped or a member invented on the way"
                ) from error


def load_identity(path: str) -> Identity:
    """The identity in a file that `privfl keys generate` wrote.

    Raises:
        PrivflError: it cannot be read, others may read it too, or it holds no such key.
    """
    file = Path(path)
    try:
        others = file.stat().st_mode & 0o077
        pem = file.read_bytes()
    except OSError as error:
        raise PrivflError(
            f"cannot read the identity {path}: {error.strerror}; make one with `privfl keys generate {path}`"
        ) from error
    if others:
        raise PrivflError(f"the identity {path} may be read or changed by others; `chmod 600 {path}`")
    try:
        return Identity.from_pem(pem)
    except PrivflError as error:
        raise PrivflError(f"{path} {error}") from error

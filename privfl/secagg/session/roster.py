"""What the sites of a run must agree on before one of them uses a key, and the signatures under it.

The coordinator relays the sites' public keys. So that it cannot put its own in their place, nor
invent or leave out a member, every site signs a digest of all of them with its own identity, and
checks all other signatures, against pinned identities where its site file has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from privfl.errors import PrivflError, ProtocolError
from privfl.identity import Identity, verify
from privfl.secagg import ExchangeKey, Parameters

PINNED: Final = "pinned keys"
SINGLE: Final = "single trust domain"
# One set of keys lasts for one run; a run that gives its keys up ends.
KEY_EPOCH = 1


@dataclass(frozen=True)
class Member:
    """One site as the relay presents it: its name, its X25519 key of this run, its Ed25519
    identity.
    """

    site: str
    exchange_key: bytes
    identity: str

    @classmethod
    def relayed(cls, site: str, exchange_key: str, identity: str) -> Member:
        """A member from what came over the wire, where ``exchange_key`` is in hexadecimal.

        Raises:
            ProtocolError: If ``exchange_key`` is not in hexadecimal.
        """
        try:
            return cls(site, bytes.fromhex(exchange_key), identity)
        except ValueError as error:
            raise ProtocolError(f"the public key of site {site} is not in hexadecimal") from error


@dataclass(frozen=True)
class Roster:
    """The members of a run in their order, and the digest that all of them sign."""

    members: tuple[Member, ...]
    digest: bytes

    @classmethod
    def of(
        cls, run: str, experiment_digest: str, parameters: Parameters, members: Sequence[Member]
    ) -> Roster:
        """hash(run, experiment, parameters of the encryption, all keys, key epoch)."""
        text = [
            "privfl agreement 1",
            run,
            experiment_digest,
            [parameters.members, parameters.value_bits, parameters.fields, parameters.prime],
            [[member.site, member.exchange_key.hex(), member.identity] for member in members],
            KEY_EPOCH,
        ]
        return cls(tuple(members), hashlib.sha256(json.dumps(text).encode()).digest())

    def check(
        self, site: str, own: ExchangeKey, identity: Identity, pinned: Mapping[str, str]
    ) -> None:
        """Hold the relayed members against what this site knows, before it signs.

        Raises:
            ProtocolError: its own keys are not there under its name, or a key is there twice.
            PrivflError: a member shows another identity than the one this site has pinned.
        """
        mine = [
            (member.exchange_key, member.identity) for member in self.members if member.site == site
        ]
        if mine != [(own.public, identity.public)]:
            raise ProtocolError(
                f"the coordinator relays other keys for site {site} than those it sent: a key was "
                f"swapped on the way"
            )
        for part in ("site", "exchange_key", "identity"):
            if len({getattr(member, part) for member in self.members}) != len(self.members):
                raise ProtocolError("the coordinator relays two members with one name or one key")
        for member in self.members:
            if pinned and member.site != site and pinned.get(member.site) != member.identity:
                raise PrivflError(
                    f"site {member.site} shows the key {member.identity}, but "
                    f"{pinned.get(member.site, 'none')} is pinned for it (peers in the file of "
                    f"site {site}); ask that site which one is right before you change anything"
                )

    def check_signatures(self, signatures: Mapping[str, str]) -> None:
        """Every member, and nobody else, signed this digest; signatures are in hexadecimal.

        Raises:
            ProtocolError: naming the first member whose signature is missing or does not fit.
        """
        if set(signatures) != {member.site for member in self.members}:
            raise ProtocolError(
                "the coordinator relays signatures of other sites than this run's members"
            )
        for member in self.members:
            try:
                verify(member.identity, bytes.fromhex(signatures[member.site]), self.digest)
            except (ProtocolError, ValueError) as error:
                raise ProtocolError(
                    f"the signature of site {member.site} under this run's keys does not fit: a "
                    f"key was swapped or a member invented on the way"
                ) from error

"""The members of a run with their public keys, and their signatures under all of it.

The coordinator relays the sites' public keys. So that it can neither replace a key by its own nor
invent or leave out a member, every site signs a digest of the roster with its own identity and
checks the signatures of all others, before it uses a key. If its site file pins the identities of
the others, it accepts no other identity for them. Without pinned identities the coordinator could
invent all other members.
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
# One set of keys serves one run; a run that gives up its keys ends.
KEY_EPOCH = 1


@dataclass(frozen=True)
class Member:
    """One site as the coordinator relays it.

    Attributes:
        site: The name of the site.
        exchange_key: Its X25519 public key of this run; 32 bytes.
        identity: Its Ed25519 public key, in the text form of :mod:`privfl.identity`.
    """

    site: str
    exchange_key: bytes
    identity: str

    @classmethod
    def relayed(cls, site: str, exchange_key: str, identity: str) -> Member:
        """A member from the fields of a message, in which ``exchange_key`` is in hexadecimal.

        Raises:
            ProtocolError: If ``exchange_key`` is not in hexadecimal.
        """
        try:
            return cls(site, bytes.fromhex(exchange_key), identity)
        except ValueError as error:
            raise ProtocolError(f"the public key of site {site} is not in hexadecimal") from error


@dataclass(frozen=True)
class Roster:
    """The members of a run.

    Attributes:
        members: All of them, in their order; the first makes the keys.
        digest: SHA-256 of everything on which they must agree; what each of them signs.
    """

    members: tuple[Member, ...]
    digest: bytes

    @classmethod
    def of(
        cls, run: str, experiment_digest: str, parameters: Parameters, members: Sequence[Member]
    ) -> Roster:
        """The roster of a run, with its digest.

        The digest is over the run, the experiment, the parameters of the sums, the names and both
        public keys of all members in their order, and the key epoch.
        """
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
        """Compare the relayed members with what this site knows, before it signs.

        Args:
            site: The name of this site.
            own: Its exchange key of this run.
            identity: Its identity.
            pinned: The identities that it has pinned, by site; empty if it has pinned none.

        Raises:
            ProtocolError: If the roster does not have this site once with both of its keys, or has
                a name or a key twice.
            PrivflError: If a member's identity is not the one that this site has pinned for it.
        """
        own_entries = [
            (member.exchange_key, member.identity) for member in self.members if member.site == site
        ]
        if own_entries != [(own.public, identity.public)]:
            raise ProtocolError(
                f"the coordinator relays other keys for site {site} than those it sent: a key was "
                "swapped on the way"
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
        """Check that every member, and nobody else, signed the digest.

        Args:
            signatures: By site, in hexadecimal.

        Raises:
            ProtocolError: If the signatures are not those of exactly the members' names, or one of
                them is not valid; it names the first such site.
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
                    "key was swapped or a member invented on the way"
                ) from error

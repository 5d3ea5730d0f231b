"""A site's way into a run: what its members agree on, and the keys, which are used once all
signatures have been checked.
"""

from __future__ import annotations

from collections.abc import Mapping

from privfl.errors import InternalError
from privfl.identity import Identity
from privfl.secagg import ExchangeKey, Parameters
from privfl.secagg.session.keys import RunKeys, open_keys, seal_keys
from privfl.secagg.session.roster import Roster
from privfl.secagg.session.sums import SumSession


class Handshake:
    """What one site has of a run's roster and keys, step by step: sign, verify, and make or open
    the keys.

    Args:
        site: the name of this site.
        identity: the key it signs with.
        peers: the identities it has pinned, by site; empty if it has pinned none.
        parameters: those of the run's encrypted sums.
    """

    def __init__(
        self, site: str, identity: Identity, peers: Mapping[str, str], parameters: Parameters
    ) -> None:
        self.exchange = ExchangeKey()
        self._site, self._identity, self._peers, self._parameters = (
            site,
            identity,
            peers,
            parameters,
        )
        self._roster: Roster | None = None
        self._sums: SumSession | None = None

    def sign(self, roster: Roster) -> bytes:
        """The signature under the roster, after it was held against what this site knows of
        itself and of pinned peers.

        Raises:
            ProtocolError: If the relay shows other keys for this site than it sent, or a key twice.
            PrivflError: If a member shows another identity than the one that is pinned for it.
        """
        roster.check(self._site, self.exchange, self._identity, self._peers)
        self._roster = roster
        return self._identity.sign(roster.digest)

    def verify(self, signatures: Mapping[str, str], *, make_key: bool) -> list[tuple[int, bytes]]:
        """Check the signatures of all members, without which no key is used.

        Args:
            signatures: by site, in hexadecimal.
            make_key: whether this site makes the keys of the run.

        Returns:
            The keys sealed to every other member, as (index of the member, sealed); empty unless
            ``make_key``.

        Raises:
            ProtocolError: If a signature is missing or does not fit.
        """
        self.roster.check_signatures(signatures)
        if not make_key:
            return []
        keys = RunKeys.make(self._parameters)
        self._take(keys)
        return seal_keys(keys, self.exchange, self.roster)

    def open(self, sealed: bytes) -> None:
        """Take the keys that the first site sealed.

        Raises:
            ProtocolError: If the first site did not seal them for this run and this site.
        """
        self._take(open_keys(sealed, self.exchange, self.roster, self._site, self._parameters))

    def _take(self, keys: RunKeys) -> None:
        self._sums = SumSession(self.roster, self.exchange, keys)

    @property
    def ready(self) -> bool:
        """Whether the keys are there."""
        return self._sums is not None

    @property
    def roster(self) -> Roster:
        """The members of the run, once this site has signed.

        Raises:
            InternalError: If this site has not signed yet.
        """
        if self._roster is None:
            raise InternalError("the roster of the run was needed before it was signed")
        return self._roster

    @property
    def sums(self) -> SumSession:
        """What opens this run's sums, and holds its keys.

        Raises:
            InternalError: If the keys are not there yet.
        """
        if self._sums is None:
            raise InternalError("the run's keys were needed before they were there")
        return self._sums

    def protections(self, members: int) -> dict[str, bool]:
        """Which protections are in place at this moment for a sum of so many members, told from
        the objects that provide them.
        """
        sums = self._sums
        return {
            "encryption": sums is not None and sums.key is sums.keys.sums,
            "masks": sums is not None and sums.masked_members == members,
            "pinned_keys": bool(self._peers),
        }

"""How a site joins a run: it signs the roster, checks all signatures, and makes or opens the
keys.
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
    """One site's handshake with the other members of a run, whose messages the coordinator relays.

    The steps are :meth:`sign`, :meth:`verify` and, at all sites but the one that makes the keys,
    :meth:`open`, in this order.

    Guarantee: a site whose peers are pinned ends the handshake only if every other member is one of
    these peers and has signed its own exchange key for this run, this experiment and these
    parameters, so that what is sealed to a member can be opened by that member alone. Without
    pinned peers this holds only if the coordinator relays the members' keys unchanged.

    Args:
        site: The name of this site.
        identity: The key it signs with.
        peers: The identities it has pinned, by site; empty if it has pinned none.
        parameters: Those of the run's sums.

    Attributes:
        exchange: This site's X25519 key of this run.
    """

    def __init__(
        self, site: str, identity: Identity, peers: Mapping[str, str], parameters: Parameters
    ) -> None:
        self.exchange = ExchangeKey()
        self._site, self._identity = site, identity
        self._peers, self._parameters = peers, parameters
        self._roster: Roster | None = None
        self._sums: SumSession | None = None

    def sign(self, roster: Roster) -> bytes:
        """Compare the roster with this site's own keys and its pinned peers, and sign its digest.

        Returns:
            The signature; 64 bytes.

        Raises:
            ProtocolError: If the roster does not have this site once with the keys that it sent, or
                has a name or a key twice.
            PrivflError: If a member's identity is not the one that this site has pinned for it.
        """
        roster.check(self._site, self.exchange, self._identity, self._peers)
        self._roster = roster
        return self._identity.sign(roster.digest)

    def verify(self, signatures: Mapping[str, str], *, make_key: bool) -> list[tuple[int, bytes]]:
        """Check the signatures of all members; no key may be used before.

        Args:
            signatures: By site, in hexadecimal.
            make_key: Whether this site makes the keys of the run; the first member does.

        Returns:
            The keys sealed to every other member, as (index of the member, sealed); empty unless
            ``make_key``.

        Raises:
            ProtocolError: If a member's signature is missing or not valid.
        """
        self.roster.check_signatures(signatures)
        if not make_key:
            return []
        keys = RunKeys.make(self._parameters)
        self._take(keys)
        return seal_keys(keys, self.exchange, self.roster)

    def open(self, sealed: bytes) -> None:
        """Open the keys that the first member sealed to this site.

        Raises:
            ProtocolError: If ``sealed`` was not sealed by the first member of this roster to this
                site, or was altered.
        """
        self._take(open_keys(sealed, self.exchange, self.roster, self._site, self._parameters))

    def _take(self, keys: RunKeys) -> None:
        self._sums = SumSession(self.roster, self.exchange, keys)

    @property
    def ready(self) -> bool:
        """Whether this site has the keys of the run."""
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
        """This site's part in the sums of the run.

        Raises:
            InternalError: If this site does not have the keys yet.
        """
        if self._sums is None:
            raise InternalError("the run's keys were needed before this site had them")
        return self._sums

    def protections(self, members: int) -> dict[str, bool]:
        """Which protections a sum of ``members`` members has at this moment, by name.

        Each answer is read from the objects that provide the protection, not from a setting.
        """
        sums = self._sums
        return {
            "encryption": sums is not None and sums.key is sums.keys.sums,
            "masks": sums is not None and sums.masked_members == members,
            "pinned_keys": bool(self._peers),
        }

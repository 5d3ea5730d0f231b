"""A site's way into a run: what its members agree on, and the keys that are used once all signatures under that have been checked."""

from __future__ import annotations

from collections.abc import Mapping

from privfl.errors import InternalError
from privfl.federation.messages import Welcome
from privfl.secagg import ExchangeKey
from privfl.secagg.session.keys import RunKeys, open_keys, seal_keys
from privfl.secagg.session.roster import Agreement
from privfl.secagg.session.sums import Sums
from privfl.site.setup import SiteSetup


class Joining:
    """What one site has of a run's agreement and keys, step by step."""

    def __init__(self) -> None:
        self.exchange = ExchangeKey()
        self._agreement: Agreement | None = None
        self._keys: RunKeys | None = None
        self._sums: Sums | None = None

    def sign(self, setup: SiteSetup, welcome: Welcome) -> bytes:
        """The signature under what the members must agree on, after a look at whether the relay tells the truth about this site and its pinned peers.

        Raises:
            PrivflError, ProtocolError: it does not.
        """
        agreement = Agreement.relayed(welcome, setup.experiment.digest(), setup.parameters)
        agreement.check(setup.site, self.exchange, setup.identity, setup.file.peers)
        self._setup, self._agreement = setup, agreement
        return setup.identity.sign(agreement.digest)

    def verify(self, signatures: Mapping[str, str], *, make_key: bool) -> list[tuple[int, bytes]]:
        """Check all signatures; only then a key is used. The site that makes the keys of this run seals them to each other one, by index.

        Raises:
            ProtocolError: a signature is missing or does not fit.
        """
        self.agreement.check_signatures(signatures)
        if not make_key:
            return []
        keys = RunKeys.make(self._setup.parameters)
        self._take(keys)
        return seal_keys(keys, self.exchange, self.agreement)

    def open(self, sealed: bytes) -> None:
        """Take the keys that the first site sealed.

        Raises:
            ProtocolError: they were not sealed by it for this run and site.
        """
        self._take(open_keys(sealed, self.exchange, self.agreement, self._setup.site, self._setup.parameters))

    def _take(self, keys: RunKeys) -> None:
        self._keys = keys
        self._sums = Sums(self.agreement, self.exchange, keys)

    @property
    def ready(self) -> bool:
        """Whether the keys are there."""
        return self._keys is not None

    @property
    def agreement(self) -> Agreement:
        """What the members agreed on."""
        if self._agreement is None:
            raise InternalError("the members' agreement was needed before it was there")
        return self._agreement

    @property
    def keys(self) -> RunKeys:
        """The keys that the sites of this run share."""
        if self._keys is None:
            raise InternalError("the run's keys were needed before they were there")
        return self._keys

    @property
    def sums(self) -> Sums:
        """What opens this run's sums."""
        if self._sums is None:
            raise InternalError("the run's keys were needed before they were there")
        return self._sums

    def protections(self, members: int) -> dict[str, bool]:
        """What is in place at this moment, from the objects that do it."""
        return {
            "encryption": self._sums is not None and self._keys is not None and self._sums.key is self._keys.sums,
            "masks": self._sums is not None and self._sums.masked_members == members,
            "pinned_keys": self._setup.pinned,
        }

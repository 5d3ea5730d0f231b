"""A recorded run whose coordinator cheats, under mpiexec:
`python -m privacy_audits.targets.cheating TRICK FOLDER EXPERIMENT`.

Sites are as in :mod:`privacy_audits.targets.observed`. Rank 0 runs privfl too, but what it sends
goes through a trick; the first message that the trick changes is noted in the recording.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from privacy_audits.targets import observed
from privfl.admission.plan import parameters_of
from privfl.config import load_experiment
from privfl.federation import messages
from privfl.federation.messages import Kind, Message, decode
from privfl.identity import Identity
from privfl.secagg import ExchangeKey
from privfl.secagg.session.keys import open_keys, seal_keys
from privfl.secagg.session.roster import Member, Roster
from privfl.transport import Transport

# From the receiving rank and its message, and what it was sent before, to what it is sent instead.
Trick = Callable[[int, Message, list[Message]], list[Message]]
# The coordinator's keys by the index of the member in whose place they are told, to site 1 and to
# the others; and what each site was told.
_POSING = {1: {1: ExchangeKey(), 2: ExchangeKey()}, 2: {0: ExchangeKey()}}
_TOLD: dict[int, Message] = {}


def swapped_key(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """Site 1 is told keys of the coordinator's in place of the others', and the others one in place
    of site 1's; what site 1 seals is opened on the way and sealed anew.
    """
    if message.kind is Kind.WELCOME:
        told = message
        for index, key in _POSING[min(to, 2)].items():
            told = _with_member(told, index, exchange_key=key.public.hex())
        _TOLD[to] = told
        return [told]
    if message.kind is Kind.SEALED_KEY:
        return [replace(message, bulk=_sealed_anew(to, bytes(message.bulk)))]
    return [message]


def _sealed_anew(to: int, sealed: bytes) -> bytes:
    """The keys that site 1 sealed for a key of the coordinator's, sealed for another site."""
    experiment = load_experiment(Path(sys.argv[-1]))
    parameters = parameters_of(experiment)

    def roster(site: int) -> Roster:
        welcome = _TOLD[site].body
        assert isinstance(welcome, messages.Welcome)
        members = [Member.relayed(m.site, m.exchange_key, m.identity) for m in welcome.members]
        return Roster.of(welcome.run, experiment.digest(), parameters, members)

    site = experiment.sites[to - 1]
    keys = open_keys(sealed, _POSING[1][to - 1], roster(1), site, parameters)
    return dict(seal_keys(keys, _POSING[2][0], roster(to)))[to - 1]


def swapped_identity(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """Site 1 is told a key and an identity of the coordinator's in place of site 2's."""
    if message.kind is not Kind.WELCOME or to != 1:
        return [message]
    changes = {"exchange_key": ExchangeKey().public.hex(), "identity": Identity().public}
    return [_with_member(message, 1, **changes)]


def invented_member(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """All sites are told of one more, whose keys the coordinator holds."""
    if message.kind is not Kind.WELCOME:
        return [message]
    ghost = messages.Member(
        site="ghost", rank=0, exchange_key=ExchangeKey().public.hex(), identity=Identity().public
    )
    assert isinstance(message.body, messages.Welcome)
    members = (*message.body.members, ghost)
    return [replace(message, body=message.body.model_copy(update={"members": members}))]


def other_records(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """Every site is told that another one has very many records, which makes its part small."""
    if message.kind is not Kind.BEGIN:
        return [message]
    assert isinstance(message.body, messages.Begin)
    site = list(message.body.records)[to % len(message.body.records)]
    records = message.body.records | {site: 10**9}
    return [replace(message, body=message.body.model_copy(update={"records": records}))]


def altered_sum(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """Something is added to the first coefficient of a sum, alike for all sites."""
    if message.kind is not Kind.TOTAL or message.round != 2:
        return [message]
    words = np.frombuffer(message.bulk, dtype="<u8").copy()
    words[0] += 1 << 8
    return [replace(message, bulk=words.tobytes())]


def two_sums(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """Site 1 is given another sum than the others, who then go on or hear that it is over."""
    return altered_sum(to, message, earlier) if to == 1 else [message]


def old_sum(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """The sum of the round before, once more."""
    if message.kind is not Kind.TOTAL or message.round != 2:
        return [message]
    before = next(m for m in earlier if m.kind is Kind.TOTAL and m.part == message.part)
    return [replace(message, bulk=before.bulk)]


def repeated_attempt(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """A sum is opened a second time under the number of the first: the same masks, new noise."""
    if message.kind is not Kind.ROUND or message.round != 2:
        return [message]
    opened = next(m for m in earlier if m.kind is Kind.SUM)
    return [opened, message]


def second_attempt(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """A sum is opened a second time under a new number before it is given out: new masks, and new
    noise, if a site makes it.
    """
    if message.kind is not Kind.TOTAL or message.round != 2 or message.part:
        return [message]
    opened = next(m for m in reversed(earlier) if m.kind is Kind.SUM)
    return [replace(opened, attempt=opened.attempt + 1), message]


def _with_member(message: Message, index: int, **changes: Any) -> Message:
    assert isinstance(message.body, messages.Welcome)
    members = list(message.body.members)
    members[index] = members[index].model_copy(update=changes)
    return replace(message, body=message.body.model_copy(update={"members": tuple(members)}))


TRICKS: dict[str, Trick] = {
    "swapped-key": swapped_key,
    "swapped-identity": swapped_identity,
    "invented-member": invented_member,
    "other-records": other_records,
    "altered-sum": altered_sum,
    "two-sums": two_sums,
    "old-sum": old_sum,
    "repeated-attempt": repeated_attempt,
    "second-attempt": second_attempt,
}


class Cheating:
    """Rank 0's transport, whose messages go through a trick."""

    def __init__(self, inner: Transport, trick: Trick, note: Callable[[], None]) -> None:
        self._inner, self._trick, self._note = inner, trick, note
        self._earlier: dict[int, list[Message]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        """Send what the trick makes of a message."""
        message = decode(head, bytes(bulk))
        earlier = self._earlier.setdefault(to, [])
        sent = self._trick(to, message, earlier)
        if sent != [message]:
            self._note()
        for one in sent:
            self._inner.send(to, *one.encode())
        earlier.append(message)


def main(arguments: Sequence[str]) -> None:
    """Run one rank; rank 0 cheats."""
    trick, *rest = arguments
    observed.main(rest, lambda inner, note: Cheating(inner, TRICKS[trick], note))


if __name__ == "__main__":
    main(sys.argv[1:])

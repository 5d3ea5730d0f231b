"""A coordinator that cheats as a relay: everything it changes on the way is named before
anything of it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfl.federation import messages
from privfl.federation.messages import Kind, Message, decode
from privfl.identity import Identity
from privfl.secagg import ExchangeKey, derive, usual_value_bits
from privfl.secagg.session.handshake import Handshake
from privfl.site import agent, algorithms
from tests.conftest import Twin, edit, run_twin

Tamper = Callable[[int, Message, list[Message]], list[Message]]


pytestmark = pytest.mark.usefixtures("trainers_as_threads")


class Relay:
    """Rank 0's transport: each message to a site goes through ``tamper(rank, message, earlier
    messages to that rank)``.
    """

    def __init__(self, inner: Any, tamper: Tamper) -> None:
        self._inner, self._tamper = inner, tamper
        self._earlier: dict[int, list[Message]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, to: int, head: bytes, bulk: bytes | memoryview = b"") -> None:
        message = decode(head, bytes(bulk))
        earlier = self._earlier.setdefault(to, [])
        for sent in self._tamper(to, message, earlier):
            self._inner.send(to, *sent.encode())
        earlier.append(message)


def run_with(small: Path, tmp_path: Path, tamper: Tamper, *settings: str) -> Twin:
    return run_twin(
        small,
        *settings,
        output=tmp_path / "o",
        ranks=3,
        wrap=lambda t: Relay(t, tamper) if t.rank == 0 else t,
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the sites used: 'keys' where one took the run's keys, 'mean' where one applied a sum."""
    things: list[str] = []
    lock = threading.Lock()
    take, average = Handshake._take, algorithms.fedavg

    def note(what: str) -> None:
        with lock:
            things.append(what)

    monkeypatch.setattr(Handshake, "_take", lambda self, keys: (note("keys"), take(self, keys))[1])
    monkeypatch.setattr(
        algorithms, "fedavg", lambda replica, mean: (note("mean"), average(replica, mean))[1]
    )
    return things


def member(message: Message, index: int, **changes: Any) -> Message:
    """The welcome with one member changed."""
    members = list(message.body.members)
    members[index] = members[index].model_copy(update=changes)
    return replace(message, body=message.body.model_copy(update={"members": tuple(members)}))


def swapped_exchange_key(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    # Site 1 is told a key of the relay's in the place of site 2's: without signatures it would seal
    # the run's keys to the relay.
    return (
        [member(message, 1, exchange_key=ExchangeKey().public.hex())]
        if message.kind is Kind.WELCOME and to == 1
        else [message]
    )


MALLORY = Identity()


def swapped_key_and_identity(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    if message.kind is Kind.WELCOME and to == 1:
        return [
            member(message, 1, exchange_key=ExchangeKey().public.hex(), identity=MALLORY.public)
        ]
    return [message]


def own_key_swapped(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    return (
        [member(message, 1, exchange_key=ExchangeKey().public.hex())]
        if message.kind is Kind.WELCOME and to == 2
        else [message]
    )


def one_key_for_two(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    if message.kind is Kind.WELCOME and to == 1:
        return [member(message, 1, exchange_key=message.body.members[0].exchange_key)]
    return [message]


def invented_member(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    if message.kind is not Kind.WELCOME:
        return [message]
    third = messages.Member(
        site="ghost", rank=2, exchange_key=ExchangeKey().public.hex(), identity=MALLORY.public
    )
    return [
        replace(
            message,
            body=message.body.model_copy(update={"members": (*message.body.members, third)}),
        )
    ]


def other_signature(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    if message.kind is not Kind.AGREED:
        return [message]
    signatures = message.body.signatures | {"bbb": MALLORY.sign(b"x").hex()}
    return [replace(message, body=messages.Agreed(signatures=signatures))]


def missing_signature(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    if message.kind is not Kind.AGREED:
        return [message]
    return [
        replace(message, body=messages.Agreed(signatures={"aa": message.body.signatures["aa"]}))
    ]


def keys_before_signatures(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    return (
        [Message(Kind.SEALED_KEY, message.run, part=1, parts=2, bulk=b"x")]
        if message.kind is Kind.AGREED
        else [message]
    )


def altered_sealed_key(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    if message.kind is not Kind.SEALED_KEY:
        return [message]
    return [replace(message, bulk=message.bulk[:-1] + bytes([message.bulk[-1] ^ 1]))]


@pytest.mark.parametrize(
    ("tamper", "sentence"),
    [
        (
            swapped_exchange_key,
            "under this run's keys does not fit: a key was swapped or a member invented",
        ),
        (
            swapped_key_and_identity,
            "under this run's keys does not fit: a key was swapped or a member invented",
        ),
        (own_key_swapped, "the coordinator relays other keys for site bbb than those it sent"),
        (one_key_for_two, "two members with one name or one key"),
        (invented_member, "welcome is for other sites"),
        (other_signature, "the signature of site bbb under this run's keys does not fit"),
        (missing_signature, "signatures of other sites than this run's members"),
        (keys_before_signatures, "sent a SEALED_KEY message while this site was signed"),
        (altered_sealed_key, "a sealed message does not open"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_no_key_is_used_after_a_trick_with_keys(
    small: Path, tmp_path: Path, used: list[str], tamper: Tamper, sentence: str
):
    twin = run_with(small, tmp_path, tamper)
    assert twin.codes == [1, 1, 1], twin.err
    assert sentence in twin.err
    # A site that was told the truth may have made keys; nothing was encrypted with them.
    assert used in ([], ["keys"])


def words(message: Message) -> np.ndarray:
    return np.frombuffer(message.bulk, dtype="<u8").copy()


def altered_total(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """A small number added to the first coefficient, at all sites alike: some units in the first
    value of the sum.
    """
    if message.kind is not Kind.TOTAL or message.round != 1:
        return [message]
    changed = words(message)
    changed[0] += 1 << 8
    return [replace(message, bulk=changed.tobytes())]


def altered_at_one_site(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    return altered_total(to, message, earlier) if to == 2 else [message]


def replayed_total(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """The sum of round 1 again in round 2: right checksum and right length, for another attempt."""
    if message.kind is not Kind.TOTAL or message.round != 2:
        return [message]
    old = next(m for m in earlier if m.kind is Kind.TOTAL)
    return [replace(message, bulk=old.bulk)]


def old_message_again(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    old = [m for m in earlier if m.kind is Kind.SUM]
    return [old[0], message] if message.kind is Kind.ROUND and message.round == 2 else [message]


def truncated_total(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    return [replace(message, bulk=message.bulk[:-8])] if message.kind is Kind.TOTAL else [message]


def times(factor: int) -> Tamper:
    """The sum times a number: a linear checksum would follow."""

    def scaled(to: int, message: Message, earlier: list[Message]) -> list[Message]:
        if message.kind is not Kind.TOTAL or message.round != 1:
            return [message]
        prime = derive(2, usual_value_bits(2)).prime
        return [
            replace(
                message,
                bulk=np.array(
                    [int(w) * factor % prime for w in words(message)], dtype="<u8"
                ).tobytes(),
            )
        ]

    scaled.__name__ = f"times {factor}"
    return scaled


def encryption_of_nothing(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """c0 = 0 and c1 = 1 decrypts to the key, whose coefficients round to zero: a sum of zeros
    that needs no key.
    """
    if message.kind is not Kind.TOTAL:
        return [message]
    rows = np.zeros((len(message.bulk) // 65536, 8192), dtype="<u8")
    rows[:, 4096] = 1
    return [replace(message, bulk=rows.tobytes())]


def other_numbers_of_records(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """Each site alone may check its own number: with other weights for others the sum could
    become one site's update.
    """
    if message.kind is not Kind.BEGIN:
        return [message]
    other = "bbb" if to == 1 else "aa"
    return [
        replace(
            message,
            body=message.body.model_copy(
                update={"records": message.body.records | {other: 10**15}}
            ),
        )
    ]


def empty_total(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    return (
        [replace(message, bulk=bytes(len(message.bulk)))]
        if message.kind is Kind.TOTAL
        else [message]
    )


def words_beyond_the_modulus(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    return (
        [replace(message, bulk=b"\xff" * len(message.bulk))]
        if message.kind is Kind.TOTAL
        else [message]
    )


def update_as_metrics(to: int, message: Message, earlier: list[Message]) -> list[Message]:
    """The total of the update handed back as that of the metrics, which a site would tell."""
    if message.kind is not Kind.TOTAL or message.attempt != 2:
        return [message]
    return [replace(message, bulk=next(m for m in earlier if m.kind is Kind.TOTAL).bulk)]


SUM = "a decrypted sum is not the sum of what the sites sent"


@pytest.mark.parametrize(
    ("tamper", "sentence", "means"),
    [
        (altered_total, SUM, 0),
        (altered_at_one_site, SUM, 1),
        (replayed_total, SUM, 2),
        (truncated_total, SUM, 0),
        (times(-1), SUM, 0),
        (times(2), SUM, 0),
        (encryption_of_nothing, SUM, 0),
        (other_numbers_of_records, SUM, 0),
        (empty_total, SUM, 0),
        (words_beyond_the_modulus, SUM, 0),
        (update_as_metrics, SUM, 2),
        (old_message_again, "the coordinator sent a SUM message while this site was", 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_no_sum_is_used_after_a_trick_with_sums(
    small: Path, tmp_path: Path, used: list[str], tamper: Tamper, sentence: str, means: int
):
    twin = run_with(small, tmp_path, tamper)
    assert twin.codes == [1, 1, 1], twin.err
    assert sentence in twin.err
    assert used.count("mean") == means


def test_replicas_that_differ_do_not_decode_even_if_the_coordinator_does_not_compare(
    small: Path, tmp_path: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
):
    from privfl.federation import coordinator

    average, turn = algorithms.fedavg, iter(range(1000))
    monkeypatch.setattr(
        algorithms, "fedavg", lambda replica, mean: average(replica, mean + 1e-3 * next(turn))
    )
    applied = coordinator._applied
    blind = messages.Applied(tag="alike")
    monkeypatch.setattr(
        coordinator,
        "_applied",
        lambda plan, state: applied(
            plan, replace(state, answers=dict.fromkeys(state.answers, blind))
        ),
    )
    twin = run_twin(small, output=tmp_path / "o", ranks=3)
    assert twin.codes == [1, 1, 1], twin.err
    assert SUM in twin.err


def test_a_coordinator_cannot_run_more_rounds_than_the_sites_planned(
    small: Path, tmp_path: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
):
    from privfl.coordinator import run

    longer = run.Plan
    monkeypatch.setattr(run, "Plan", lambda **facts: longer(**facts | {"rounds": 4}))
    twin = run_twin(small, output=tmp_path / "o", ranks=3)
    assert twin.codes == [1, 1, 1], twin.err
    assert "the coordinator opened round 3 of an experiment of 2 rounds" in twin.err
    assert used.count("mean") == 4


def test_the_altered_sum_passes_without_the_checksum(
    small: Path, tmp_path: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
):
    from privfl.secagg import checksum

    monkeypatch.setattr(checksum.Checksum, "fits", lambda self, sums: True)
    monkeypatch.setattr(agent, "prove", lambda: True)
    assert run_with(small, tmp_path, altered_total).codes == [0, 0, 0], (
        "alike at all sites: nothing else notices it"
    )
    assert used.count("mean") == 4


def test_totals_in_another_order_are_refused(small: Path, tmp_path: Path, used: list[str]):
    """A vector of two blocks, the second one first."""
    edit(
        small.parent / "task.py",
        "return nn.Linear(5, 2)",
        "return nn.Sequential(nn.Linear(5, 20000), nn.Linear(20000, 2))",
    )

    def reorder(to: int, message: Message, earlier: list[Message]) -> list[Message]:
        if message.kind is Kind.TOTAL and message.part == 0 and message.parts == 2:
            return []
        if message.kind is Kind.TOTAL and message.part == 1:
            return [replace(message, part=0), replace(earlier[-1], part=1)]
        return [message]

    twin = run_with(small, tmp_path, reorder, "rounds=1")
    assert twin.codes == [1, 1, 1], twin.err
    assert SUM in twin.err
    assert "mean" not in used


def test_ranges_of_another_round_are_refused(small: Path, tmp_path: Path, used: list[str]):
    def old_ranges(to: int, message: Message, earlier: list[Message]) -> list[Message]:
        if message.kind is Kind.SUM and message.body.vector == "update" and message.round == 2:
            old = next(m for m in earlier if m.kind is Kind.SUM)
            return [
                replace(
                    message,
                    body=message.body.model_copy(update={"sealed_ranges": old.body.sealed_ranges}),
                )
            ]
        return [message]

    twin = run_with(small, tmp_path, old_ranges)
    assert twin.codes == [1, 1, 1], twin.err
    assert "a sealed message does not open" in twin.err
    assert used.count("mean") == 2, "those of round 1"


def test_sites_that_are_told_different_things_do_not_decode(
    small: Path, tmp_path: Path, used: list[str]
):
    """Another attempt number for one site: its masks do not cancel, and nobody learns a sum."""

    def split(to: int, message: Message, earlier: list[Message]) -> list[Message]:
        shift = 1 if to == 2 and message.round == 1 and message.attempt == 1 else 0
        return [replace(message, attempt=message.attempt + shift)]

    class Honest(Relay):
        def receive(self, *arguments: Any) -> Any:
            frame = self._inner.receive(*arguments)
            if frame is None or frame.peer != 2:
                return frame
            message = decode(frame.head, frame.bulk)
            if (message.round, message.attempt) == (1, 2) and message.kind is Kind.CONTRIBUTION:
                return type(frame)(frame.peer, *replace(message, attempt=1).encode())
            return frame

    twin = run_twin(
        small, output=tmp_path / "o", ranks=3, wrap=lambda t: Honest(t, split) if t.rank == 0 else t
    )
    assert twin.codes == [1, 1, 1], twin.err
    assert SUM in twin.err
    assert used.count("mean") == 0

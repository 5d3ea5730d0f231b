"""A site's state machine against a relay that misbehaves: nothing is taken early, twice, or for
others.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from privfl.errors import PrivflError, ProtocolError
from privfl.federation import coordinator as lead
from privfl.federation import member, messages
from privfl.federation.messages import Kind, Message, decode
from tests.federation.world import BLOCKS, RUN, SITES, World, plan


def member_at(kind: Kind) -> tuple[member.State, Message]:
    """Site b just before it receives the first message of this kind, and that message."""
    world = World(plan())
    original = world.to_member
    found: list[tuple[member.State, Message]] = []

    def watch(rank: int, message: Message) -> None:
        if rank == 2 and message.kind is kind:
            found.append((world.members[2], message))
        original(rank, message)

    world.to_member = watch
    world.run()
    return found[0]


FROM_LEAD = [
    Kind.WELCOME,
    Kind.AGREED,
    Kind.SEALED_KEY,
    Kind.BEGIN,
    Kind.ROUND,
    Kind.SUM,
    Kind.TOTAL,
    Kind.FINISH,
]
TWO = {"update": BLOCKS, "metrics": BLOCKS}.__getitem__


@pytest.mark.parametrize("kind", FROM_LEAD)
def test_a_member_refuses_what_is_not_due(kind: Kind):
    state, message = member_at(kind)
    wrong = [replace(message, run=bytes(16))] if kind is not Kind.WELCOME else []
    wrong += [member_at(other)[1] for other in FROM_LEAD if other is not kind]
    wrong += [Message.of(messages.Applied(tag="x"), RUN), Message(Kind.CONTRIBUTION, RUN)]
    for bad in wrong:
        if kind is Kind.FINISH and bad.kind is Kind.ROUND:
            bad = replace(bad, round=state.round)
        with pytest.raises(ProtocolError):
            member.step(state, bad, TWO)


@pytest.mark.parametrize("kind", FROM_LEAD)
def test_a_member_takes_no_message_twice(kind: Kind):
    state, message = member_at(kind)
    after, _ = member.step(state, message, TWO)
    # Even in a phase that would allow a newer message of this kind. (An end may be announced
    # whenever a round is over.)
    phases = (
        {after.phase}
        if kind is Kind.FINISH
        else {after.phase, member.Phase.IDLE, member.Phase.TRAINED}
    )
    for phase in phases:
        with pytest.raises(ProtocolError):
            member.step(replace(after, phase=phase), message, TWO)


def test_a_member_contributes_only_to_sums_of_all_members():
    state, message = member_at(Kind.SUM)
    for members in (("a", "b"), ("b",), ("a", "b", "c", "d"), ("c", "b", "a"), ("b", "b", "b")):
        with pytest.raises(ProtocolError, match="other members"):
            member.step(
                state,
                replace(
                    message,
                    body=messages.Sum(vector="update", members=members, sealed_ranges={}, heads={}),
                ),
                TWO,
            )


def test_a_member_takes_no_ranges_of_strangers():
    state, message = member_at(Kind.SUM)
    for sealed_ranges in ({"a": "s"}, {"a": "s", "b": "s", "z": "s"}):
        with pytest.raises(ProtocolError, match="ranges of other sites"):
            member.step(
                state,
                replace(
                    message, body=message.body.model_copy(update={"sealed_ranges": sealed_ranges})
                ),
                TWO,
            )


def test_a_member_without_public_records_sums_no_metrics():
    state, message = member_at(Kind.SUM)
    assert state.begin is not None
    state = replace(
        state, phase=member.Phase.IDLE, begin=state.begin.model_copy(update={"layout": {}})
    )
    with pytest.raises(ProtocolError, match="none may leave"):
        member.step(
            state,
            replace(
                message,
                body=messages.Sum(vector="metrics", members=SITES, sealed_ranges={}, heads={}),
            ),
            TWO,
        )


@pytest.mark.parametrize("kind", [Kind.TOTAL, Kind.ROUND, Kind.SUM, Kind.FINISH])
def test_nothing_is_taken_before_the_own_contribution_is_sent(kind: Kind):
    """A total that comes first would be added to what is left of the last one, and its
    decryption told.
    """
    state, message = member_at(Kind.SUM)
    contributing, _ = member.step(state, message, TWO)
    assert contributing.phase is member.Phase.CONTRIBUTING
    early = replace(member_at(kind)[1], round=contributing.round, attempt=contributing.attempt)
    with pytest.raises(ProtocolError, match="while this site was contributing"):
        member.step(contributing, early, TWO)
    sent = member.contributed(contributing)
    with pytest.raises(ProtocolError, match="no contribution is due"):
        member.contributed(sent)


def test_metrics_are_told_once_a_round_and_only_when_due():
    world = World(plan())
    seen: list[tuple[member.State, Message]] = []
    original = world.to_member

    def watch(rank: int, message: Message) -> None:
        if rank == 2 and message.kind is Kind.SUM and message.body.vector == "metrics":
            seen.append((world.members[2], message))
        original(rank, message)

    world.to_member = watch
    world.run()
    state, message = seen[0]
    after, _ = member.step(state, message, TWO)
    again = replace(after, phase=member.Phase.IDLE)
    with pytest.raises(ProtocolError, match="a second one"):
        member.step(again, replace(message, attempt=message.attempt + 1), TWO)
    with pytest.raises(ProtocolError, match="not due in round 1"):
        member.step(replace(state, evaluate_every=2), message, TWO)
    with pytest.raises(ProtocolError, match="none may leave"):
        member.step(replace(state, evaluate_every=0), message, TWO)


def test_a_member_takes_part_only_with_exactly_the_sites_of_its_experiment():
    state, message = member_at(Kind.WELCOME)
    body = message.body
    for members in (body.members[1:2], body.members[::-1], (*body.members, body.members[0])):
        with pytest.raises(ProtocolError, match="for other sites"):
            member.step(
                state, replace(message, body=body.model_copy(update={"members": members})), TWO
            )
    for run in ("", "00" * 16, "ab", "zz" * 16):
        with pytest.raises(ProtocolError, match="no valid run"):
            member.step(state, replace(message, body=body.model_copy(update={"run": run})), TWO)
    state, message = member_at(Kind.BEGIN)
    wrong = message.body.model_copy(update={"records": {"a": 10, "b": 10}})
    with pytest.raises(ProtocolError, match="for other sites"):
        member.step(state, replace(message, body=wrong), TWO)


def test_sizes_that_a_coordinator_may_announce_are_bounded():
    message = member_at(Kind.BEGIN)[1]
    for changes in (
        {"layout": {"accuracy": 10**11}},
        {"layout": {"accuracy": -1}},
        {"records": {"a": 0, "b": 1, "c": 1}},
        {"parameters": 0},
    ):
        with pytest.raises(ProtocolError, match="malformed"):
            decode(*replace(message, body=message.body.model_copy(update=changes)).encode())


def test_every_mutation_of_a_message_is_refused_or_understood():
    """10^5 mutated messages, each at the decoder and then at the state it was meant for: a named
    error or a new state, never a crash.
    """
    world = World(plan())
    before: list[tuple[int, int, Message, object]] = []
    to_lead, to_member = world.to_lead, world.to_member
    world.to_lead = lambda rank, message: (
        before.append((rank, 0, message, world.state)),
        to_lead(rank, message),
    )[1]
    world.to_member = lambda rank, message: (
        before.append((0, rank, message, world.members[rank])),
        to_member(rank, message),
    )[1]
    world.run()
    chance = random.Random(0)
    understood = taken = 0
    for _ in range(100_000):
        sender, receiver, message, state = chance.choice(before)
        head, bulk = (bytearray(x) for x in message.encode())
        target = head if chance.random() < 0.5 or not bulk else bulk
        match chance.randrange(3):
            case 0:
                target[chance.randrange(len(target))] ^= 1 << chance.randrange(8)
            case 1:
                del target[chance.randrange(len(target)) :]
            case _:
                target += chance.randbytes(chance.randrange(1, 9))
        try:
            mutated = decode(bytes(head), bytes(bulk))
            understood += 1
            if receiver:
                member.step(state, mutated, TWO)
            else:
                lead.step(world.plan, state, sender, mutated)
            taken += 1
        except PrivflError:
            continue
    assert 0 < taken < understood < 90_000

"""The coordinator's state machine: whole runs in any order of arrival, and every message it must
not accept.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from privfl.errors import PrivflError, ProtocolError
from privfl.federation import coordinator as lead
from privfl.federation import messages
from privfl.federation.messages import Kind, Message
from privfl.federation.news import Greeted, RoundDone, RunFailed, RunFinished, Started
from tests.federation.world import BLOCKS, RUN, SITES, World, hello, plan, prepared


@pytest.mark.parametrize("seed", range(30))
def test_a_whole_run_in_any_order_of_arrival(seed: int):
    world = World(plan())
    world.run(random.Random(seed).randrange)
    assert world.code == 0
    assert [type(news) for news in world.news] == [
        Greeted,
        Started,
        RoundDone,
        RoundDone,
        RunFinished,
    ]
    assert [news.metrics for news in world.news if isinstance(news, RoundDone)] == [
        {"accuracy": 0.5}
    ] * 2
    # Two sums a round, each of BLOCKS blocks from every site.
    assert len(world.folded) == 2 * 2 * BLOCKS * len(SITES)
    attempts = [(m.round, m.attempt) for _, to, m in world.wire if m.kind is Kind.SUM and to == 1]
    assert attempts == sorted(set(attempts)), "(round, attempt) increases strictly"


def test_metrics_are_summed_only_when_due():
    world = World(plan(rounds=5, evaluate_every=2))
    world.run()
    assert [bool(news.metrics) for news in world.news if isinstance(news, RoundDone)] == [
        False,
        True,
        False,
        True,
        True,
    ]
    world = World(plan(evaluate_every=0))
    world.run()
    assert not any(m.kind is Kind.SUM and m.body.vector == "metrics" for _, _, m in world.wire)


def at(kind: Kind) -> tuple[World, int, Message]:
    """A world stopped before the first message of this kind reaches the coordinator, and that
    message.
    """
    world = World(plan())
    original = world.to_lead

    class Reached(Exception):  # noqa: N818
        pass

    def stop(rank: int, message: Message) -> None:
        if message.kind is kind:
            raise Reached(rank, message)
        original(rank, message)

    world.to_lead = stop
    try:
        world.run()
    except Reached as reached:
        world.to_lead = original
        return world, *reached.args
    raise AssertionError(f"no {kind.name} in a run")


def test_where_the_transport_adds_contributions_are_one_empty_message_each():
    world = World(plan(path="reduce"))
    world.run()
    assert world.code == 0
    assert world.folded == []
    assert sum(m.kind is Kind.CONTRIBUTION for _, _, m in world.wire) == 2 * 2 * len(SITES)
    assert sum(m.kind is Kind.TOTAL for _, _, m in world.wire) == 2 * 2 * BLOCKS * len(SITES)


def test_ranges_are_relayed_with_the_sum_of_updates_only():
    world = World(plan())
    world.run()
    sealed_ranges = {
        (m.body.vector, tuple(sorted(m.body.sealed_ranges.items())))
        for _, _, m in world.wire
        if m.kind is Kind.SUM
    }
    assert sealed_ranges == {("update", (("a", "s"), ("b", "s"), ("c", "s"))), ("metrics", ())}


@pytest.mark.parametrize(
    ("proven", "expected"), [((True, True, True), True), ((True, False, True), False)]
)
def test_words_are_added_only_where_every_site_has_proven_it(
    proven: tuple[bool, ...], expected: bool
):
    world, _, _ = at(Kind.PREPARED)
    state = world.state
    for rank, words_add in enumerate(proven, 1):
        state, outputs = lead.step(
            world.plan, state, rank, Message.of(prepared(words_add=words_add), RUN)
        )
    assert [o.words_add for o in outputs if isinstance(o, lead.SetAdder)] == [expected]


FROM_SITES = [
    Kind.SIGNED,
    Kind.SEALED_KEY,
    Kind.PREPARED,
    Kind.TRAINED,
    Kind.CONTRIBUTION,
    Kind.APPLIED,
    Kind.MEASURED,
    Kind.FINISHED,
]


@pytest.mark.parametrize("kind", FROM_SITES)
def test_the_coordinator_refuses_what_is_not_due(kind: Kind):
    world, rank, message = at(kind)
    before = world.state
    # Another run, a round or attempt that is not open, a kind that only the coordinator sends.
    foreign = [
        replace(message, run=bytes(16)),
        replace(message, round=message.round + 1),
        replace(message, attempt=message.attempt + 1),
        Message.of(messages.Round(), RUN, message.round, message.attempt),
        Message.of(messages.Bye(), RUN, message.round, message.attempt),
    ]
    for wrong in foreign:
        with pytest.raises(ProtocolError):
            lead.step(world.plan, before, rank, wrong)
    # Any other kind that sites send, too early or too late.
    for other in FROM_SITES:
        if other is kind or {other, kind} <= {Kind.SEALED_KEY, Kind.PREPARED}:
            continue
        _, _, early = at(other)
        with pytest.raises(ProtocolError):
            lead.step(
                world.plan,
                before,
                rank,
                replace(early, round=message.round, attempt=message.attempt),
            )
    assert world.state == before
    # What is late is dropped without a word.
    if message.round:
        late = replace(message, round=message.round - 1)
        assert lead.step(world.plan, before, rank, late) == (before, ())


@pytest.mark.parametrize("kind", [k for k in FROM_SITES if k is not Kind.SEALED_KEY])
def test_nothing_counts_twice(kind: Kind):
    world, rank, message = at(kind)
    state, _ = lead.step(world.plan, world.state, rank, message)
    with pytest.raises(ProtocolError):
        lead.step(world.plan, state, rank, message)


def test_parts_of_a_contribution_come_in_order():
    world, rank, message = at(Kind.CONTRIBUTION)
    for wrong in (
        replace(message, part=1),
        replace(message, parts=3),
        replace(message, part=0, parts=1),
    ):
        with pytest.raises(ProtocolError, match="expected part 0 of 2"):
            lead.step(world.plan, world.state, rank, wrong)


def test_only_the_first_site_hands_out_keys():
    world, rank, message = at(Kind.SEALED_KEY)
    assert rank == 1
    for wrong_rank, part in ((2, 2), (1, 0), (1, 3)):
        with pytest.raises(ProtocolError, match="not its to send"):
            lead.step(world.plan, world.state, wrong_rank, replace(message, part=part, parts=4))


def greet_all(p: lead.Plan, *hellos: Message) -> lead.State:
    state = lead.State()
    for rank, message in enumerate(hellos, 1):
        state, _ = lead.step(p, state, rank, message)
    return state


@pytest.mark.parametrize(
    ("hellos", "sentence"),
    [
        ((hello("a"), hello("a")), "ranks 1 and 2 both are site 'a'"),
        ((hello("z"),), "rank 1 calls itself 'z'"),
        ((hello("a", digest="other"),), "site a reads another experiment"),
        ((hello("a", versions={"privfl": "2"}),), "site a runs privfl 2, the coordinator privfl 1"),
    ],
)
def test_sites_that_do_not_fit_together(hellos: tuple[Message, ...], sentence: str):
    with pytest.raises(PrivflError, match=sentence):
        greet_all(plan(), *hellos)


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        (
            {"parameters": 8},
            r"another number of trainable parameters at some sites \(a 7, b 8, c 7\)",
        ),
        ({"tag": "u"}, "different initial parameters"),
        ({"layout": {"accuracy": 2}}, "another number of ratios"),
    ],
)
def test_models_that_do_not_fit_together(different: dict[str, Any], sentence: str):
    world, _, _ = at(Kind.PREPARED)
    state, _ = lead.step(world.plan, world.state, 1, Message.of(prepared(), RUN))
    state, _ = lead.step(world.plan, state, 2, Message.of(prepared(**different), RUN))
    with pytest.raises(PrivflError, match=sentence):
        lead.step(world.plan, state, 3, Message.of(prepared(), RUN))


def test_differing_replicas_stop_the_run():
    world, _, _ = at(Kind.APPLIED)
    state = world.state
    for rank, tag in ((1, "x"), (2, "x")):
        state, _ = lead.step(
            world.plan,
            state,
            rank,
            Message.of(messages.Applied(tag=tag), RUN, state.round, state.attempt),
        )
    with pytest.raises(PrivflError, match="replicas differ after round 1"):
        lead.step(
            world.plan,
            state,
            3,
            Message.of(messages.Applied(tag="y"), RUN, state.round, state.attempt),
        )


def test_a_failure_of_a_site_ends_the_run_with_its_sentence_and_code():
    world, _rank, _ = at(Kind.TRAINED)
    failed = Message.of(messages.Failed(error="it broke", exit_code=2))
    state, outputs = lead.step(world.plan, world.state, 2, failed)
    assert outputs == (lead.Tell(RunFailed("site b: it broke", 1)), lead.Dismiss(2))
    assert lead.step(world.plan, state, 3, failed) == (state, ()), "one error per job"


def test_weights_by_records():
    world = World(plan(weights="records"))
    sizes = iter([10, 20, 70])
    answer = world.answer
    world.answer = lambda rank, body: answer(
        rank,
        body.model_copy(update={"records": next(sizes)})
        if isinstance(body, messages.Prepared)
        else body,
    )
    world.run()
    begin = next(m.body for _, _, m in world.wire if m.kind is Kind.BEGIN)
    assert sorted(messages.weights_of("records", begin).values()) == [0.1, 0.2, 0.7]
    assert set(messages.weights_of("uniform", begin).values()) == {1 / 3}

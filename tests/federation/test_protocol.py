"""The round protocol without MPI, encryption or torch: the whole run, and every message that must not be accepted."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from privfl.errors import PrivflError, ProtocolError
from privfl.federation import coordinator as lead
from privfl.federation import member, messages
from privfl.federation.messages import Kind, Message, decode

RUN = bytes(range(16))
SITES = ("a", "b", "c")
BLOCKS = 2


def plan(**changes: Any) -> lead.Plan:
    fields: dict[str, Any] = {
        "run": RUN,
        "folder": "/f",
        "digest": "d",
        "versions": {"privfl": "1"},
        "sites": SITES,
        "rounds": 2,
        "evaluate_every": 1,
        "weights": "uniform",
        "blocks": lambda values: BLOCKS,
    }
    return lead.Plan(**fields | changes)


def hello(site: str, **changes: Any) -> Message:
    return Message.of(
        messages.Hello(**{"site": site, "digest": "d", "versions": {"privfl": "1"}, "exchange_key": site * 8} | changes)
    )


def prepared(**changes: Any) -> messages.Prepared:
    fields: dict[str, Any] = {
        "records": 10,
        "parameters": 7,
        "layout": {"accuracy": 1},
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "planned_epsilon": 1.0,
        "tag": "t",
    }
    return messages.Prepared(**fields | changes)


TRAINED = messages.Trained(event={"kind": "x"}, steps=3, epsilon=0.5)


class World:
    """A coordinator and members that exchange encoded bytes; the heavy work is replaced by fixed answers."""

    def __init__(self, p: lead.Plan) -> None:
        self.plan = p
        self.state = lead.State()
        self.members = {
            rank: member.State(site, "d", p.sites, p.rounds, p.evaluate_every) for rank, site in enumerate(p.sites, 1)
        }
        self.told: list[lead.Tell] = []
        self.folded: list[int] = []
        self.wire: list[tuple[int, int, Message]] = []
        self.code: int | None = None

    def to_lead(self, rank: int, message: Message) -> None:
        self.wire.append((rank, 0, message))
        self.state, outputs = lead.step(self.plan, self.state, rank, decode(*message.encode()))
        self.perform(outputs)

    def perform(self, outputs: tuple[lead.Output, ...]) -> None:
        for output in outputs:
            match output:
                case lead.Send():
                    self.to_member(output.rank, output.message)
                case lead.Fold():
                    self.folded.append(output.part)
                case lead.Release():
                    for rank in output.ranks:
                        for part in range(output.blocks):
                            self.to_member(rank, replace(output.message, part=part, parts=output.blocks, bulk=b"sum"))
                case lead.Tell():
                    self.told.append(output)
                case lead.Dismiss():
                    self.code = output.exit_code

    def to_member(self, rank: int, message: Message) -> None:
        self.wire.append((0, rank, message))
        blocks = {"update": BLOCKS, "metrics": BLOCKS}
        self.members[rank], actions = member.step(self.members[rank], decode(*message.encode()), blocks)
        for action in actions:
            self.act(rank, action)

    def answer(self, rank: int, body: messages.Body) -> None:
        self.members[rank], message = member.done(self.members[rank], body)
        self.queue.append((rank, message))

    def act(self, rank: int, action: member.Action) -> None:
        state = self.members[rank]
        match action:
            case member.Prepare():
                if action.make_key:
                    self.queue.append((rank, Message(Kind.ADDING_CONTEXT, RUN, bulk=b"ctx")))
                    self.queue += [(rank, Message(Kind.SEALED_KEY, RUN, part=i, parts=len(SITES), bulk=b"key")) for i in (1, 2)]
                    self.answer(rank, prepared())
            case member.Unseal():
                self.answer(rank, prepared())
            case member.Train():
                self.answer(rank, TRAINED)
            case member.Contribute():
                for part in range(BLOCKS):
                    message = Message(Kind.CONTRIBUTION, RUN, state.round, state.attempt, part, BLOCKS, bulk=b"c")
                    self.queue.append((rank, message))
                self.members[rank] = member.contributed(state)
            case member.Combine(vector="update"):
                self.answer(rank, messages.Applied(tag=f"t{state.round}"))
            case member.Combine(vector="metrics"):
                self.answer(rank, messages.Measured(metrics={"accuracy": 0.5}))
            case member.Write():
                self.answer(rank, messages.Finished(model="m", log="l"))

    def run(self, choose: Any = lambda n: 0) -> None:
        self.queue: list[tuple[int, Message]] = []
        for rank, site in enumerate(self.plan.sites, 1):
            self.to_lead(rank, hello(site))
        while self.queue:
            # Any order between sites is possible, but not between the messages of one site.
            ranks = sorted({rank for rank, _ in self.queue})
            rank = ranks[choose(len(ranks))]
            index = next(i for i, (r, _) in enumerate(self.queue) if r == rank)
            self.to_lead(*self.queue.pop(index))


@pytest.mark.parametrize("seed", range(30))
def test_a_whole_run_in_any_order_of_arrival(seed: int):
    world = World(plan())
    world.run(random.Random(seed).randrange)
    assert world.code == 0
    assert [t.what for t in world.told] == ["greeted", "started", "round", "round", "finished"]
    assert [t.facts["metrics"] for t in world.told if t.what == "round"] == [{"accuracy": 0.5}] * 2
    # Two sums a round, each of BLOCKS blocks from every site.
    assert len(world.folded) == 2 * 2 * BLOCKS * len(SITES)
    attempts = [(m.round, m.attempt) for _, to, m in world.wire if m.kind is Kind.SUM and to == 1]
    assert attempts == sorted(set(attempts)), "(round, attempt) increases strictly"


def test_metrics_are_summed_only_when_due():
    world = World(plan(rounds=5, evaluate_every=2))
    world.run()
    assert [bool(t.facts["metrics"]) for t in world.told if t.what == "round"] == [False, True, False, True, True]
    world = World(plan(evaluate_every=0))
    world.run()
    assert not any(m.kind is Kind.SUM and m.body.vector == "metrics" for _, _, m in world.wire)


def at(kind: Kind) -> tuple[World, int, Message]:
    """A world stopped before the first message of this kind reaches the coordinator, and that message."""
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


FROM_SITES = [
    Kind.ADDING_CONTEXT,
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
        if other is kind or {other, kind} <= {Kind.ADDING_CONTEXT, Kind.SEALED_KEY, Kind.PREPARED}:
            continue
        _, _, early = at(other)
        with pytest.raises(ProtocolError):
            lead.step(world.plan, before, rank, replace(early, round=message.round, attempt=message.attempt))
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
    for wrong in (replace(message, part=1), replace(message, parts=3), replace(message, part=0, parts=1)):
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
        ({"parameters": 8}, r"another number of trainable parameters at some sites \(a 7, b 8, c 7\)"),
        ({"tag": "u"}, "different initial parameters"),
        ({"layout": {"accuracy": 2}}, "another number of ratios"),
    ],
)
def test_models_that_do_not_fit_together(different: dict[str, Any], sentence: str):
    world, _, _ = at(Kind.PREPARED)
    state = replace(world.state, has_context=True)
    state, _ = lead.step(world.plan, state, 1, Message.of(prepared(), RUN))
    state, _ = lead.step(world.plan, state, 2, Message.of(prepared(**different), RUN))
    with pytest.raises(PrivflError, match=sentence):
        lead.step(world.plan, state, 3, Message.of(prepared(), RUN))


def test_differing_replicas_stop_the_run():
    world, _, _ = at(Kind.APPLIED)
    state = world.state
    for rank, tag in ((1, "x"), (2, "x")):
        state, _ = lead.step(world.plan, state, rank, Message.of(messages.Applied(tag=tag), RUN, state.round, state.attempt))
    with pytest.raises(PrivflError, match="replicas differ after round 1"):
        lead.step(world.plan, state, 3, Message.of(messages.Applied(tag="y"), RUN, state.round, state.attempt))


def test_a_failure_of_a_site_ends_the_run_with_its_sentence_and_code():
    world, _rank, _ = at(Kind.TRAINED)
    failed = Message.of(messages.Failed(error="it broke", exit_code=2))
    state, outputs = lead.step(world.plan, world.state, 2, failed)
    assert outputs == (lead.Tell("failed", {"error": "site b: it broke", "round": 1}), lead.Dismiss(2))
    assert lead.step(world.plan, state, 3, failed) == (state, ()), "one error per job"


def test_weights_by_records():
    world = World(plan(weights="records"))
    sizes = iter([10, 20, 70])
    answer = world.answer
    world.answer = lambda rank, body: answer(
        rank, body.model_copy(update={"records": next(sizes)}) if isinstance(body, messages.Prepared) else body
    )
    world.run()
    begin = next(m.body for _, _, m in world.wire if m.kind is Kind.BEGIN)
    assert sorted(messages.weights_of("records", begin).values()) == [0.1, 0.2, 0.7]
    assert set(messages.weights_of("uniform", begin).values()) == {1 / 3}


# -- the member against a relay that misbehaves ---------------------------------------------------------------------------


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


FROM_LEAD = [Kind.WELCOME, Kind.SEALED_KEY, Kind.BEGIN, Kind.ROUND, Kind.SUM, Kind.TOTAL, Kind.FINISH]
TWO = {"update": BLOCKS, "metrics": BLOCKS}


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
    # Even in a phase that would allow a newer message of this kind. (An end may be announced whenever a round is over.)
    phases = {after.phase} if kind is Kind.FINISH else {after.phase, member.Phase.IDLE, member.Phase.TRAINED}
    for phase in phases:
        with pytest.raises(ProtocolError):
            member.step(replace(after, phase=phase), message, TWO)


def test_a_member_contributes_only_to_sums_of_all_members():
    state, message = member_at(Kind.SUM)
    for members in (("a", "b"), ("b",), ("a", "b", "c", "d"), ("c", "b", "a"), ("b", "b", "b")):
        with pytest.raises(ProtocolError, match="other members"):
            member.step(state, replace(message, body=messages.Sum(vector="update", members=members)), TWO)


def test_a_member_without_public_records_sums_no_metrics():
    state, message = member_at(Kind.SUM)
    assert state.begin is not None
    state = replace(state, phase=member.Phase.IDLE, begin=state.begin.model_copy(update={"layout": {}}))
    with pytest.raises(ProtocolError, match="none may leave"):
        member.step(state, replace(message, body=messages.Sum(vector="metrics", members=SITES)), TWO)


@pytest.mark.parametrize("kind", [Kind.TOTAL, Kind.ROUND, Kind.SUM, Kind.FINISH])
def test_nothing_is_taken_before_the_own_contribution_is_sent(kind: Kind):
    """A total that comes first would be added to what is left of the last one, and its decryption told."""
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
            member.step(state, replace(message, body=body.model_copy(update={"members": members})), TWO)
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
    """10^4 mutated messages: a named error or a well-formed message, never a crash."""
    world = World(plan())
    world.run()
    samples = [m.encode() for _, _, m in world.wire]
    chance = random.Random(0)
    understood = 0
    for _ in range(10_000):
        head, bulk = (bytearray(x) for x in chance.choice(samples))
        target = head if chance.random() < 0.5 or not bulk else bulk
        match chance.randrange(3):
            case 0:
                target[chance.randrange(len(target))] ^= 1 << chance.randrange(8)
            case 1:
                del target[chance.randrange(len(target)) :]
            case _:
                target += chance.randbytes(chance.randrange(1, 9))
        try:
            decode(bytes(head), bytes(bulk))
            understood += 1
        except ProtocolError:
            continue
    assert 0 < understood < 9_000

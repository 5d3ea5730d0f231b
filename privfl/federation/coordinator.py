"""The coordinator's side of the protocol: rank 0 opens rounds, names the members of each sum and relays.

``step`` and ``fail`` are pure. What they cannot do themselves (move bytes, add ciphertexts, tell a person) they return as outputs
for the driver, in order. Messages of an older round or attempt are dropped; what the protocol does not allow raises
ProtocolError before anything has changed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from privfl.errors import PrivflError, ProtocolError
from privfl.federation.messages import (
    Agreed,
    Applied,
    Begin,
    Body,
    Failed,
    Finish,
    Finished,
    Hello,
    Kind,
    Measured,
    Member,
    Message,
    Prepared,
    Round,
    Signed,
    Sum,
    Trained,
    Vector,
    Welcome,
    vector_length,
    weights_of,
)


class Phase(enum.Enum):
    """What the coordinator waits for."""

    GREETING = "greeting"
    SIGNING = "signing"
    PREPARING = "preparing"
    TRAINING = "training"
    SUMMING = "summing"
    APPLYING = "applying"
    MEASURING = "measuring"
    FINISHING = "finishing"
    ENDED = "ended"


@dataclass(frozen=True)
class Plan:
    """What does not change during a run.

    ``blocks`` gives the number of blocks of a vector of so many numbers; ``path`` whether contributions come as messages ('star') or the
    transport adds them ('reduce'), of which each site then only says that it has handed over its part.
    """

    run: bytes
    folder: str
    digest: str
    versions: Mapping[str, str]
    sites: tuple[str, ...]
    rounds: int
    evaluate_every: int
    weights: Literal["uniform", "records"]
    blocks: Callable[[Vector, int], int]
    path: Literal["star", "reduce"] = "star"
    account: str = ""


@dataclass(frozen=True)
class State:
    """Where the run stands. Dictionaries are keyed by rank and never changed in place."""

    phase: Phase = Phase.GREETING
    round: int = 0
    attempt: int = 0
    vector: Vector = "update"
    hellos: Mapping[int, Hello] = field(default_factory=dict)
    prepared: Mapping[int, Prepared] = field(default_factory=dict)
    begin: Begin | None = None
    signed: Mapping[int, Signed] = field(default_factory=dict)
    parts_in: Mapping[int, int] = field(default_factory=dict)
    answers: Mapping[int, Body] = field(default_factory=dict)
    trained: Mapping[int, Trained] = field(default_factory=dict)

    def site(self, rank: int) -> str:
        """The name under which the rank introduced itself, or a description if it has not."""
        hello = self.hellos.get(rank)
        return hello.site if hello is not None and hello.site else f"of rank {rank}"


class Send(NamedTuple):
    """Send ``message`` to ``rank``."""

    rank: int
    message: Message


class SetAdder(NamedTuple):
    """Make the adder of this run: of words, or of ciphertexts where the sites have not proven that words add up."""

    words_add: bool


class OpenSum(NamedTuple):
    """Start a new sum of contributions of ``vector``, which has so many numbers."""

    vector: Vector
    numbers: int


class Fold(NamedTuple):
    """Add this block to the open sum."""

    part: int
    block: bytes | memoryview


class Release(NamedTuple):
    """Send the finished sum to these ranks; ``message`` is the head to use."""

    ranks: tuple[int, ...]
    message: Message
    blocks: int


class Dismiss(NamedTuple):
    """The run is over: tell every rank to end with this exit code."""

    exit_code: int


class Tell(NamedTuple):
    """What a person or the run folder should know; ``what`` is 'greeted', 'started', 'round', 'finished' or 'failed'."""

    what: str
    facts: dict[str, Any]


Output = Send | SetAdder | OpenSum | Fold | Release | Dismiss | Tell
Result = tuple[State, tuple[Output, ...]]


def step(plan: Plan, state: State, rank: int, message: Message) -> Result:
    """The state after ``message`` from ``rank``, and what to do.

    Raises:
        ProtocolError: the message is not allowed now.
        PrivflError: the sites cannot work together (different experiments, versions, models).
    """
    body = message.body
    if state.phase is Phase.ENDED:
        return state, ()
    if isinstance(body, Failed):
        return fail(state, f"site {state.site(rank)}: {body.error}", body.exit_code)
    if isinstance(body, Hello):
        return _greet(plan, state, rank, body)
    if message.run != plan.run:
        raise ProtocolError(f"site {state.site(rank)} sent a {message.kind.name} message for another run")
    if (message.round, message.attempt) < (state.round, state.attempt):
        return state, ()
    if (message.round, message.attempt) > (state.round, state.attempt):
        raise ProtocolError(f"site {state.site(rank)} sent a {message.kind.name} message for a round that is not open")
    if isinstance(body, Signed):
        return _take_signature(plan, state, rank, body)
    if message.kind is Kind.SEALED_KEY:
        return _relay_key(plan, state, rank, message)
    if isinstance(body, Prepared):
        return _prepare(plan, state, rank, body)
    if message.kind is Kind.CONTRIBUTION:
        return _contribute(plan, state, rank, message)
    if isinstance(body, Trained | Applied | Measured | Finished):
        return _answer(plan, state, rank, body)
    raise ProtocolError(f"site {state.site(rank)} sent a {message.kind.name} message, which no site may send")


def fail(state: State, error: str, exit_code: int) -> Result:
    """Stop the run with one sentence."""
    return _end(state, exit_code, Tell("failed", {"error": error, "round": state.round}))


def _end(state: State, exit_code: int, told: Tell) -> Result:
    return replace(state, phase=Phase.ENDED), (told, Dismiss(exit_code))


def _ranks(plan: Plan) -> range:
    return range(1, len(plan.sites) + 1)


def _to_all(plan: Plan, state: State, body: Body) -> tuple[Output, ...]:
    message = Message.of(body, plan.run, state.round, state.attempt)
    return tuple(Send(rank, message) for rank in _ranks(plan))


def _expect(state: State, rank: int, phase: Phase, what: str) -> None:
    if state.phase is not phase:
        raise ProtocolError(f"site {state.site(rank)} sent {what} while the coordinator was {state.phase.value}")


def _greet(plan: Plan, state: State, rank: int, hello: Hello) -> Result:
    _expect(state, rank, Phase.GREETING, "a greeting")
    if rank in state.hellos:
        raise ProtocolError(f"rank {rank} greeted twice")
    state = replace(state, hellos={**state.hellos, rank: hello})
    if hello.error is not None:
        return fail(state, f"site {state.site(rank)}: {hello.error}", hello.exit_code)
    if hello.site not in plan.sites:
        raise PrivflError(
            f"rank {rank} calls itself {hello.site!r}, which is not one of the experiment's sites: {', '.join(plan.sites)}"
        )
    for other, earlier in state.hellos.items():
        if other != rank and earlier.site == hello.site:
            raise PrivflError(
                f"ranks {min(rank, other)} and {max(rank, other)} both are site {hello.site!r}; give every rank its own PRIVFL_SITE, or none"
            )
    if hello.digest != plan.digest:
        raise PrivflError(
            f"site {hello.site} reads another experiment than the coordinator; give every rank the same file and --set options"
        )
    if dict(hello.versions) != dict(plan.versions):
        raise PrivflError(
            f"site {hello.site} runs {_versions(hello.versions)}, the coordinator {_versions(plan.versions)}; install the same versions"
        )
    if len(state.hellos) < len(plan.sites):
        return state, ()
    members = tuple(
        Member(site=site, rank=rank, exchange_key=state.hellos[rank].exchange_key, identity=state.hellos[rank].identity)
        for site in plan.sites
        for rank in [_rank_of(state, site)]
    )
    state = replace(state, phase=Phase.SIGNING)
    welcome = Welcome(run=plan.run.hex(), folder=plan.folder, digest=plan.digest, members=members)
    return state, (Tell("greeted", {}), *_to_all(plan, state, welcome))


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _rank_of(state: State, site: str) -> int:
    return next(rank for rank, hello in state.hellos.items() if hello.site == site)


def _take_signature(plan: Plan, state: State, rank: int, body: Signed) -> Result:
    _expect(state, rank, Phase.SIGNING, "a signature")
    if rank in state.signed:
        raise ProtocolError(f"site {state.site(rank)} signed twice")
    state = replace(state, signed={**state.signed, rank: body})
    if len(state.signed) < len(plan.sites):
        return state, ()
    state = replace(state, phase=Phase.PREPARING)
    agreed = Agreed(signatures={state.site(r): signed.signature for r, signed in state.signed.items()})
    return state, _to_all(plan, state, agreed)


def _relay_key(plan: Plan, state: State, rank: int, message: Message) -> Result:
    _expect(state, rank, Phase.PREPARING, "a sealed key")
    if state.site(rank) != plan.sites[0] or not 0 < message.part < len(plan.sites):
        raise ProtocolError(f"site {state.site(rank)} sent a sealed key that is not its to send")
    return state, (Send(_rank_of(state, plan.sites[message.part]), message),)


def _prepare(plan: Plan, state: State, rank: int, body: Prepared) -> Result:
    _expect(state, rank, Phase.PREPARING, "its preparation")
    if rank in state.prepared:
        raise ProtocolError(f"site {state.site(rank)} prepared twice")
    state = replace(state, prepared={**state.prepared, rank: body})
    if len(state.prepared) < len(plan.sites):
        return state, ()
    everybody = list(state.prepared.values())
    if len({p.parameters for p in everybody}) > 1:
        counts = ", ".join(f"{state.site(r)} {p.parameters}" for r, p in sorted(state.prepared.items()))
        raise PrivflError(
            f"model() has another number of trainable parameters at some sites ({counts}); give every site the same model"
        )
    if len({p.tag for p in everybody}) > 1:
        raise PrivflError(
            "model() gives different initial parameters at different sites; let it use torch's random numbers only, which are seeded alike"
        )
    layouts = [p.layout for p in everybody if p.layout]
    if any(layout != layouts[0] for layout in layouts):
        raise PrivflError(
            "a metric returns another number of ratios at some sites; return the same number everywhere, also for classes a site lacks"
        )
    records = {state.site(r): p.records for r, p in state.prepared.items()}
    begin = Begin(
        parameters=everybody[0].parameters,
        layout=layouts[0] if layouts else {},
        records={site: records[site] for site in plan.sites},
    )
    shares = weights_of(plan.weights, begin)
    sites = {
        site: {
            "records": p.records,
            "weight": shares[site],
            "noise_multiplier": p.noise_multiplier,
            "sampling_rate": p.sampling_rate,
            "planned_epsilon": p.planned_epsilon,
            "evaluation_epsilon": p.evaluation_epsilon,
            "metrics_noise": p.metrics_noise,
            "accountant": p.accountant,
            "book": p.book,
        }
        for site in plan.sites
        for p in [state.prepared[_rank_of(state, site)]]
    }
    words_add = all(p.words_add for p in everybody)
    pinned = [site for site in plan.sites if state.prepared[_rank_of(state, site)].pinned]
    accounts = [plan.account, *(state.hellos[rank].account for rank in _ranks(plan))]
    facts = {"words_add": words_add, "pinned": pinned, "accounts": len(set(accounts)) == len(accounts)}
    started = Tell("started", {"parameters": begin.parameters, "sites": sites, **facts})
    opening = _to_all(plan, state, begin)
    state, outputs = _open_round(plan, replace(state, begin=begin))
    return state, (started, SetAdder(words_add), *opening, *outputs)


def _open_round(plan: Plan, state: State) -> Result:
    state = replace(state, phase=Phase.TRAINING, round=state.round + 1, attempt=0, answers={}, trained={})
    return state, _to_all(plan, state, Round())


def _open_sum(plan: Plan, state: State, vector: Vector) -> Result:
    state = replace(
        state,
        phase=Phase.SUMMING,
        vector=vector,
        attempt=state.attempt + 1,
        answers={},
        parts_in=dict.fromkeys(_ranks(plan), 0),
    )
    trained = state.trained if vector == "update" else {}
    spans = {state.site(rank): body.span for rank, body in trained.items()}
    heads = {state.site(rank): body.head for rank, body in trained.items()}
    # Told first and opened then: where the transport adds, opening may wait until the members take part.
    told = _to_all(plan, state, Sum(vector=vector, members=plan.sites, spans=spans, heads=heads))
    return state, (*told, OpenSum(vector, vector_length(_begun(state), vector)))


def _blocks(plan: Plan, state: State) -> int:
    return plan.blocks(state.vector, vector_length(_begun(state), state.vector))


def _begun(state: State) -> Begin:
    if state.begin is None:
        raise ProtocolError("the run has not begun")
    return state.begin


def _contribute(plan: Plan, state: State, rank: int, message: Message) -> Result:
    _expect(state, rank, Phase.SUMMING, "a contribution")
    blocks = _blocks(plan, state)
    expected = blocks if plan.path == "star" else 1
    if message.parts != expected or message.part != state.parts_in[rank]:
        raise ProtocolError(
            f"site {state.site(rank)} sent part {message.part} of {message.parts} of a contribution, "
            f"expected part {state.parts_in[rank]} of {expected}"
        )
    state = replace(state, parts_in={**state.parts_in, rank: message.part + 1})
    fold = (Fold(message.part, message.bulk),) if plan.path == "star" else ()
    if any(parts < expected for parts in state.parts_in.values()):
        return state, fold
    state = replace(state, phase=Phase.APPLYING if state.vector == "update" else Phase.MEASURING)
    head = Message(Kind.TOTAL, plan.run, state.round, state.attempt)
    return state, (*fold, Release(tuple(_ranks(plan)), head, blocks))


_ANSWERS: dict[Phase, type[Body]] = {
    Phase.TRAINING: Trained,
    Phase.APPLYING: Applied,
    Phase.MEASURING: Measured,
    Phase.FINISHING: Finished,
}


def _answer(plan: Plan, state: State, rank: int, body: Body) -> Result:
    if _ANSWERS.get(state.phase) is not type(body) or rank in state.answers:
        raise ProtocolError(f"site {state.site(rank)} sent {type(body).__name__} while the coordinator was {state.phase.value}")
    state = replace(state, answers={**state.answers, rank: body})
    if len(state.answers) < len(plan.sites):
        return state, ()
    match state.phase:
        case Phase.TRAINING:
            trained = {r: b for r, b in state.answers.items() if isinstance(b, Trained)}
            return _open_sum(plan, replace(state, trained=trained), "update")
        case Phase.APPLYING:
            return _applied(plan, state)
        case Phase.MEASURING:
            return _measured(plan, state)
        case _:
            return _finished(plan, state)


def _applied(plan: Plan, state: State) -> Result:
    if len({b.tag for b in state.answers.values() if isinstance(b, Applied)}) > 1:
        raise PrivflError(
            f"the sites' replicas differ after round {state.round}: a sum was altered on the way, or the sites' processors compute differently",
        )
    last = state.round == plan.rounds
    due = plan.evaluate_every > 0 and (last or state.round % plan.evaluate_every == 0)
    if due and _begun(state).layout:
        return _open_sum(plan, state, "metrics")
    return _close_round(plan, state, {}, {})


def _measured(plan: Plan, state: State) -> Result:
    answers = {state.site(rank): b for rank, b in state.answers.items() if isinstance(b, Measured)}
    values = [b.metrics for b in answers.values()]
    if any(v != values[0] for v in values):
        raise ProtocolError(f"the sites decrypted different metrics in round {state.round}")
    return _close_round(plan, state, values[0], answers)


def _close_round(plan: Plan, state: State, metrics: Mapping[str, float], measured: Mapping[str, Measured]) -> Result:
    by_site = {state.site(rank): body for rank, body in state.trained.items()}
    heads = {site: (measured.get(site) or by_site[site]).head for site in plan.sites}
    sites = {
        site: {
            "event": by_site[site].event,
            "steps": by_site[site].steps,
            "epsilon": by_site[site].epsilon,
            "head": heads[site].model_dump(),
        }
        | _evaluation(measured.get(site))
        for site in plan.sites
    }
    told = Tell("round", {"round": state.round, "members": list(plan.sites), "metrics": dict(metrics), "sites": sites})
    if state.round < plan.rounds:
        state, outputs = _open_round(plan, state)
        return state, (told, *outputs)
    state = replace(state, phase=Phase.FINISHING, answers={})
    return state, (told, *_to_all(plan, state, Finish(heads=heads)))


def _evaluation(measured: Measured | None) -> dict[str, Any]:
    if measured is None or measured.event is None:
        return {}
    return {"evaluation": {"event": measured.event, "epsilon": measured.epsilon}}


def _finished(plan: Plan, state: State) -> Result:
    by_site = {state.site(r): b for r, b in state.answers.items() if isinstance(b, Finished)}
    told = Tell("finished", {"sites": {s: {"model": by_site[s].model, "log": by_site[s].log} for s in plan.sites}})
    return _end(state, 0, told)

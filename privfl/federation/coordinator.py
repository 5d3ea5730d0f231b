"""The coordinator's side of the protocol: rank 0 opens rounds, names the members of each sum and
relays.

``step`` and ``fail`` are pure. What they cannot do themselves (move bytes, add ciphertexts, tell a
person) they return as outputs for the driver, in order. Messages of an older round or attempt are
dropped; what the protocol does not allow raises ProtocolError before anything has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from privfl.errors import PrivflError, ProtocolError
from privfl.federation import coordinator_setup
from privfl.federation.coordinator_state import (
    Dismiss,
    Fold,
    OpenSum,
    Output,
    Phase,
    Plan,
    Release,
    Result,
    Send,
    SetAdder,
    State,
    Tell,
    end,
    expect,
    fail,
    rank_of,
    ranks,
    to_all,
)
from privfl.federation.messages import (
    Applied,
    Begin,
    Body,
    Failed,
    Finish,
    Finished,
    Hello,
    Kind,
    Lend,
    Measured,
    Message,
    Prepared,
    Round,
    Signed,
    Sum,
    Trained,
    Vector,
    vector_length,
)
from privfl.federation.news import EvaluationCost, Outputs, RoundDone, RunFinished, SiteRound

__all__ = [
    "Dismiss",
    "Fold",
    "OpenSum",
    "Output",
    "Phase",
    "Plan",
    "Release",
    "Result",
    "Send",
    "SetAdder",
    "State",
    "Tell",
    "fail",
    "step",
]


def step(plan: Plan, state: State, rank: int, message: Message) -> Result:
    """The state after ``message`` from ``rank``, and what to do.

    Raises:
        ProtocolError: If the message is not allowed now.
        PrivflError: If the sites cannot work together (different experiments, versions, models).
    """
    body = message.body
    if state.phase is Phase.ENDED:
        return state, ()
    if isinstance(body, Failed):
        return fail(state, f"site {state.site(rank)}: {body.error}", body.exit_code)
    if isinstance(body, Hello):
        return coordinator_setup.greet(plan, state, rank, body)
    if message.run != plan.run:
        raise ProtocolError(
            f"site {state.site(rank)} sent a {message.kind.name} message for another run"
        )
    if (message.round, message.attempt) < (state.round, state.attempt):
        return state, ()
    if (message.round, message.attempt) > (state.round, state.attempt):
        raise ProtocolError(
            f"site {state.site(rank)} sent a {message.kind.name} message for a round that is not "
            "open"
        )
    if isinstance(body, Signed):
        return coordinator_setup.take_signature(plan, state, rank, body)
    if message.kind is Kind.SEALED_KEY:
        return coordinator_setup.relay_key(plan, state, rank, message)
    if isinstance(body, Prepared):
        state, outputs = coordinator_setup.prepare(plan, state, rank, body)
        if state.begin is None:
            return state, outputs
        state, opening = _open_round(plan, state)
        return state, (*outputs, *opening)
    if message.kind is Kind.REPLICA:
        return _relay_replica(plan, state, rank, message)
    if message.kind is Kind.CONTRIBUTION:
        return _contribute(plan, state, rank, message)
    if isinstance(body, Trained | Applied | Measured | Finished):
        return _answer(plan, state, rank, body)
    raise ProtocolError(
        f"site {state.site(rank)} sent a {message.kind.name} message, which no site may send"
    )


def _open_round(plan: Plan, state: State) -> Result:
    state = replace(
        state,
        phase=Phase.TRAINING,
        round=state.round + 1,
        attempt=0,
        answers={},
        trained={},
        adopting=(),
    )
    return state, to_all(plan, state, Round())


def _open_sum(plan: Plan, state: State, vector: Vector) -> Result:
    state = replace(
        state,
        phase=Phase.SUMMING,
        vector=vector,
        attempt=state.attempt + 1,
        answers={},
        parts_in=dict.fromkeys(ranks(plan), 0),
    )
    trained = state.trained if vector == "update" else {}
    sealed_ranges = {state.site(rank): body.sealed_range for rank, body in trained.items()}
    heads = {state.site(rank): body.head for rank, body in trained.items()}
    # Sent first and opened then: where the transport adds, opening may wait until the members take
    # part.
    call = to_all(
        plan,
        state,
        Sum(vector=vector, members=plan.sites, sealed_ranges=sealed_ranges, heads=heads),
    )
    return state, (*call, OpenSum(vector, vector_length(_begun(state), vector)))


def _blocks(plan: Plan, state: State) -> int:
    return plan.blocks(state.vector, vector_length(_begun(state), state.vector))


def _begun(state: State) -> Begin:
    if state.begin is None:
        raise ProtocolError("the run has not begun")
    return state.begin


def _contribute(plan: Plan, state: State, rank: int, message: Message) -> Result:
    expect(state, rank, Phase.SUMMING, "a contribution")
    blocks = _blocks(plan, state)
    expected = blocks if plan.path == "star" else 1
    if message.parts != expected or message.part != state.parts_in[rank]:
        raise ProtocolError(
            f"site {state.site(rank)} sent part {message.part} of {message.parts} of a "
            f"contribution, expected part {state.parts_in[rank]} of {expected}"
        )
    state = replace(state, parts_in={**state.parts_in, rank: message.part + 1})
    fold = (Fold(message.part, message.bulk),) if plan.path == "star" else ()
    if any(parts < expected for parts in state.parts_in.values()):
        return state, fold
    state = replace(state, phase=Phase.APPLYING if state.vector == "update" else Phase.MEASURING)
    head = Message(Kind.TOTAL, plan.run, state.round, state.attempt)
    return state, (*fold, Release(tuple(ranks(plan)), head, blocks))


_ANSWERS: dict[Phase, type[Body]] = {
    Phase.TRAINING: Trained,
    Phase.APPLYING: Applied,
    Phase.MEASURING: Measured,
    Phase.FINISHING: Finished,
}


def _answer(plan: Plan, state: State, rank: int, body: Body) -> Result:
    if _ANSWERS.get(state.phase) is not type(body) or rank in state.answers:
        raise ProtocolError(
            f"site {state.site(rank)} sent {type(body).__name__} while the coordinator was "
            f"{state.phase.value}"
        )
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
    tags = {rank: b.tag for rank, b in state.answers.items() if isinstance(b, Applied)}
    lender = rank_of(state, plan.sites[0])
    differ = tuple(state.site(rank) for rank, tag in sorted(tags.items()) if tag != tags[lender])
    if differ and plan.shared_noise and not state.adopting:
        # An optimizer step need not come out the same to the last bit on unlike processors: the
        # others take the first site's, if it is near.
        state = replace(state, phase=Phase.SETTLING, adopting=differ)
        return state, (Send(lender, Message.of(Lend(), plan.run, state.round, state.attempt)),)
    if differ:
        raise PrivflError(
            f"the sites' replicas differ after round {state.round}: a sum was altered on the way, "
            "or the sites' processors compute differently",
        )
    last = state.round == plan.rounds
    due = plan.evaluate_every > 0 and (last or state.round % plan.evaluate_every == 0)
    if due and _begun(state).layout:
        return _open_sum(plan, state, "metrics")
    return _close_round(plan, state, {}, {})


def _relay_replica(plan: Plan, state: State, rank: int, message: Message) -> Result:
    expect(state, rank, Phase.SETTLING, "a replica")
    if rank != rank_of(state, plan.sites[0]):
        raise ProtocolError(f"site {state.site(rank)} sent a replica that is not its to lend")
    others = [rank_of(state, site) for site in state.adopting]
    answers = {r: body for r, body in state.answers.items() if r not in others}
    return replace(state, phase=Phase.APPLYING, answers=answers), tuple(
        Send(other, message) for other in others
    )


def _measured(plan: Plan, state: State) -> Result:
    answers = {state.site(rank): b for rank, b in state.answers.items() if isinstance(b, Measured)}
    values = [b.metrics for b in answers.values()]
    if any(v != values[0] for v in values):
        raise ProtocolError(f"the sites decrypted different metrics in round {state.round}")
    return _close_round(plan, state, values[0], answers)


def _close_round(
    plan: Plan, state: State, metrics: Mapping[str, float], measured: Mapping[str, Measured]
) -> Result:
    by_site = {state.site(rank): body for rank, body in state.trained.items()}
    heads = {site: (measured.get(site) or by_site[site]).head for site in plan.sites}
    sites = {
        site: SiteRound(
            event=by_site[site].event,
            steps=by_site[site].steps,
            epsilon=by_site[site].epsilon,
            head=heads[site].model_dump(),
            evaluation=_evaluation(measured.get(site)),
        )
        for site in plan.sites
    }
    done = Tell(RoundDone(state.round, plan.sites, dict(metrics), sites, state.adopting))
    if state.round < plan.rounds:
        state, outputs = _open_round(plan, state)
        return state, (done, *outputs)
    state = replace(state, phase=Phase.FINISHING, answers={})
    return state, (done, *to_all(plan, state, Finish(heads=heads)))


def _evaluation(measured: Measured | None) -> EvaluationCost | None:
    if measured is None or measured.event is None:
        return None
    return EvaluationCost(measured.event, measured.epsilon)


def _finished(plan: Plan, state: State) -> Result:
    by_site = {state.site(r): b for r, b in state.answers.items() if isinstance(b, Finished)}
    return end(
        state,
        0,
        RunFinished({site: Outputs(by_site[site].model, by_site[site].log) for site in plan.sites}),
    )

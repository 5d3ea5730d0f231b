"""A site's side of the protocol: what a site may be told when, and what it then has to do.

``step`` takes messages of the coordinator, ``done`` takes the results of the site's own work; both
are pure. A round or attempt that is not newer than the last one is refused: a relay that repeats a
message must not make a site send anything twice.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from privfl.errors import ProtocolError
from privfl.federation.messages import (
    NO_RUN,
    Agreed,
    Applied,
    Begin,
    Body,
    Finish,
    Finished,
    Kind,
    Measured,
    Message,
    Prepared,
    Round,
    Signed,
    SignedHead,
    Sum,
    Trained,
    Vector,
    Welcome,
    vector_length,
)
from privfl.federation.messages import (
    Lend as LendBody,
)


class Phase(enum.Enum):
    """What the site is doing."""

    GREETED = "greeted"
    SIGNING = "signing"
    SIGNED = "signed"
    PREPARING = "preparing"
    IDLE = "idle"
    TRAINING = "training"
    TRAINED = "trained"
    CONTRIBUTING = "contributing"
    SUMMING = "summing"
    WORKING = "working"
    FINISHING = "finishing"


@dataclass(frozen=True)
class State:
    """Where this site stands.

    ``sites`` to ``evaluate_every`` are from its own copy of the experiment (0: metrics never
    leave).

    ``steps`` tells that every round is one step of an optimizer at each site, whose replicas may
    come out a little different.
    """

    site: str
    digest: str
    sites: tuple[str, ...]
    rounds: int
    evaluate_every: int
    steps: bool = False
    phase: Phase = Phase.GREETED
    run: bytes = NO_RUN
    has_key: bool = False
    begin: Begin | None = None
    round: int = 0
    attempt: int = 0
    vector: Vector = "update"
    measured: int = 0
    settled: int = 0
    parts_in: int = 0


class Prepare(NamedTuple):
    """Check the members, sign, and start the trainer."""

    welcome: Welcome


class Verify(NamedTuple):
    """Check all signatures; ``make_key`` tells whether this site then makes the shared keys."""

    signatures: dict[str, str]
    make_key: bool


class Unseal(NamedTuple):
    """Open the shared key."""

    sealed: bytes | memoryview


class Start(NamedTuple):
    """Check what the others agreed on against what this site has and allows."""

    begin: Begin


class Train(NamedTuple):
    """Train one round."""


class Contribute(NamedTuple):
    """Encrypt this vector for the sum of the members and send it; ``sealed_ranges``: what they
    need to agree on its range; ``heads`` of their ledgers.
    """

    vector: Vector
    sealed_ranges: dict[str, str]
    heads: dict[str, SignedHead]


class Collect(NamedTuple):
    """Decrypt this block of the total."""

    part: int
    block: bytes | memoryview


class Combine(NamedTuple):
    """The total is complete: use it."""

    vector: Vector


class Lend(NamedTuple):
    """Seal this site's replica for the others."""


class Adopt(NamedTuple):
    """Take the replica that another site sealed, if it is near enough."""

    sealed: bytes | memoryview


class Write(NamedTuple):
    """Write the model, and down the last ``heads`` of all ledgers."""

    heads: dict[str, SignedHead]


Action = (
    Prepare
    | Verify
    | Unseal
    | Start
    | Train
    | Contribute
    | Collect
    | Combine
    | Lend
    | Adopt
    | Write
)


def step(
    state: State, message: Message, blocks_of: Callable[[Vector], int]
) -> tuple[State, tuple[Action, ...]]:
    """The state after a message of the coordinator (but Stop, which needs no state), and what to
    do.

    ``blocks_of`` gives the number of blocks of a vector, once the run has begun.

    Raises:
        ProtocolError: If the message is not allowed now; nothing has changed.
    """
    body = message.body
    if isinstance(body, Welcome):
        return _welcome(state, body)
    if message.run != state.run:
        raise ProtocolError(f"the coordinator sent a {message.kind.name} message for another run")
    if isinstance(body, Agreed):
        return _agreed(state, message, body)
    if message.kind is Kind.SEALED_KEY:
        return _take_key(state, message)
    if isinstance(body, Begin):
        _expect(state, message, Phase.IDLE)
        if state.begin is not None or tuple(body.records) != state.sites:
            raise ProtocolError("the coordinator began the run twice, or for other sites")
        return replace(state, begin=body), (Start(body),)
    if isinstance(body, Round):
        _expect(state, message, Phase.IDLE)
        if state.begin is None or message.round != state.round + 1 or message.attempt != 0:
            raise ProtocolError(
                f"the coordinator opened round {message.round} after round {state.round}"
            )
        if message.round > state.rounds:
            # The budget was planned for so many; a coordinator must not spend more of it.
            raise ProtocolError(
                f"the coordinator opened round {message.round} of an experiment of {state.rounds} "
                "rounds"
            )
        return replace(state, phase=Phase.TRAINING, round=message.round, attempt=0), (Train(),)
    if isinstance(body, Sum):
        return _open_sum(state, message, body)
    if message.kind is Kind.TOTAL:
        return _take_total(state, message, blocks_of)
    if isinstance(body, LendBody) or message.kind is Kind.REPLICA:
        return _settle_replicas(state, message)
    if isinstance(body, Finish):
        _expect(state, message, Phase.IDLE)
        if (
            (message.round, message.attempt) != (state.rounds, state.attempt)
            or state.round != state.rounds
            or state.begin is None
        ):
            raise ProtocolError(
                f"the coordinator finished the run after round {message.round}, this site is in "
                f"round {state.round} of {state.rounds}"
            )
        return replace(state, phase=Phase.FINISHING), (Write(body.heads),)
    raise ProtocolError(
        f"the coordinator sent a {message.kind.name} message, which it may not send"
    )


def done(state: State, body: Body) -> tuple[State, Message]:
    """The state after this site's own work produced ``body``, and the message that says so."""
    transitions: dict[type[Body], tuple[Phase, Phase]] = {
        Signed: (Phase.SIGNING, Phase.SIGNED),
        Prepared: (Phase.PREPARING, Phase.IDLE),
        Trained: (Phase.TRAINING, Phase.TRAINED),
        Applied: (Phase.WORKING, Phase.IDLE),
        Measured: (Phase.WORKING, Phase.IDLE),
        Finished: (Phase.FINISHING, Phase.IDLE),
    }
    before, after = transitions[type(body)]
    if state.phase is not before:
        raise ProtocolError(
            f"{type(body).__name__} is no result of a site that is {state.phase.value}"
        )
    return replace(state, phase=after), Message.of(body, state.run, state.round, state.attempt)


def contributed(state: State) -> State:
    """The state once this site's contribution to the open sum has been sent; only then it takes
    a total.
    """
    if state.phase is not Phase.CONTRIBUTING:
        raise ProtocolError(f"no contribution is due from a site that is {state.phase.value}")
    return replace(state, phase=Phase.SUMMING)


def length(state: State, vector: Vector) -> int:
    """How many values ``vector`` has in this run."""
    if state.begin is None:
        raise ProtocolError("the run has not begun")
    return vector_length(state.begin, vector)


def _expect(state: State, message: Message, *phases: Phase) -> None:
    if state.phase not in phases:
        raise ProtocolError(
            f"the coordinator sent a {message.kind.name} message while this site was "
            f"{state.phase.value}"
        )


def _welcome(state: State, welcome: Welcome) -> tuple[State, tuple[Action, ...]]:
    names = tuple(member.site for member in welcome.members)
    if state.phase is not Phase.GREETED or names != state.sites or welcome.digest != state.digest:
        raise ProtocolError(
            "the coordinator's welcome is for other sites, for another experiment, or a second one"
        )
    try:
        run = bytes.fromhex(welcome.run)
    except ValueError as error:
        raise ProtocolError("the coordinator's welcome names no valid run") from error
    if len(run) != len(NO_RUN) or run == NO_RUN:
        raise ProtocolError("the coordinator's welcome names no valid run")
    return replace(state, phase=Phase.SIGNING, run=run), (Prepare(welcome),)


def _agreed(state: State, message: Message, body: Agreed) -> tuple[State, tuple[Action, ...]]:
    _expect(state, message, Phase.SIGNED)
    make_key = state.sites[0] == state.site
    return replace(state, phase=Phase.PREPARING, has_key=make_key), (
        Verify(body.signatures, make_key),
    )


def _take_key(state: State, message: Message) -> tuple[State, tuple[Action, ...]]:
    _expect(state, message, Phase.PREPARING)
    if state.has_key:
        raise ProtocolError("the coordinator sent a shared key to a site that has one")
    if message.part != state.sites.index(state.site):
        raise ProtocolError("the coordinator sent the shared key of another site")
    return replace(state, has_key=True), (Unseal(message.bulk),)


def _open_sum(state: State, message: Message, body: Sum) -> tuple[State, tuple[Action, ...]]:
    _expect(state, message, Phase.TRAINED if body.vector == "update" else Phase.IDLE)
    if message.round != state.round or message.attempt <= state.attempt:
        raise ProtocolError(
            f"the coordinator opened attempt {message.attempt} of round {message.round} after "
            f"attempt {state.attempt} of round {state.round}"
        )
    if body.vector == "metrics":
        if length(state, "metrics") == 0 or state.evaluate_every == 0:
            raise ProtocolError("the coordinator opened a sum of metrics, but none may leave")
        due = state.round == state.rounds or state.round % state.evaluate_every == 0
        if state.round <= state.measured or not due:
            raise ProtocolError(
                f"the coordinator opened a sum of metrics that is not due in round {state.round}, "
                "or a second one"
            )
    if body.members != state.sites:
        raise ProtocolError("the coordinator opened a sum for other members than this run's sites")
    if body.sealed_ranges and tuple(sorted(body.sealed_ranges)) != tuple(sorted(state.sites)):
        raise ProtocolError("the coordinator relays ranges of other sites than this run's members")
    measured = state.round if body.vector == "metrics" else state.measured
    state = replace(
        state,
        phase=Phase.CONTRIBUTING,
        attempt=message.attempt,
        vector=body.vector,
        measured=measured,
        parts_in=0,
    )
    return state, (Contribute(body.vector, body.sealed_ranges, body.heads),)


def _settle_replicas(state: State, message: Message) -> tuple[State, tuple[Action, ...]]:
    """After a step that all applied, and once: the first site lends its replica, the others may
    take it.
    """
    _expect(state, message, Phase.IDLE)
    here = (
        (message.round, message.attempt) == (state.round, state.attempt)
        and state.vector == "update"
        and state.round > 0
    )
    if not (here and state.steps) or state.settled == state.round:
        raise ProtocolError("the coordinator wants replicas to be settled where that is not due")
    lends = state.site == state.sites[0]
    if lends != isinstance(message.body, LendBody):
        raise ProtocolError("the coordinator sent a replica, or asked for one, at the wrong site")
    state = replace(state, settled=state.round)
    if lends:
        return state, (Lend(),)
    return replace(state, phase=Phase.WORKING), (Adopt(message.bulk),)


def _take_total(
    state: State, message: Message, blocks_of: Callable[[Vector], int]
) -> tuple[State, tuple[Action, ...]]:
    _expect(state, message, Phase.SUMMING)
    blocks = blocks_of(state.vector)
    if (
        (message.round, message.attempt) != (state.round, state.attempt)
        or message.parts != blocks
        or message.part != state.parts_in
    ):
        raise ProtocolError(
            f"the coordinator sent part {message.part} of {message.parts} of a total, expected "
            f"part {state.parts_in} of {blocks}"
        )
    collect = Collect(message.part, message.bulk)
    if message.part + 1 < blocks:
        return replace(state, parts_in=message.part + 1), (collect,)
    return replace(state, phase=Phase.WORKING), (collect, Combine(state.vector))

"""What the coordinator of a run knows and can ask for: the words in which its protocol is
written.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from privfl.errors import ProtocolError
from privfl.federation.messages import (
    Begin,
    Body,
    Hello,
    Message,
    Prepared,
    Signed,
    Trained,
    Vector,
)
from privfl.federation.news import News, RunFailed


class Phase(enum.Enum):
    """What the coordinator waits for."""

    GREETING = "greeting"
    SIGNING = "signing"
    PREPARING = "preparing"
    TRAINING = "training"
    SUMMING = "summing"
    APPLYING = "applying"
    SETTLING = "settling"
    MEASURING = "measuring"
    FINISHING = "finishing"
    ENDED = "ended"


@dataclass(frozen=True)
class Plan:
    """What does not change during a run.

    ``shared_noise`` says that every site adds a share of one noise, so that they must agree on how
    much; ``blocks`` gives the number of blocks of a vector of so many numbers; ``path`` whether
    contributions come as messages ('star') or the transport adds them ('reduce'), of which each
    site then only says that it has handed over its part.
    """

    run: bytes
    folder: str
    digest: str
    versions: Mapping[str, str]
    sites: tuple[str, ...]
    rounds: int
    evaluate_every: int
    weights: Literal["uniform", "records"]
    shared_noise: bool
    blocks: Callable[[Vector, int], int]
    path: Literal["star", "reduce"] = "star"
    user: str = ""


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
    adopting: tuple[str, ...] = ()

    def site(self, rank: int) -> str:
        """The name under which the rank introduced itself, or a description if it has not."""
        hello = self.hellos.get(rank)
        return hello.site if hello is not None and hello.site else f"of rank {rank}"


class Send(NamedTuple):
    """Send ``message`` to ``rank``."""

    rank: int
    message: Message


class SetAdder(NamedTuple):
    """Make the adder of this run: of words, or of ciphertexts where the sites have not proven
    that words add up.
    """

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
    """Tell a person and the run folder."""

    news: News


Output = Send | SetAdder | OpenSum | Fold | Release | Dismiss | Tell
Result = tuple[State, tuple[Output, ...]]


def fail(state: State, error: str, exit_code: int) -> Result:
    """Stop the run with one sentence."""
    return end(state, exit_code, RunFailed(error, state.round))


def end(state: State, exit_code: int, news: News) -> Result:
    """End the run, and say what happened."""
    return replace(state, phase=Phase.ENDED), (Tell(news), Dismiss(exit_code))


def ranks(plan: Plan) -> range:
    """The ranks of the sites."""
    return range(1, len(plan.sites) + 1)


def to_all(plan: Plan, state: State, body: Body) -> tuple[Output, ...]:
    """``body`` for every site."""
    message = Message.of(body, plan.run, state.round, state.attempt)
    return tuple(Send(rank, message) for rank in ranks(plan))


def expect(state: State, rank: int, phase: Phase, what: str) -> None:
    """Refuse ``what`` in any other phase."""
    if state.phase is not phase:
        raise ProtocolError(
            f"site {state.site(rank)} sent {what} while the coordinator was {state.phase.value}"
        )


def rank_of(state: State, site: str) -> int:
    """The rank of this site."""
    return next(rank for rank, hello in state.hellos.items() if hello.site == site)

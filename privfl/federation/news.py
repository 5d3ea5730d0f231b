"""What the coordinator of a run has to tell a person and the run folder, as data.

Dictionaries are keyed by site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Greeted:
    """All sites are there, and the run exists."""


@dataclass(frozen=True)
class ReadySite:
    """What a site said of itself before the first round.

    Attributes:
        records: training records.
        weight: its part of the mean; the weights of all sites add up to 1.
        noise_multiplier: of a training step, against the charged adversary.
        sampling_rate: q of Poisson sampling.
        planned_epsilon: of its training records at the end of the run.
        evaluation_epsilon: of its evaluation records at the end of the run.
        metrics_noise: the noise of its metrics, in units of what one record can change; 0 without
            noise.
        accountant: the one by which its epsilons are meant.
        ledger: whether it keeps a ledger across runs, and whether that begins with this run.
        rules: its site file, as it names it; None without one.
        outside: what its data() says that no epsilon covers.
    """

    records: int
    weight: float
    noise_multiplier: float
    sampling_rate: float
    planned_epsilon: float
    evaluation_epsilon: float
    metrics_noise: float
    accountant: Literal["rdp", "filter"]
    ledger: Literal["none", "new", "kept"]
    rules: str | None
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """Everybody is prepared and has agreed.

    Attributes:
        parameters: trainable parameters of the model.
        sites: what each said of itself.
        words_add: whether all sites have proven that ciphertexts add up as words.
        pinned: the sites that have pinned the identities of all others.
        separate_users: whether every site and the coordinator run under accounts of their own.
    """

    parameters: int
    sites: Mapping[str, ReadySite]
    words_add: bool
    pinned: tuple[str, ...]
    separate_users: bool


@dataclass(frozen=True)
class EvaluationCost:
    """What metrics of a round cost a site's evaluation records: the mechanism event, and epsilon
    so far.
    """

    event: Mapping[str, Any]
    epsilon: float


@dataclass(frozen=True)
class SiteRound:
    """One site's part of a round: the mechanism event, its steps and epsilon so far, and the
    signed head of its ledger.
    """

    event: Mapping[str, Any]
    steps: int
    epsilon: float
    head: Mapping[str, Any]
    evaluation: EvaluationCost | None


@dataclass(frozen=True)
class RoundDone:
    """A round is over; ``adopted`` are the sites that took the first site's replica, from which
    theirs differed by rounding.
    """

    round: int
    members: tuple[str, ...]
    metrics: Mapping[str, float]
    sites: Mapping[str, SiteRound]
    adopted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outputs:
    """Paths on a site's own machine."""

    model: str
    log: str


@dataclass(frozen=True)
class RunFinished:
    """All rounds are done and every site has written its model."""

    sites: Mapping[str, Outputs]


@dataclass(frozen=True)
class RunFailed:
    """The run ends with one sentence."""

    error: str
    round: int


News = Greeted | Started | RoundDone | RunFinished | RunFailed

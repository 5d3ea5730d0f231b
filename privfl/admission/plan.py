"""What a run would need and cost at one site: noise, steps, and the limits it is charged against.

Policy is not looked at here, and no record is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import (
    ACCOUNTS,
    LARGEST_NOISE_MULTIPLIER,
    Account,
    DiscreteGaussian,
    Event,
    Gaussian,
    MetricRelease,
    PoissonGaussian,
    RenyiFilter,
    epsilon_of,
    least_noise_multiplier,
)
from privfl.config import Budget, Experiment, SiteFile
from privfl.errors import InternalError, PrivflError, ProtocolError
from privfl.ledger import Head, Ledger, RunFacts
from privfl.noise.distributed import SENSITIVITY
from privfl.secagg import FixedPoint, Parameters
from privfl.secagg.parameters import parameters_for

Steps = PoissonGaussian | DiscreteGaussian
_Plan = TypeVar("_Plan", PoissonGaussian | DiscreteGaussian, MetricRelease)

# The limit of one run alone is its plan, and this fraction of it more: sums of floating-point
# numbers are rounded.
ROUNDING = 1e-9


@dataclass(frozen=True)
class RunPlan:
    """The plan of one run at one site, and the limits it is charged against.

    Attributes:
        training: all training steps of the run.
        metrics: all releases of metrics with noise; None if there are none.
        filters: the limits of the ledger, by account: the site's own budget, or the plan itself
            where no ledger is kept across runs. Empty if nothing of the run is private.
        spent: what earlier runs have charged, by account, as divergences of shape (orders,); empty
            without a ledger.
        head: the head of the ledger when it was read; None without a ledger, or if the ledger
            begins with this run.
        kept: whether a ledger is kept across runs.
        delta: the delta at which the run's epsilons are given.
    """

    training: PoissonGaussian | DiscreteGaussian
    metrics: MetricRelease | None
    filters: dict[Account, RenyiFilter]
    spent: dict[Account, NDArray[np.float64]]
    head: Head | None
    kept: bool
    delta: float

    @property
    def new(self) -> bool:
        """Whether a ledger that is kept across runs begins with this one."""
        return self.kept and self.head is None

    @property
    def accountant(self) -> Literal["rdp", "filter"]:
        """The accountant that admits the run."""
        return "filter" if self.kept else "rdp"

    def plans(self) -> dict[Account, Event]:
        """All that is to be charged in the whole run, by account."""
        plans: dict[Account, Event] = {"training": self.training}
        return plans if self.metrics is None else {**plans, "evaluation": self.metrics}

    def with_noise(self, noise_multiplier: float) -> RunPlan:
        """The same plan with the noise multiplier of training on which the sites agreed.

        Raises:
            ProtocolError: If ``noise_multiplier`` is less than this site needs, or not finite.
        """
        if not self.training.noise_multiplier <= noise_multiplier < math.inf:
            raise ProtocolError(
                f"the coordinator began a run with noise multiplier {noise_multiplier:g}, this "
                f"site needs {self.training.noise_multiplier:g}"
            )
        return replace(self, training=replace(self.training, noise_multiplier=noise_multiplier))

    def epsilon(self, account: Account, events: Sequence[Event]) -> float:
        """Epsilon of a part of this run, at the delta of the run, by the accountant that admits
        the run.
        """
        if not self.kept:
            return epsilon_of(events, self.delta).upper
        limit = self.filters[account]
        return limit.epsilon_of(
            sum((limit.cost(event) for event in events), limit.nothing()), self.delta
        )

    @property
    def planned_epsilon(self) -> float:
        """Epsilon of the training records at the end of the run."""
        return self.epsilon("training", [self.training])


def plan_run(site: str, experiment: Experiment, file: SiteFile) -> RunPlan:
    """What the run would need and cost, whether or not it would be admitted.

    Raises:
        PrivflError: If a target cannot be reached, if the noise gives no finite epsilon, or if the
            ledger cannot be used.
    """
    privacy, delta = experiment.privacy, experiment.privacy.delta
    ledger = _LedgerState.of(site, file)
    training, metrics = training_steps(site, experiment), metric_releases(experiment)

    # Shared noise must be enough for the site that needs most, which is one with the largest rate.
    neediest = site if privacy.noise == "site" else max(experiment.sites, key=experiment.rate)

    def calibrated(limit: RenyiFilter | None) -> Steps:
        plan = training_steps(neediest, experiment)
        noise = _calibrated(
            "privacy", plan, privacy.target_epsilon, privacy.noise_multiplier, delta, limit
        ).noise_multiplier
        return training(noise)

    # The limits of a ledger that begins with this run are planned for the noise that the run would
    # need without a ledger.
    filters = ledger.filters or (
        limits_of(file.budget.epsilon, file.budget.delta, calibrated(None))
        if file.budget is not None
        else {}
    )
    plan = calibrated(filters.get("training"))
    release = None
    if experiment.metric_releases and experiment.evaluation.records == "private":
        release = _calibrated(
            "evaluation", metrics, experiment.metrics_target, None, delta, filters.get("evaluation")
        )
    kept = bool(filters)
    if not kept and experiment.private:
        plans: dict[Account, Event | None] = {"training": plan, "evaluation": release}
        filters = {
            account: _alone(event, delta) for account, event in plans.items() if event is not None
        }
    return RunPlan(plan, release, filters, ledger.spent, ledger.head, kept, delta)


def training_steps(site: str, experiment: Experiment) -> Callable[[float], Steps]:
    """A function from a noise multiplier to all training steps of the run, as they are charged.

    With distributed noise the noise multiplier stands against ``collusion`` sites that pool what
    they see, and that is what is charged: for every site, others may be that coalition.
    """
    rate, steps = experiment.rate(site), experiment.steps

    def plan(noise: float) -> Steps:
        if experiment.privacy.noise == "site":
            return PoissonGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps)
        return DiscreteGaussian(
            sampling_rate=rate, noise_multiplier=noise, sensitivity=SENSITIVITY, steps=steps
        )

    return plan


def metric_releases(experiment: Experiment) -> Callable[[float], MetricRelease]:
    """A function from a noise multiplier to all releases of metrics, as they are charged."""

    def plan(noise: float) -> MetricRelease:
        names = tuple(sorted(experiment.evaluation.metrics))
        return MetricRelease(
            metrics=names, noise_multiplier=noise, steps=experiment.metric_releases
        )

    return plan


@dataclass(frozen=True)
class _LedgerState:
    """A site's ledger before a run: its limits, what was spent, and its head; all empty if the
    ledger has not begun.
    """

    filters: dict[Account, RenyiFilter] = field(default_factory=dict)
    spent: dict[Account, NDArray[np.float64]] = field(default_factory=dict)
    head: Head | None = None

    @classmethod
    def of(cls, site: str, file: SiteFile) -> _LedgerState:
        """The state of the ledger that the site file names."""
        if file.budget is None or file.ledger is None:
            return cls()
        path = Path(file.ledger.file)
        if not path.parent.is_dir():
            raise PrivflError(
                f"the folder {path.parent} for the ledger of site {site} does not exist; make it, "
                "or correct ledger in the site file"
            )
        ledger = Ledger.look(path)
        if ledger is None:
            return cls()
        with ledger:
            _check_ledger(site, file.budget, ledger)
            return cls(
                ledger.filters,
                {account: ledger.spent(account) for account in ledger.filters},
                ledger.head,
            )


def _check_ledger(site: str, budget: Budget, ledger: Ledger) -> None:
    """Check that the ledger is this site's, and was begun with this budget."""
    if ledger.site != site:
        raise PrivflError(
            f"the ledger {ledger.path} belongs to site {ledger.site}, not to {site}; name another "
            "file"
        )
    if set(ledger.filters) != set(ACCOUNTS):
        raise PrivflError(
            f"the ledger {ledger.path} was written for a single run and has no limits for the "
            f"budget of site {site}; name another file"
        )
    for limit in ledger.filters.values():
        if (limit.epsilon, limit.delta) != (budget.epsilon, budget.delta):
            raise PrivflError(
                f"the ledger {ledger.path} was begun with the budget epsilon {limit.epsilon:g} at "
                f"delta {limit.delta:g}, the file of site {site} says epsilon {budget.epsilon:g} "
                f"at delta {budget.delta:g}: a budget cannot be changed; set the old one again, or "
                "begin a new ledger and add both budgets up"
            )


def limits_of(epsilon: float, delta: float, plan: Event) -> dict[Account, RenyiFilter]:
    """The limits of a ledger with this budget, by account, whose first run is ``plan``.

    Raises:
        ValueError: If ``epsilon`` is not positive and finite, or ``delta`` not between 0 and 1.
    """
    return {
        "training": RenyiFilter.planned(epsilon, delta, plan),
        # Releases of metrics are not sampled, so the same order is the best for any noise.
        "evaluation": RenyiFilter.planned(epsilon, delta, Gaussian(noise_multiplier=1.0)),
    }


def _calibrated(
    section: str,
    plan: Callable[[float], _Plan],
    target: float | None,
    noise: float | None,
    delta: float,
    limit: RenyiFilter | None,
) -> _Plan:
    """The plan with this noise multiplier, or with the least one that meets the target: by the
    filter if there is one, else by RDP.
    """

    def epsilon(noise: float) -> float:
        event = plan(noise)
        return (
            epsilon_of([event], delta).upper
            if limit is None
            else limit.epsilon_of(limit.cost(event), delta)
        )

    if noise is None:
        if target is None:
            raise InternalError(
                "an experiment without a target and without a noise multiplier passed validation"
            )
        noise = least_noise_multiplier(epsilon, target)
    if noise is None:
        where = (
            ""
            if limit is None
            else f" by the filter of a ledger with a budget of epsilon {limit.epsilon:g}"
        )
        raise PrivflError(
            f"{section}.target_epsilon {target:g} cannot be reached at delta {delta:g} with "
            f"{plan(1.0).steps} steps: noise of {LARGEST_NOISE_MULTIPLIER:g} times the clipping "
            "norm, which leaves nothing to learn, still costs "
            f"{epsilon(LARGEST_NOISE_MULTIPLIER):.3g}{where}; raise target_epsilon, or lower "
            "rounds, local_steps or sampling_rate"
        )
    if not math.isfinite(epsilon(noise)):
        raise PrivflError(f"{section}.noise_multiplier {noise:g} gives no finite epsilon; raise it")
    return plan(noise)


def _alone(plan: Event, delta: float) -> RenyiFilter:
    """The limit of a ledger for one run: the plan, fixed in advance, and nothing more."""
    epsilon = epsilon_of([plan], delta).upper
    return RenyiFilter.single(max(epsilon * (1.0 + ROUNDING), ROUNDING), delta, plan)


def run_facts(
    experiment: Experiment,
    plans: Mapping[Account, Event],
    *,
    kept: bool,
    outside: Sequence[str],
    members: Mapping[str, str],
    records_per_person: int = 1,
    identity: str = "",
    pinned: bool = False,
) -> RunFacts:
    """What a ledger or a report says of a run of ``experiment``.

    Args:
        experiment: what the sites have agreed to do.
        plans: what the whole run is to be charged, by account.
        kept: whether a ledger is kept across runs.
        outside: what data() says that no epsilon covers.
        members: the public identity of every site, by site; empty where it is not known.
        records_per_person: how many records one person has at most.
        identity: the public identity of the site that says so; empty for rank 0.
        pinned: whether that site has pinned the identities of all others.
    """
    exact = experiment.evaluation.metrics if experiment.evaluation.records == "public" else ()
    return RunFacts(
        experiment=experiment.digest(),
        model=experiment.model,
        data=experiment.data,
        rounds=experiment.rounds,
        noise=experiment.privacy.noise,
        collusion=experiment.collusion,
        delta=experiment.privacy.delta,
        target_epsilon=experiment.privacy.target_epsilon,
        private=experiment.private,
        plans=dict(plans),
        exact_metrics=tuple(sorted(exact)),
        outside=tuple(outside),
        records_per_person=records_per_person,
        identity=identity,
        pinned=pinned,
        kept=kept,
        members=dict(members),
    )


def parameters_of(experiment: Experiment) -> Parameters:
    """The parameters of the experiment's encrypted sums.

    Raises:
        PrivflError: If values of so many bits cannot be summed over so many sites.
    """
    chosen = experiment.secure_aggregation
    try:
        parameters = parameters_for(len(experiment.sites), chosen.value_bits, chosen.path)
        if isinstance(chosen.range, float) and experiment.algorithm == "fedavg":
            FixedPoint(parameters, chosen.range)
    except PrivflError as error:
        raise PrivflError(f"secure_aggregation: {error}") from error
    return parameters

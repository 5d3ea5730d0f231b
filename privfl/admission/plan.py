"""What one site lets one run spend, and whether its policy lets the run happen at all: decided before a record is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from privfl.ledger import BudgetError, Head, Ledger
from privfl.noise.distributed import SENSITIVITY

# Whoever sets one of these wants protection, which a known seed takes away.
_POLICY = {
    "attempts",
    "budget",
    "exact_metrics",
    "least_collusion",
    "least_noise_multiplier",
    "least_sites",
    "ledger",
    "metrics",
    "peers",
    "records_per_person",
    "require",
}
# And whoever sets one of these does not want metrics without noise, unless named.
_NOISE_RULES = {"budget", "least_noise_multiplier", "ledger", "metrics"}
_Steps = PoissonGaussian | DiscreteGaussian
_Plan = TypeVar("_Plan", PoissonGaussian | DiscreteGaussian, MetricRelease)

# A budget for one run alone is its plan and a hair, for sums of floating-point numbers.
_HAIR = 1e-9


@dataclass(frozen=True)
class Allowance:
    """The plan of one run at one site, and the limits it is charged against.

    Attributes:
        training: all steps of the run.
        metrics: all releases of held-out metrics with noise, if there are any.
        filters: the limits of the book: the site's own budget, or the plan itself where no book is kept across runs.
        spent: what earlier runs have charged, by account; empty without a book.
        head: of the ledger when it was looked at; None without one, or if it begins with this run.
        kept: whether a book is kept across runs.
        delta: at which the run's epsilons are given.
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
        """Whether a book that is kept begins with this run."""
        return self.kept and self.head is None

    @property
    def accountant(self) -> Literal["rdp", "filter"]:
        """The accountant that admits the run."""
        return "filter" if self.kept else "rdp"

    def plans(self) -> dict[Account, Event]:
        """What is to be charged in the whole run, by account."""
        found: dict[Account, Event] = {"training": self.training}
        return found if self.metrics is None else {**found, "evaluation": self.metrics}

    def with_noise(self, noise_multiplier: float) -> Allowance:
        """The same with the noise multiplier of training on which the sites agreed.

        Raises:
            ProtocolError: it is less than this site needs.
        """
        if not self.training.noise_multiplier <= noise_multiplier < math.inf:
            raise ProtocolError(
                f"the coordinator began a run with noise multiplier {noise_multiplier:g}, this site needs {self.training.noise_multiplier:g}"
            )
        return replace(self, training=replace(self.training, noise_multiplier=noise_multiplier))

    def epsilon(self, account: Account, events: Sequence[Event]) -> float:
        """Epsilon of a part of this run, at its own delta, in the accountant that admits it."""
        if not self.kept:
            return epsilon_of(events, self.delta).upper
        limit = self.filters[account]
        return limit.epsilon_of(sum((limit.cost(event) for event in events), limit.nothing()), self.delta)

    @property
    def planned_epsilon(self) -> float:
        """Epsilon of the training records at the end of the run."""
        return self.epsilon("training", [self.training])


def _refusal(site: str, key: str, what: str) -> PrivflError:
    return PrivflError(f"the policy of site {site} refuses this experiment ({key} in its site file): {what}")


def check_members(site: str, experiment: Experiment, file: SiteFile, members: int) -> None:
    """Whether a sum of so many sites is large enough for the policy, and its noise for their coalitions.

    Raises:
        PrivflError: it is not; with how many would pass.
    """
    if members < file.least_sites:
        raise _refusal(site, "least_sites", f"it has {members} sites, at least {file.least_sites} would pass")
    if experiment.privacy.noise == "distributed" and file.least_collusion > experiment.collusion:
        raise _refusal(
            site,
            "least_collusion",
            f"privacy.collusion is {experiment.collusion}, so {file.least_collusion} sites could subtract more of the noise than that allows for; "
            f"privacy.collusion {file.least_collusion} would pass",
        )
    if file.least_collusion and members < file.least_collusion + 2:
        raise _refusal(
            site,
            "least_collusion",
            f"with {members} sites, {file.least_collusion} that pool what they see would see this site's updates alone; "
            f"at least {file.least_collusion + 2} sites would pass",
        )


def check_policy(site: str, experiment: Experiment, file: SiteFile) -> None:
    """Hold the proposal against everything of the site's policy that needs no accountant.

    Raises:
        PrivflError: the first rule that the proposal breaks, with what would pass.
    """

    def refuse(key: str, what: str) -> PrivflError:
        return _refusal(site, key, what)

    check_members(site, experiment, file, len(experiment.sites))
    policy = sorted(file.model_fields_set & _POLICY)
    if experiment.evaluate_every:
        names = experiment.evaluation.metrics
        if file.metrics is not None and set(names) - set(file.metrics):
            others = ", ".join(sorted(set(names) - set(file.metrics)))
            raise refuse("metrics", f"{others} would leave; allow it there, or take it out of evaluation.metrics")
        exact = file.exact_metrics
        if exact is None:
            exact = () if file.model_fields_set & _NOISE_RULES else tuple(names)
        others = ", ".join(name for name in names if name not in exact)
        if experiment.evaluation.records == "public" and others:
            raise refuse(
                "exact_metrics",
                f"{others} would leave without noise (evaluation.records: public); allow it there, or say evaluation.records: private",
            )
    if file.budget is not None and experiment.privacy.delta > file.budget.delta:
        raise refuse(
            "budget", f"privacy.delta is {experiment.privacy.delta:g}, at most the budget's {file.budget.delta:g} would pass"
        )
    if not experiment.private and policy:
        raise refuse(policy[0], "insecure_test_seed is set, with which nothing is private; remove it")


def allow(site: str, experiment: Experiment, file: SiteFile) -> Allowance:
    """The noise this site needs, and the limits it is held to, if its policy and its budget let the run happen.

    Raises:
        PrivflError: a target that cannot be reached, noise that bounds nothing, or a policy or budget that the experiment breaks, with
            what would pass.
    """
    check_policy(site, experiment, file)
    found = propose(site, experiment, file)
    check_noise(site, experiment, file, found)
    check_room(site, experiment, file, found)
    return found


def propose(site: str, experiment: Experiment, file: SiteFile) -> Allowance:
    """What the run would need and cost, whether or not it is let happen.

    Raises:
        PrivflError: a target that cannot be reached, noise that bounds nothing, or a ledger that cannot be used.
    """
    privacy, delta, book = experiment.privacy, experiment.privacy.delta, _Book.of(site, file)
    training, metrics = training_steps(site, experiment), _metrics(experiment)

    # Shares of one noise must do for the site that needs most, which is one with the largest rate.
    neediest = site if privacy.noise == "site" else max(experiment.sites, key=experiment.rate)

    def calibrated(limit: RenyiFilter | None) -> _Steps:
        plan = training_steps(neediest, experiment)
        noise = _calibrated("privacy", plan, privacy.target_epsilon, privacy.noise_multiplier, delta, limit).noise_multiplier
        return training(noise)

    # A book that is still to begin is planned for the noise that the run would need without one.
    filters = book.filters or (
        limits_of(file.budget.epsilon, file.budget.delta, calibrated(None)) if file.budget is not None else {}
    )
    plan = calibrated(filters.get("training"))
    release = None
    if experiment.metric_releases and experiment.evaluation.records == "private":
        release = _calibrated("evaluation", metrics, experiment.metrics_target, None, delta, filters.get("evaluation"))
    kept = bool(filters)
    if not kept and experiment.private:
        plans: dict[Account, Event | None] = {"training": plan, "evaluation": release}
        filters = {account: _alone(event, delta) for account, event in plans.items() if event is not None}
    return Allowance(plan, release, filters, book.spent, book.head, kept, delta)


def training_steps(site: str, experiment: Experiment) -> Callable[[float], _Steps]:
    """From a noise multiplier to all steps of the run, as they are charged.

    With distributed noise that is the view of ``collusion`` sites, which the noise multiplier is meant for: to every site, the others may be that
    coalition.
    """
    rate, steps = experiment.rate(site), experiment.steps

    def plan(noise: float) -> _Steps:
        if experiment.privacy.noise == "site":
            return PoissonGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps)
        return DiscreteGaussian(sampling_rate=rate, noise_multiplier=noise, sensitivity=SENSITIVITY, steps=steps)

    return plan


def _metrics(experiment: Experiment) -> Callable[[float], MetricRelease]:
    """From a noise multiplier to all releases of held-out metrics."""

    def plan(noise: float) -> MetricRelease:
        names = tuple(sorted(experiment.evaluation.metrics))
        return MetricRelease(metrics=names, noise_multiplier=noise, steps=experiment.metric_releases)

    return plan


@dataclass(frozen=True)
class _Book:
    """What a site's ledger says before a run: the limits it fixed, what was spent, and its head; nothing if it has not begun."""

    filters: dict[Account, RenyiFilter] = field(default_factory=dict)
    spent: dict[Account, NDArray[np.float64]] = field(default_factory=dict)
    head: Head | None = None

    @classmethod
    def of(cls, site: str, file: SiteFile) -> _Book:
        if file.budget is None or file.ledger is None:
            return cls()
        path = Path(file.ledger.file)
        if not path.parent.is_dir():
            raise PrivflError(
                f"the folder {path.parent} for the ledger of site {site} does not exist; make it, or correct ledger in the site file"
            )
        found = Ledger.look(path)
        if found is None:
            return cls()
        with found as ledger:
            _check_book(site, file.budget, ledger)
            return cls(ledger.filters, {account: ledger.spent(account) for account in ledger.filters}, ledger.head)


def _check_book(site: str, budget: Budget, ledger: Ledger) -> None:
    """Whether the ledger is this site's, and was begun with this budget."""
    if ledger.site != site:
        raise PrivflError(f"the ledger {ledger.path} is the book of site {ledger.site}, not of {site}; name another file")
    if set(ledger.filters) != set(ACCOUNTS):
        raise PrivflError(
            f"the ledger {ledger.path} is the book of a single run and has no limits for the budget of site {site}; name another file"
        )
    for limit in ledger.filters.values():
        if (limit.epsilon, limit.delta) != (budget.epsilon, budget.delta):
            raise PrivflError(
                f"the ledger {ledger.path} was begun with the budget epsilon {limit.epsilon:g} at delta {limit.delta:g}, the file of site {site} "
                f"says epsilon {budget.epsilon:g} at delta {budget.delta:g}: a budget cannot be changed; go back to the old one, or begin a new "
                "ledger and add both budgets up"
            )


def limits_of(epsilon: float, delta: float, plan: Event) -> dict[Account, RenyiFilter]:
    """The limits of a book with this budget that begins with ``plan``."""
    return {
        "training": RenyiFilter.planned(epsilon, delta, plan),
        # Releases of metrics are not sampled, so that one order is the best for any noise.
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
    """The plan with the given noise multiplier, or with the least one that meets the target, by the filter if there is one, else by RDP."""

    def epsilon(noise: float) -> float:
        event = plan(noise)
        return epsilon_of([event], delta).upper if limit is None else limit.epsilon_of(limit.cost(event), delta)

    if noise is None:
        if target is None:
            raise InternalError("an experiment without a target and without a noise multiplier passed validation")
        noise = least_noise_multiplier(epsilon, target)
    if noise is None:
        raise PrivflError(
            f"{section}.target_epsilon {target:g} cannot be reached at delta {delta:g} with {plan(1.0).steps} steps: noise of "
            f"{LARGEST_NOISE_MULTIPLIER:g} times the clipping norm, which leaves nothing to learn, still costs "
            f"{epsilon(LARGEST_NOISE_MULTIPLIER):.3g}{'' if limit is None else ' in a ledger with so large a budget'}; raise target_epsilon, or "
            "lower rounds, local_steps or sampling_rate"
        )
    if not math.isfinite(epsilon(noise)):
        raise PrivflError(f"{section}.noise_multiplier {noise:g} is too little for any finite epsilon; raise it")
    return plan(noise)


def _alone(plan: Event, delta: float) -> RenyiFilter:
    """The limit of a book for one run: its plan, fixed in advance, and nothing more."""
    epsilon = epsilon_of([plan], delta).upper
    return RenyiFilter.single(max(epsilon * (1.0 + _HAIR), _HAIR), delta, plan)


def check_noise(site: str, experiment: Experiment, file: SiteFile, found: Allowance) -> None:
    """Whether the policy is content with the noise.

    Raises:
        PrivflError: it is too little; with how much would pass.
    """
    least = file.least_noise_multiplier
    if least is not None and found.metrics is not None and found.metrics.noise_multiplier < least:
        enough = _down(found.epsilon("evaluation", [_metrics(experiment)(least)]))
        noise = _plain(found.metrics.noise_multiplier)
        what = f"the noise multiplier of its metrics is {noise}; evaluation.target_epsilon of at most {enough} would pass"
        raise _refusal(site, "least_noise_multiplier", what)
    if least is not None and found.training.noise_multiplier < least:
        enough = _down(found.epsilon("training", [training_steps(site, experiment)(least)]))
        what = f"at least {least:g} would pass, as with a target_epsilon of at most {enough}"
        raise _refusal(site, "least_noise_multiplier", f"its noise multiplier is {found.training.noise_multiplier:g}; {what}")


@dataclass(frozen=True)
class Room:
    """How a plan fits into what is left of a budget.

    Attributes:
        times: rounds, or releases of metrics, in the plan.
        fit: how many of them fit.
        spent, after: epsilon before the run and at its end.
    """

    times: int
    fit: int
    spent: float
    after: float

    @property
    def enough(self) -> bool:
        return self.fit >= self.times


def room(experiment: Experiment, found: Allowance, account: Account) -> Room:
    """How the run fits into what is left for this account."""
    times = experiment.rounds if account == "training" else experiment.metric_releases
    limit, event = found.filters[account], found.plans()[account]
    spent = found.spent.get(account, limit.nothing())
    total = spent + limit.cost(event)
    part = limit.cost(event.times(event.steps // times))
    fit = times if limit.admits_plan(total) else min(times - 1, limit.times(spent, part))
    return Room(times, fit, limit.epsilon_of(spent), limit.epsilon_of(total))


def noise_that_fits(site: str, experiment: Experiment, found: Allowance, account: Account) -> tuple[float, float] | None:
    """(the least noise multiplier with which all of the run fits, the run's epsilon with it); None if none is enough."""
    plan: Callable[[float], Event] = training_steps(site, experiment) if account == "training" else _metrics(experiment)
    limit = found.filters[account]
    spent = found.spent.get(account, limit.nothing())

    def after(noise: float) -> float:
        total = spent + limit.cost(plan(noise))
        epsilon = limit.epsilon_of(total)
        # The rule of admission has the last word, to the last bit.
        return epsilon if limit.admits_plan(total) else max(epsilon, limit.epsilon * (1.0 + _HAIR))

    noise = least_noise_multiplier(after, limit.epsilon)
    return None if noise is None else (noise, found.epsilon(account, [plan(noise)]))


def check_room(site: str, experiment: Experiment, file: SiteFile, found: Allowance) -> None:
    """Whether the whole run fits into what is left of the budget.

    Raises:
        BudgetError: it does not; with how much of it would.
    """
    if not found.kept:
        return
    for account, event in found.plans().items():
        left, limit = room(experiment, found, account), found.filters[account]
        if left.enough:
            continue
        what, section = ("rounds", "privacy") if account == "training" else ("releases of metrics", "evaluation")
        others, way_out = "", noise_that_fits(site, experiment, found, account)
        if way_out is not None:
            noise, target = way_out
            others = f", all of them with {section}.target_epsilon {_down(target)}"
            others += f" or privacy.noise_multiplier {_plain(noise)}" if account == "training" else ""
        room_for = f"{left.fit} of the {left.times} {what} of this experiment would fit at noise multiplier {_plain(event.noise)}{others}"
        raise BudgetError(
            f"the budget of site {site} allows epsilon {limit.epsilon:g} at delta {limit.delta:g} for its {account} records, of which "
            f"{left.spent:.4g} is spent: {room_for} (ledger {file.ledger.file if file.ledger else ''})"
        )


def _plain(noise: float) -> str:
    """All four decimals of a noise multiplier, so that the value on screen is the value that passes."""
    return f"{noise:.4f}".rstrip("0").rstrip(".")


def _down(epsilon: float) -> str:
    """Four decimals, never more than the true value."""
    return f"{math.floor(epsilon * 1e4) / 1e4:g}"

"""Does a planned run fit a site's policy and what is left of its budget, and if not, what would
pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from privfl.accounting import Account, Event, least_noise_multiplier
from privfl.admission.plan import ROUNDING, RunPlan, metric_releases, plan_run, training_steps
from privfl.admission.policy import check_policy, refusal
from privfl.config import Experiment, SiteFile
from privfl.errors import BudgetError


def admit(site: str, experiment: Experiment, file: SiteFile) -> RunPlan:
    """The noise this site needs, and the limits it is held to, if its policy and its budget let
    the run happen.

    Raises:
        PrivflError: If a target cannot be reached, the noise bounds nothing, or the experiment
            breaks the policy or the budget; the sentence says what would pass.
    """
    check_policy(site, experiment, file)
    plan = plan_run(site, experiment, file)
    check_noise(site, experiment, file, plan)
    check_budget(site, experiment, file, plan)
    return plan


def check_noise(site: str, experiment: Experiment, file: SiteFile, plan: RunPlan) -> None:
    """Whether the policy is content with the noise.

    Raises:
        PrivflError: If the noise is less than the policy asks for; the sentence says how much would
            pass.
    """
    least = file.least_noise_multiplier
    if least is not None and plan.metrics is not None and plan.metrics.noise_multiplier < least:
        enough = _down(plan.epsilon("evaluation", [metric_releases(experiment)(least)]))
        noise = _plain(plan.metrics.noise_multiplier)
        what = (
            f"the noise multiplier of its metrics is {noise}; evaluation.target_epsilon of at "
            f"most {enough} would pass"
        )
        raise refusal(site, "least_noise_multiplier", what)
    if least is not None and plan.training.noise_multiplier < least:
        enough = _down(plan.epsilon("training", [training_steps(site, experiment)(least)]))
        what = f"at least {least:g} would pass, as with a target_epsilon of at most {enough}"
        raise refusal(
            site,
            "least_noise_multiplier",
            f"its noise multiplier is {plan.training.noise_multiplier:g}; {what}",
        )


@dataclass(frozen=True)
class BudgetFit:
    """How a plan fits into what is left of a budget.

    Attributes:
        times: rounds, or releases of metrics, in the plan.
        fitting: how many of them fit.
        spent: epsilon before the run.
        after: epsilon at the end of the run.
    """

    times: int
    fitting: int
    spent: float
    after: float

    @property
    def enough(self) -> bool:
        """Whether all of the plan fits."""
        return self.fitting >= self.times


def fit(experiment: Experiment, plan: RunPlan, account: Account) -> BudgetFit:
    """How the run fits into what is left for this account."""
    times = experiment.rounds if account == "training" else experiment.metric_releases
    limit, event = plan.filters[account], plan.plans()[account]
    spent = plan.spent.get(account, limit.nothing())
    total = spent + limit.cost(event)
    part = limit.cost(event.times(event.steps // times))
    fitting = times if limit.admits_plan(total) else min(times - 1, limit.times(spent, part))
    return BudgetFit(times, fitting, limit.epsilon_of(spent), limit.epsilon_of(total))


def least_noise_that_fits(
    site: str, experiment: Experiment, plan: RunPlan, account: Account
) -> tuple[float, float] | None:
    """The least noise that lets a run fit.

    Returns:
        (the least noise multiplier with which all of the run fits, the run's epsilon with it); None
        if no noise is enough.
    """
    event_of: Callable[[float], Event] = (
        training_steps(site, experiment) if account == "training" else metric_releases(experiment)
    )
    limit = plan.filters[account]
    spent = plan.spent.get(account, limit.nothing())

    def after(noise: float) -> float:
        total = spent + limit.cost(event_of(noise))
        epsilon = limit.epsilon_of(total)
        # The rule of admission has the last word, to the last bit.
        return (
            epsilon if limit.admits_plan(total) else max(epsilon, limit.epsilon * (1.0 + ROUNDING))
        )

    noise = least_noise_multiplier(after, limit.epsilon)
    return None if noise is None else (noise, plan.epsilon(account, [event_of(noise)]))


def check_budget(site: str, experiment: Experiment, file: SiteFile, plan: RunPlan) -> None:
    """Whether the whole run fits into what is left of the budget.

    Raises:
        BudgetError: If the run does not fit; the sentence says how much of it would.
    """
    if not plan.kept:
        return
    for account, event in plan.plans().items():
        budget, limit = fit(experiment, plan, account), plan.filters[account]
        if budget.enough:
            continue
        what, section = (
            ("rounds", "privacy")
            if account == "training"
            else ("releases of metrics", "evaluation")
        )
        alternatives, enough = "", least_noise_that_fits(site, experiment, plan, account)
        if enough is not None:
            noise, target = enough
            alternatives = f", all of them with {section}.target_epsilon {_down(target)}"
            alternatives += (
                f" or privacy.noise_multiplier {_plain(noise)}" if account == "training" else ""
            )
        fitting = (
            f"{budget.fitting} of the {budget.times} {what} of this experiment would fit at "
            f"noise multiplier {_plain(event.noise)}{alternatives}"
        )
        raise BudgetError(
            f"the budget of site {site} allows epsilon {limit.epsilon:g} at delta {limit.delta:g} "
            f"for its {account} records, of which "
            f"{budget.spent:.4g} is spent: {fitting} (ledger "
            f"{file.ledger.file if file.ledger else ''})"
        )


def _plain(noise: float) -> str:
    """All four decimals of a noise multiplier, so that the value on screen is the value that
    passes.
    """
    return f"{noise:.4f}".rstrip("0").rstrip(".")


def _down(epsilon: float) -> str:
    """Four decimals, never more than the true value."""
    return f"{math.floor(epsilon * 1e4) / 1e4:g}"

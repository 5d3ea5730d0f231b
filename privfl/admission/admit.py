"""Whether a planned run fits a site's policy and what is left of its budget; and if not, what would
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
    """The plan of a run at this site, if the site's policy and budget admit the run.

    Guarantee: A run that is admitted fits into what is left of the budget with all its rounds, if
        no other run is charged to the ledger meanwhile.

    Args:
        site: the site.
        experiment: what is proposed.
        file: the site's own file.

    Raises:
        PrivflError: If a target cannot be reached, if the noise gives no finite epsilon, or if the
            experiment breaks the policy; the sentence says what would pass.
        BudgetError: If the run does not fit into the budget; the sentence says what would fit.
    """
    check_policy(site, experiment, file)
    plan = plan_run(site, experiment, file)
    check_noise(site, experiment, file, plan)
    check_budget(site, experiment, file, plan)
    return plan


def check_noise(site: str, experiment: Experiment, file: SiteFile, plan: RunPlan) -> None:
    """Check that the noise is at least what the policy asks for.

    Raises:
        PrivflError: If the noise is less than the policy asks for; the sentence says how much would
            pass.
    """
    least = file.least_noise_multiplier
    if least is None:
        return
    if plan.metrics is not None and plan.metrics.noise_multiplier < least:
        target = _rounded_down(plan.epsilon("evaluation", [metric_releases(experiment)(least)]))
        raise refusal(
            site,
            "least_noise_multiplier",
            f"the noise multiplier of its metrics is {_four_decimals(plan.metrics.noise)}; an "
            f"evaluation.target_epsilon of at most {target} would pass",
        )
    if plan.training.noise_multiplier < least:
        target = _rounded_down(plan.epsilon("training", [training_steps(site, experiment)(least)]))
        raise refusal(
            site,
            "least_noise_multiplier",
            f"its noise multiplier is {plan.training.noise_multiplier:g}; at least {least:g} would "
            f"pass, as with a target_epsilon of at most {target}",
        )


@dataclass(frozen=True)
class BudgetFit:
    """How a plan fits into what is left of a budget.

    Attributes:
        times: how many rounds, or releases of metrics, are in the plan.
        fitting: how many of them fit.
        spent: the epsilon of the account before the run.
        after: the epsilon of the account at the end of the run.
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
    """How the run fits into what is left of this account's budget."""
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
    """The least noise with which all of a run fits into what is left of an account's budget.

    Returns:
        (that noise multiplier, the epsilon of the run with it); None if no noise is enough.
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
    """Check that the whole run fits into what is left of the budget.

    Raises:
        BudgetError: If the run does not fit; the sentence says how much of it would.
    """
    if not plan.kept:
        return
    for account, event in plan.plans().items():
        budget, limit = fit(experiment, plan, account), plan.filters[account]
        if budget.enough:
            continue
        training = account == "training"
        alternatives, enough = "", least_noise_that_fits(site, experiment, plan, account)
        if enough is not None:
            noise, epsilon = enough
            section, target = "privacy" if training else "evaluation", _rounded_down(epsilon)
            alternatives = f", all of them with {section}.target_epsilon {target}"
            if training:
                alternatives += f" or privacy.noise_multiplier {_four_decimals(noise)}"
        fitting = (
            f"{budget.fitting} of the {budget.times} "
            f"{'rounds' if training else 'releases of metrics'} of this experiment would fit at "
            f"noise multiplier {_four_decimals(event.noise)}{alternatives}"
        )
        raise BudgetError(
            f"the budget of site {site} allows epsilon {limit.epsilon:g} at delta {limit.delta:g} "
            f"for its {account} records, of which {budget.spent:.4g} is spent: {fitting} (ledger "
            f"{file.ledger.file if file.ledger else ''})"
        )


def _four_decimals(noise: float) -> str:
    """A noise multiplier as it was calibrated, so that the value on screen is the value that
    passes.
    """
    return f"{noise:.4f}".rstrip("0").rstrip(".")


def _rounded_down(epsilon: float) -> str:
    """An epsilon with four decimals, never more than its true value, so that it passes as a
    target.
    """
    return f"{math.floor(epsilon * 1e4) / 1e4:g}"

"""What a planned run would cost a site: over the rounds, for other choices, by adversary, in its
budget.

Everything here is JSON; an epsilon that nothing bounds is null.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from privfl.accounting import Event, RenyiFilter, adversaries, epsilon_of, person_epsilon
from privfl.admission.admit import fit, least_noise_that_fits
from privfl.admission.plan import RunPlan
from privfl.config import Experiment, SiteFile

# Around the plan: less and more noise, fewer and more rounds.
_NOISE = (0.5, 0.7, 1.0, 1.4, 2.0)
_ROUNDS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Points of the curve, less one.
_POINTS = 8


def forecast(site: str, experiment: Experiment, file: SiteFile, plan: RunPlan) -> dict[str, Any]:
    """What `privfl plan --json` says of a site whose run is planned as ``plan``."""
    training = plan.training
    facts: dict[str, Any] = {
        "noise_multiplier": training.noise_multiplier,
        "sampling_rate": training.sampling_rate,
        "steps": training.steps,
        "delta": plan.delta,
        "accountant": plan.accountant,
        "epsilon": _epsilons(plan, training),
        "curve": [
            _finite(plan.epsilon("training", [training.times(experiment.local_steps * n)]))
            for n in _sampled_rounds(experiment.rounds)
        ],
        "curve_rounds": _sampled_rounds(experiment.rounds),
        "table": _table(experiment, plan),
        "adversaries": _adversaries(experiment, plan),
        "evaluation": None,
        "budget": _budget(site, experiment, plan),
    }
    if plan.metrics is not None:
        release = plan.metrics
        facts["evaluation"] = {
            "noise_multiplier": release.noise_multiplier,
            "releases": release.steps,
            "epsilon": _finite(plan.epsilon("evaluation", [release])),
        }
    if file.records_per_person > 1:
        facts["person"] = {
            "records": file.records_per_person,
            "epsilon": _finite(person_epsilon([training], plan.delta, file.records_per_person)),
        }
    return facts


def _epsilons(plan: RunPlan, event: Event) -> dict[str, float | None]:
    """By each accountant; by the filter of the site's budget, or of one that would just be spent
    by this run.
    """
    rdp = epsilon_of([event], plan.delta).upper
    limit = (
        plan.filters["training"]
        if plan.kept
        else RenyiFilter.planned(max(rdp, 1e-6), plan.delta, event)
    )
    return {
        "rdp": _finite(rdp),
        "pld": _finite(epsilon_of([event], plan.delta, "pld").upper),
        "filter": _finite(limit.epsilon_of(limit.cost(event), plan.delta)),
    }


def _adversaries(experiment: Experiment, plan: RunPlan) -> list[dict[str, Any]]:
    """Who could learn how much of a training record."""
    noise = experiment.privacy.noise
    return [
        {
            "who": adversary.who,
            "colluders": adversary.colluders,
            "noise_multiplier": plan.training.noise_multiplier * adversary.noise_factor,
            "epsilon": _finite(
                plan.planned_epsilon
                if noise == "site"
                else adversary.epsilon([plan.training], plan.delta)
            ),
        }
        for adversary in adversaries(noise, len(experiment.sites), experiment.collusion)
    ]


def _table(experiment: Experiment, plan: RunPlan) -> dict[str, Any]:
    """Epsilon for less and more noise and rounds, in the accountant that admits the run."""
    noises = [float(f"{plan.training.noise_multiplier * factor:.3g}") for factor in _NOISE]
    noises[_NOISE.index(1.0)] = plan.training.noise_multiplier
    rounds = sorted({max(1, round(experiment.rounds * factor)) for factor in _ROUNDS})
    choices = [replace(plan.training, noise_multiplier=noise) for noise in noises]
    cells = [
        [
            _finite(plan.epsilon("training", [steps.times(n * experiment.local_steps)]))
            for n in rounds
        ]
        for steps in choices
    ]
    return {"noise_multipliers": noises, "rounds": rounds, "epsilon": cells}


def _budget(site: str, experiment: Experiment, plan: RunPlan) -> dict[str, Any] | None:
    if not plan.kept:
        return None
    facts: dict[str, Any] = {}
    for account in plan.plans():
        budget, limit = fit(experiment, plan, account), plan.filters[account]
        enough = least_noise_that_fits(site, experiment, plan, account)
        facts[account] = {
            "epsilon": limit.epsilon,
            "delta": limit.delta,
            "spent": budget.spent,
            "after": _finite(budget.after),
            "fits": budget.fitting,
            "of": budget.times,
            "least_noise_multiplier": None if enough is None else enough[0],
            "more_such_runs": limit.times(
                plan.spent.get(account, limit.nothing()), limit.cost(plan.plans()[account])
            ),
        }
    return facts


def _sampled_rounds(rounds: int) -> list[int]:
    """Some rounds, the first and the last among them."""
    return sorted({max(1, round(rounds * i / _POINTS)) for i in range(_POINTS + 1)})


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < float("inf") else None

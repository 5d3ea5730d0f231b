"""`privfl plan`: what an experiment would cost, before anything runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privfl.errors import PrivflError

if TYPE_CHECKING:
    from rich.console import Console

    from privfl.accounting import Event
    from privfl.admission.plan import RunPlan
    from privfl.config import Experiment, SiteFile

# Around the plan: less and more noise, fewer and more rounds.
_NOISE = (0.5, 0.7, 1.0, 1.4, 2.0)
_ROUNDS = (0.25, 0.5, 1.0, 2.0, 4.0)
_LINES = 8


@click.command(name="plan")
@click.argument("experiment", required=False, type=click.Path(path_type=Path))
@click.option(
    "--sites",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with site files; sites that have none there are planned without.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Change one value of the experiment; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    experiment: Path | None, sites: Path | None, settings: tuple[str, ...], as_json: bool
) -> None:
    """Say for each site of EXPERIMENT how much noise it needs, what that costs, and whether its
    budget has fit.

    Nothing is trained and nothing is charged. Ends with exit code 2 if a site would refuse, with
    what would pass.
    """
    from privfl.config import demo_path, load_experiment

    path = (experiment or demo_path()).resolve()
    proposal = load_experiment(path, settings)
    plans, refusals = _plans(proposal, sites)
    if as_json:
        click.echo(
            json.dumps(
                {"delta": proposal.privacy.delta, "rounds": proposal.rounds, "sites": plans},
                indent=2,
            )
        )
    else:
        from rich.console import Console

        _print(
            Console(width=None if sys.stdout.isatty() else 120, highlight=False), proposal, plans
        )
    if refusals:
        raise PrivflError(refusals[0])


def _plans(experiment: Experiment, folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    from privfl.admission.admit import check_budget, check_noise
    from privfl.admission.plan import plan_run
    from privfl.admission.policy import check_policy
    from privfl.config import SiteFile, load_site

    if folder is not None and not any(
        (folder / f"{site}.yaml").exists() for site in experiment.sites
    ):
        raise PrivflError(
            f"--sites {folder} holds no file of any site of the experiment "
            f"({', '.join(f'{s}.yaml' for s in experiment.sites)})"
        )
    plans, refusals = {}, []
    for site in experiment.sites:
        there = folder is not None and (folder / f"{site}.yaml").exists()
        file = load_site(folder, site) if there else SiteFile()
        found = plan_run(site, experiment, file)
        refusal = None
        try:
            check_policy(site, experiment, file)
            check_noise(site, experiment, file, found)
            check_budget(site, experiment, file, found)
        except PrivflError as error:
            refusal = str(error)
            refusals.append(refusal)
        plans[site] = _facts(site, experiment, file, found) | {"refused": refusal}
    return plans, refusals


def _facts(site: str, experiment: Experiment, file: SiteFile, found: RunPlan) -> dict[str, Any]:
    training = found.training
    facts: dict[str, Any] = {
        "noise_multiplier": training.noise_multiplier,
        "sampling_rate": training.sampling_rate,
        "steps": training.steps,
        "delta": found.delta,
        "accountant": found.accountant,
        "epsilon": _epsilons(found, training),
        "curve": [
            _finite(found.epsilon("training", [training.times(experiment.local_steps * n)]))
            for n in _some(experiment.rounds)
        ],
        "curve_rounds": _some(experiment.rounds),
        "table": _table(experiment, found),
        "adversaries": _adversaries(experiment, found),
        "evaluation": None,
        "budget": _budget(site, experiment, found),
    }
    if found.metrics is not None:
        release = found.metrics
        facts["evaluation"] = {
            "noise_multiplier": release.noise_multiplier,
            "releases": release.steps,
            "epsilon": _finite(found.epsilon("evaluation", [release])),
        }
    if file.records_per_person > 1:
        from privfl.accounting import person_epsilon

        facts["person"] = {
            "records": file.records_per_person,
            "epsilon": _finite(person_epsilon([training], found.delta, file.records_per_person)),
        }
    return facts


def _epsilons(found: RunPlan, event: Event) -> dict[str, float | None]:
    """By each accountant; by the filter of the site's budget, or of one that would just be spent
    by this run.
    """
    from privfl.accounting import RenyiFilter, epsilon_of

    rdp = epsilon_of([event], found.delta).upper
    limit = (
        found.filters["training"]
        if found.kept
        else RenyiFilter.planned(max(rdp, 1e-6), found.delta, event)
    )
    return {
        "rdp": _finite(rdp),
        "pld": _finite(epsilon_of([event], found.delta, "pld").upper),
        "filter": _finite(limit.epsilon_of(limit.cost(event), found.delta)),
    }


def _adversaries(experiment: Experiment, found: RunPlan) -> list[dict[str, Any]]:
    """Who could learn how much of a training record."""
    from privfl.accounting import adversaries

    noise = experiment.privacy.noise
    return [
        {
            "who": adversary.who,
            "colluders": adversary.colluders,
            "noise_multiplier": found.training.noise_multiplier * adversary.noise_factor,
            "epsilon": _finite(
                found.planned_epsilon
                if noise == "site"
                else adversary.epsilon([found.training], found.delta)
            ),
        }
        for adversary in adversaries(noise, len(experiment.sites), experiment.collusion)
    ]


def _table(experiment: Experiment, found: RunPlan) -> dict[str, Any]:
    """Epsilon for less and more noise and rounds, in the accountant that admits the run."""
    noises = [float(f"{found.training.noise_multiplier * factor:.3g}") for factor in _NOISE]
    noises[_NOISE.index(1.0)] = found.training.noise_multiplier
    rounds = sorted({max(1, round(experiment.rounds * factor)) for factor in _ROUNDS})
    plans = [replace(found.training, noise_multiplier=noise) for noise in noises]
    cells = [
        [
            _finite(found.epsilon("training", [plan.times(n * experiment.local_steps)]))
            for n in rounds
        ]
        for plan in plans
    ]
    return {"noise_multipliers": noises, "rounds": rounds, "epsilon": cells}


def _budget(site: str, experiment: Experiment, found: RunPlan) -> dict[str, Any] | None:
    from privfl.admission.admit import fit, least_noise_that_fits

    if not found.kept:
        return None
    facts: dict[str, Any] = {}
    for account in found.plans():
        left, limit = fit(experiment, found, account), found.filters[account]
        way_out = least_noise_that_fits(site, experiment, found, account)
        facts[account] = {
            "epsilon": limit.epsilon,
            "delta": limit.delta,
            "spent": left.spent,
            "after": _finite(left.after),
            "fits": left.fitting,
            "of": left.times,
            "least_noise_multiplier": None if way_out is None else way_out[0],
            "more_such_runs": limit.times(
                found.spent.get(account, limit.nothing()), limit.cost(found.plans()[account])
            ),
        }
    return facts


def _some(rounds: int) -> list[int]:
    """Some rounds, the first and the last among them."""
    return sorted({max(1, round(rounds * i / _LINES)) for i in range(_LINES + 1)})


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < float("inf") else None


# -- on the terminal -------------------------------------------------------------------------------


def _print(console: Console, experiment: Experiment, plans: dict[str, Any]) -> None:
    from rich.table import Table

    delta = experiment.privacy.delta
    console.print(
        f"{experiment.rounds} rounds of {experiment.local_steps} steps; epsilon protects one "
        f"record, at delta {delta:g}"
    )
    table = Table(
        "site", "noise multiplier", "sampling rate", "steps", "rdp", "pld", "filter", "admitted by"
    )
    for site, plan in plans.items():
        epsilon = plan["epsilon"]
        numbers = (
            f"{plan['noise_multiplier']:.4f}",
            f"{plan['sampling_rate']:g}",
            str(plan["steps"]),
        )
        table.add_row(
            site,
            *numbers,
            *(_text(epsilon[name]) for name in ("rdp", "pld", "filter")),
            plan["accountant"],
        )
    console.print(table)
    _print_budgets(console, plans)
    for sites, plan in _alike(plans):
        _print_curve(console, sites, plan)
        if experiment.collusion:
            _print_adversaries(console, sites, plan)
    if not all(plan["budget"] for plan in plans.values()):
        console.print(
            "sites without a budget: no ledger is kept across runs, and nothing is refused on "
            "account of earlier ones"
        )
    console.print(
        "rdp and pld hold for this plan alone, fixed in advance; the filter also for runs chosen "
        "after a look at earlier results"
    )


def _print_budgets(console: Console, plans: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("site", "records", "budget", "spent", "after this run", "fits", "such runs left")
    for site, plan in plans.items():
        for account, left in (plan["budget"] or {}).items():
            fits = "yes" if left["fits"] == left["of"] else f"{left['fits']} of {left['of']}"
            budget = f"{left['epsilon']:g} at {left['delta']:g}"
            table.add_row(
                site,
                account,
                budget,
                _text(left["spent"]),
                _text(left["after"]),
                fits,
                str(left["more_such_runs"]),
            )
    if table.row_count:
        console.print(table)
    for site, plan in plans.items():
        if plan["evaluation"]:
            release = plan["evaluation"]
            cost = (
                f"at noise multiplier {release['noise_multiplier']:g} cost epsilon "
                f"{_text(release['epsilon'])}"
            )
            console.print(f"{site}: {release['releases']} releases of metrics {cost}")
        if "person" in plan:
            console.print(
                f"{site}: a person with {plan['person']['records']} records: epsilon "
                f"{_text(plan['person']['epsilon'])}"
            )


def _alike(plans: dict[str, Any]) -> Sequence[tuple[str, dict[str, Any]]]:
    """Sites with equal curves and tables, shown once."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for site, plan in plans.items():
        groups.setdefault(json.dumps([plan["curve"], plan["table"]]), ([], plan))[0].append(site)
    return [(", ".join(sites), plan) for sites, plan in groups.values()]


def _print_curve(console: Console, sites: str, plan: dict[str, Any]) -> None:
    from rich.table import Table

    curve = Table(
        "after round",
        *map(str, plan["curve_rounds"]),
        title=f"epsilon over the rounds ({sites})",
        title_justify="left",
    )
    curve.add_row("epsilon", *(_text(value) for value in plan["curve"]))
    console.print(curve)
    grid = plan["table"]
    table = Table(
        "noise multiplier",
        *(f"{n} rounds" for n in grid["rounds"]),
        title=f"epsilon for other choices ({sites})",
        title_justify="left",
    )
    for noise, cells in zip(grid["noise_multipliers"], grid["epsilon"], strict=True):
        table.add_row(f"{noise:g}", *(_text(value) for value in cells))
    console.print(table)


def _print_adversaries(console: Console, sites: str, plan: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        "who",
        "noise it faces",
        "epsilon",
        title=f"who could learn how much of a record, by RDP ({sites})",
        title_justify="left",
    )
    for adversary in plan["adversaries"]:
        table.add_row(
            adversary["who"], f"{adversary['noise_multiplier']:.4f}", _text(adversary["epsilon"])
        )
    console.print(table)


def _text(value: float | None) -> str:
    from privfl.reporting.numbers import decimals

    return "infinite" if value is None else decimals(value)

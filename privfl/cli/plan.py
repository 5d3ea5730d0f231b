"""`privfl plan`: what an experiment would cost, before anything runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privfl.cli.help import example
from privfl.errors import PrivflError

if TYPE_CHECKING:
    from rich.console import Console

    from privfl.config import Experiment


@click.command(
    name="plan",
    short_help="Say what an experiment would cost in privacy, before anything runs.",
    epilog=example(
        "privfl plan mine/experiment.yaml",
        "mpiexec -n 5 privfl train mine/experiment.yaml, when all plans fit",
    ),
)
@click.argument("experiment", required=False, type=click.Path(path_type=Path))
@click.option(
    "--sites",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with site files, by default sites/ beside EXPERIMENT; sites that have none there "
    "are planned without.",
)
@click.option("--no-sites", is_flag=True, help="Plan without site files.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Change one value of the experiment; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    experiment: Path | None,
    sites: Path | None,
    no_sites: bool,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what EXPERIMENT would cost each site in privacy, before anything runs.

    EXPERIMENT is a YAML file; the built-in demo if none is given. For each site you see how much
    noise it needs, what that costs, and whether it fits its budget. Nothing is trained and nothing
    is charged. Ends with exit code 2 if a site would refuse, and says what would pass.
    """
    from privfl.config import demo_path, load_experiment, sites_folder

    sites = sites_folder(experiment, sites, no_sites)
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
    from privfl.admission.forecast import forecast
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
        has_file = folder is not None and (folder / f"{site}.yaml").exists()
        file = load_site(folder, site) if has_file else SiteFile()
        plan = plan_run(site, experiment, file)
        refusal = None
        try:
            check_policy(site, experiment, file)
            check_noise(site, experiment, file, plan)
            check_budget(site, experiment, file, plan)
        except PrivflError as error:
            refusal = str(error)
            refusals.append(refusal)
        plans[site] = forecast(site, experiment, file, plan) | {"refused": refusal}
    return plans, refusals


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
    from privfl.reporting.numbers import MEANINGLESS, meaningless

    for site, plan in plans.items():
        admitted = plan["epsilon"][plan["accountant"]]
        # In JSON an infinite epsilon is a word.
        epsilon = math.inf if isinstance(admitted, str) or admitted is None else admitted
        if epsilon > MEANINGLESS:
            console.print(meaningless(site, epsilon))
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

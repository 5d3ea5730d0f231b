"""From the histories of sites to a report: every epsilon in it is computed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from privfl._version import __version__
from privfl.accounting import (
    ACCOUNTS,
    ADJACENCY,
    Event,
    NonPrivate,
    adversaries,
    epsilon_of,
    epsilons,
    person_epsilon,
)
from privfl.accounting import Account as AccountName
from privfl.ledger import RunFacts
from privfl.reporting.history import Charged, History, ReportedRun, now
from privfl.reporting.schema import (
    FORMAT,
    Account,
    Adversary,
    Budget,
    Charge,
    Cost,
    Person,
    Point,
    Report,
    Run,
    SiteReport,
)

# More points do not show in a plot.
_POINTS = 400
# Loss distributions take a tenth of a second for each mechanism; of older runs, and of runs with
# many, the Renyi bound has to do.
_RUNS_WITH_PLD, _MECHANISMS_WITH_PLD = 5, 8
_LINES_OF_A_RUN = 20


def report(title: str, histories: Sequence[History]) -> Report:
    """The report on these sites."""
    return Report(
        format=FORMAT,
        made=now(),
        version=__version__,
        title=title,
        unit="one record",
        adjacency=ADJACENCY,
        sampling="Poisson: every record enters a step independently of all others",
        sites=[_site(history) for history in histories],
    )


def _site(history: History) -> SiteReport:
    limit = next(iter(history.limits.values()), None)
    newest = {reported.run for reported in history.runs[-_RUNS_WITH_PLD:]}
    by_run: dict[str, list[Charged]] = {reported.run: [] for reported in history.runs}
    for charge in history.charges:
        by_run.setdefault(charge.run, []).append(charge)
    runs = [
        _run(history, reported, by_run[reported.run], reported.run in newest)
        for reported in history.runs
    ]
    by_account = {
        name: [charge for charge in history.charges if charge.account == name] for name in ACCOUNTS
    }
    accounts = [
        _account(history, name, charges, runs)
        for name, charges in by_account.items()
        if charges or name in history.limits
    ]
    return SiteReport(
        site=history.site,
        source=history.source,
        kept=history.kept,
        ledger=history.ledger,
        rows=history.rows,
        head=history.head,
        budget=None if limit is None else Budget(epsilon=limit.epsilon, delta=limit.delta),
        checks=history.checks,
        accounts=accounts,
        runs=runs,
    )


# -- over all runs ---------------------------------------------------------------------------------


def spent(history: History, name: AccountName) -> tuple[float, float, int]:
    """(epsilon, its delta, steps) of all charges to one account; cheap."""
    charges = [charge for charge in history.charges if charge.account == name]
    delta, steps = _delta(history, name), _steps(charges)
    stated, counted = history.filter_epsilons.get(name), steps
    if name not in history.limits:
        runs = [
            _planned(
                _steps(c for c in charges if c.run == reported.run), reported.facts.plans.get(name)
            )
            for reported in history.runs
        ]
        counted = {
            mechanism: max(count, sum(run.get(mechanism, 0) for run in runs))
            for mechanism, count in steps.items()
        }
    epsilon = float(_spent(history, name, _total(history, counted), delta))
    # What a site tells of its filter cannot be less than the Renyi bound of the same steps.
    return max(stated[-1], epsilon) if stated else epsilon, delta, sum(steps.values())


def _account(
    history: History, name: AccountName, charges: list[Charged], runs: list[Run]
) -> Account:
    persons = [cost.person for run in runs if (cost := getattr(run, name)) is not None]
    epsilon, delta, _ = spent(history, name)
    return Account(
        account=name,
        accountant="filter" if name in history.limits or name in history.filter_epsilons else "rdp",
        delta=delta,
        spent=epsilon,
        person=_together(persons),
        charges=_grouped(history, charges),
        curve=_curve(history, name, charges, delta),
    )


def _delta(history: History, name: AccountName) -> float:
    limit = history.limits.get(name)
    return limit.delta if limit is not None else history.runs[-1].facts.delta


def _steps(charges: Iterable[Charged]) -> dict[int, int]:
    """Steps of each mechanism, less refunds; those with none left out."""
    steps: dict[int, int] = {}
    for charge in charges:
        steps[charge.mechanism] = steps.get(charge.mechanism, 0) + charge.steps
    return {mechanism: count for mechanism, count in steps.items() if count}


def _planned(steps: dict[int, int], plan: Event | None) -> dict[int, int]:
    """What was fixed in advance is the plan: a run may have ended early because of what it
    showed.
    """
    if plan is None or len(steps) != 1:
        return steps
    return {mechanism: max(count, plan.steps) for mechanism, count in steps.items()}


def _events(history: History, steps: dict[int, int]) -> tuple[Event, ...]:
    return tuple(history.mechanisms[mechanism].times(count) for mechanism, count in steps.items())


def _total(history: History, steps: dict[int, int]) -> NDArray[np.float64]:
    total = np.zeros(len(history.orders))
    for mechanism, count in steps.items():
        total = total + count * history.vectors[mechanism]
    return total


def _spent(
    history: History, name: AccountName, total: NDArray[np.float64], delta: float
) -> NDArray[np.float64]:
    """Epsilon of totals of shape (..., orders), by the account's filter if it has one; shape
    (...).
    """
    limit = history.limits.get(name)
    return np.asarray(
        epsilons(history.orders, total, delta).min(axis=-1)
        if limit is None
        else limit.epsilons_of(total)
    )


def _together(persons: Sequence[Person | None]) -> Person | None:
    """By basic composition over runs, which holds whatever each run was chosen after.

    Source: Rogers et al. 2016.
    """
    known = [person for person in persons if person is not None]
    if not known or len(known) != len(persons) or len({person.records for person in known}) != 1:
        return None
    total = math.fsum(
        math.inf if person.epsilon == "infinite" else person.epsilon for person in known
    )
    return Person(
        records=known[0].records, epsilon=total, delta=math.fsum(person.delta for person in known)
    )


def _grouped(history: History, charges: Sequence[Charged]) -> list[Charge]:
    by_run: dict[str, dict[int, list[Charged]]] = {}
    for charge in charges:
        by_run.setdefault(charge.run, {}).setdefault(charge.mechanism, []).append(charge)
    lines = []
    for groups in by_run.values():
        if len(groups) <= _LINES_OF_A_RUN:
            lines += [_line(history, members) for members in groups.values()]
        else:
            lines.append(
                _line(history, sorted(charge for members in groups.values() for charge in members))
            )
    return lines


def _line(history: History, charges: Sequence[Charged]) -> Charge:
    events = {charge.mechanism: history.mechanisms[charge.mechanism] for charge in charges}.values()
    noises = [event.noise for event in events]
    steps = [charge.steps for charge in charges]
    return Charge(
        run=charges[0].run,
        rounds=_ranges(charge.round for charge in charges),
        first=min(charge.time for charge in charges),
        last=max(charge.time for charge in charges),
        kind=", ".join(sorted({event.kind for event in events})),
        sampling_rate=max(event.rate for event in events),
        noise_multiplier=min(noises),
        most_noise=max(noises),
        mechanisms=len(noises),
        steps=sum(steps),
        refunded=-sum(count for count in steps if count < 0),
    )


def _ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'."""
    rising = sorted(set(numbers))
    starts = [rising[0]] + [b for a, b in pairwise(rising) if b != a + 1]
    ends = [a for a, b in pairwise(rising) if b != a + 1] + [rising[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _curve(
    history: History, name: AccountName, charges: Sequence[Charged], delta: float
) -> list[Point]:
    if not charges:
        return []
    picked = np.unique(
        np.linspace(0, len(charges) - 1, min(_POINTS, len(charges))).astype(np.int64)
    )
    stated = history.filter_epsilons.get(name)
    values = (
        _after(history, name, charges, picked, delta)
        if stated is None
        else np.array(stated)[picked]
    )
    return [
        Point(
            charge=i + 1,
            time=charges[i].time,
            run=charges[i].run,
            round=charges[i].round,
            epsilon=value,
        )
        for i, value in zip(picked.tolist(), values.tolist(), strict=True)
    ]


def _after(
    history: History,
    name: AccountName,
    charges: Sequence[Charged],
    picked: NDArray[np.int64],
    delta: float,
) -> NDArray[np.float64]:
    """Epsilon after each of the picked charges; shape (picked,)."""
    mechanism = np.array([charge.mechanism for charge in charges])
    steps = np.array([charge.steps for charge in charges], dtype=np.float64)
    total = np.zeros((len(picked), len(history.orders)))
    for number in np.unique(mechanism).tolist():
        count = np.cumsum(np.where(mechanism == number, steps, 0.0))[picked]
        some = count > 0.0
        total[some] += count[some, None] * history.vectors[number]
    return _spent(history, name, total, delta)


# -- one run ---------------------------------------------------------------------------------------


def _run(history: History, reported: ReportedRun, charges: list[Charged], with_pld: bool) -> Run:
    facts = reported.facts
    costs = {
        name: _cost(history, facts, name, [c for c in charges if c.account == name], with_pld)
        for name in ACCOUNTS
    }
    return Run(
        run=reported.run,
        begun=reported.begun,
        model=facts.model,
        data=facts.data,
        members=list(facts.members),
        rounds_planned=facts.rounds,
        rounds_charged=len(
            {charge.round for charge in charges if charge.round and charge.account == "training"}
        ),
        trust=reported.trust,
        private=facts.private,
        exact_metrics=list(facts.exact_metrics),
        outside=list(facts.outside),
        training=costs["training"],
        evaluation=costs["evaluation"],
        adversaries=_adversaries(
            history, facts, costs["training"], [c for c in charges if c.account == "training"]
        ),
    )


def _cost(
    history: History, facts: RunFacts, name: AccountName, charges: list[Charged], with_pld: bool
) -> Cost | None:
    steps = _steps(charges)
    plan = facts.plans.get(name)
    if not steps or plan is None:
        return None
    planned = _planned(steps, plan)
    rdp = float(epsilons(history.orders, _total(history, planned), facts.delta).min())
    limit, stated = history.limits.get(name), history.filter_epsilons.get(name)
    by_filter = (
        stated[-1]
        if stated
        else None
        if limit is None
        else limit.epsilon_of(_total(history, steps), facts.delta)
    )
    events = _events(history, planned)
    few_mechanisms = len(events) <= _MECHANISMS_WITH_PLD
    person = None
    if facts.records_per_person > 1 and few_mechanisms:
        epsilon = _person(events, facts.delta, facts.records_per_person)
        person = Person(records=facts.records_per_person, epsilon=epsilon, delta=facts.delta)
    return Cost(
        mechanism=plan.kind,
        sampling_rate=plan.rate,
        noise_multiplier=plan.noise,
        steps=sum(
            count
            for mechanism, count in steps.items()
            if not isinstance(history.mechanisms[mechanism], NonPrivate)
        ),
        delta=facts.delta,
        accountant="rdp" if by_filter is None else "filter",
        epsilon=rdp if by_filter is None else by_filter,
        rdp=rdp,
        pld=_pld(events, facts.delta) if with_pld and few_mechanisms else None,
        filter=by_filter,
        person=person,
    )


@lru_cache(maxsize=256)
def _pld(events: tuple[Event, ...], delta: float) -> float:
    return epsilon_of(events, delta, "pld").upper


@lru_cache(maxsize=64)
def _person(events: tuple[Event, ...], delta: float, records: int) -> float:
    return person_epsilon(events, delta, records)


def _adversaries(
    history: History, facts: RunFacts, cost: Cost | None, charges: list[Charged]
) -> list[Adversary]:
    if cost is None or len(facts.members) < 2:
        return []
    coordinator = Adversary(
        who="the coordinator alone",
        sees="masked, encrypted updates; names of the sites, numbers of records, times",
        epsilon=None,
        because="encryption: it has no key and never sees the model",
    )
    # In a loop of the user's own every rank is a site.
    rows = [coordinator] if facts.coordinator else []
    events = _events(history, _planned(_steps(charges), facts.plans.get("training")))
    because = "noise: this site adds all of it itself, so it holds against everybody"
    for adversary in adversaries(facts.noise, len(facts.members), facts.collusion):
        epsilon = cost.epsilon
        if facts.noise == "distributed":
            # A filter bounds the charged adversary only. All rows by one accountant, or they would
            # not rise from one to the next.
            epsilon = adversary.epsilon(events, facts.delta)
            shares = (
                "one share of it that is"
                if adversary.honest_shares == 1
                else f"{adversary.honest_shares} shares of it that are"
            )
            because = (
                f"noise: {shares} not theirs, {adversary.noise_factor:.3g} times the noise that is "
                "charged (by RDP, as a plan fixed in advance)"
            )
        if cost.epsilon == "infinite":
            because = "nothing: what was released is not protected by noise"
        rows.append(
            Adversary(who=adversary.who, sees=adversary.sees, epsilon=epsilon, because=because)
        )
    owner = Adversary(
        who="whoever owns an account under which several parties ran",
        sees="everything that the processes of that account hold, the records too",
        epsilon=None,
        because="nothing in privfl: that person must be trusted",
    )
    return [*rows, owner]

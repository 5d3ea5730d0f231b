"""Does a budget hold over runs? Real runs on kept ledgers, one after another.

One site has a budget for two runs and a half. After the second run its ledger is put back to what
it was after the first, as a backup would, or somebody who wants to go on: the other sites must
refuse. Then the right ledger is put in its place, and the next run must be refused by the site
itself.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import orthogonal
from privacy_audits.targets.job import (
    COLLUSION,
    DELTA,
    SAMPLING_RATE,
    Launch,
    RecordedRun,
    start,
    write_experiment,
)
from privfl.accounting import PoissonGaussian, RenyiFilter, adversaries

ROUNDS, SIGMA = 4, 4.0
_SITE = orthogonal.SITES[0]
_ADVERSARY = adversaries("distributed", len(orthogonal.SITES), COLLUSION)[1]


def results(
    folder: Path, through: tuple[str, ...], say: Callable[[str], None]
) -> Iterator[AuditResult]:
    """Whether an old ledger is refused, and whether the budget holds."""
    began = time.perf_counter()
    ledgers, attempts = folder / "ledgers", iter(range(1, 5))
    ledgers.mkdir()
    kept, old = ledgers / f"{_SITE}.ledger", ledgers / "old"

    def run() -> int:
        """How many rounds of the site left it in one more run."""
        attempt = next(attempts)
        say(f"recording run {attempt} of 4 on kept ledgers ...")
        where = folder / f"start-{attempt}"
        where.mkdir()
        return _released(_run(where, ledgers, through))

    spent = run()
    shutil.copyfile(kept, old)
    second = run()
    spent += second
    right = kept.with_suffix(".right")
    shutil.copyfile(kept, right)
    shutil.copyfile(old, kept)
    with_old = run()
    # Whatever it wrote, the site goes on with its right ledger.
    for left in ledgers.glob(f"{kept.name}*"):
        left.unlink()
    shutil.copyfile(right, kept)
    spent += run()
    now = time.perf_counter()
    yield _result(
        "old copy of a ledger",
        "A site that goes on with an old copy of its ledger gets no sum from the others.",
        "puts a ledger back to what it was a run before, and starts a run",
        Statistic.exact(
            "rounds that left the site", with_old, "0", holds=with_old == 0 and second > 0
        ),
        second > 0,
        "sites that do not remember each other's ledgers",
        now - began,
    )
    allowed = _rounds_within(_budget())
    yield _result(
        "budget over restarts",
        "All runs of a site together cost its records no more than its budget.",
        "starts runs on one ledger until one is refused",
        Statistic.exact(
            "rounds that left the site", spent, f"at most {allowed}", holds=spent <= allowed
        ),
        spent > ROUNDS,
        "a ledger that is forgotten at a restart",
        time.perf_counter() - now,
    )


def _budget() -> RenyiFilter:
    """Two runs and a half."""
    half = PoissonGaussian(
        sampling_rate=SAMPLING_RATE, noise_multiplier=SIGMA, steps=ROUNDS * 5 // 2
    )
    epsilon = _ADVERSARY.epsilon((half,), DELTA)
    return RenyiFilter.planned(epsilon, DELTA, half)


def _rounds_within(limit: RenyiFilter) -> int:
    step = PoissonGaussian(sampling_rate=SAMPLING_RATE, noise_multiplier=SIGMA, steps=1)
    return limit.times(limit.nothing(), limit.cost(step))


def _run(folder: Path, ledgers: Path, through: tuple[str, ...]) -> RecordedRun:
    noise = f"noise: distributed, collusion: {COLLUSION}, noise_multiplier: {SIGMA}"
    experiment = write_experiment("fedsgd", folder, ROUNDS, noise)
    (folder / "sites").mkdir()
    for site in orthogonal.SITES:
        # Much for the others: they do not end the runs.
        epsilon = _budget().epsilon if site == _SITE else 1000.0
        (folder / "sites" / f"{site}.yaml").write_text(
            f"output: {json.dumps(str(ledgers / site))}\n"
            f"ledger: {json.dumps(str(ledgers / f'{site}.ledger'))}\n"
            f"budget: {{epsilon: {epsilon!r}, delta: {DELTA!r}}}\n",
            encoding="utf-8",
        )
    return start(experiment, folder, Launch(through=through))


def _released(run: RecordedRun) -> int:
    """How many rounds of the site left it."""
    return len(run.sites[0].happened("contributed")) if run.ranks else 0


def _result(
    what: str,
    statement: str,
    attack: str,
    statistic: Statistic,
    able: bool,
    against: str,
    seconds: float,
) -> AuditResult:
    return AuditResult(
        name=f"restarts/{what}",
        claim=Claim(statement=statement, adversary=_ADVERSARY),
        attack=attack,
        statistic=statistic,
        confidence=1.0 - LEVEL,
        power=1.0 if able else 0.0,
        power_against=against,
        seconds=seconds,
    )

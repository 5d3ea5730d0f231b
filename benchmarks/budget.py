"""What keeping and reading a ledger costs: a charge on this disk, and `privfl budget show` and
`report` of large ledgers as whole processes.

    python -m benchmarks.budget [--repeats N] [--folder DIR] [--json FILE]

Ledgers: ten sites, ten thousand rounds each, two hundred distinct mechanisms, twenty runs. The
alternative to a durable charge, printed beside it, is the same row without waiting for the disk,
which a power cut would lose.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median

from privfl.accounting import Account, Gaussian, PoissonGaussian, RenyiFilter
from privfl.ledger import Ledger, RunFacts

SITES, ROUNDS, MECHANISMS, ROUNDS_OF_A_RUN = 10, 10_000, 200, 500
PLAN = PoissonGaussian(sampling_rate=0.01, noise_multiplier=4.0)
BARS = {"show_seconds": 1.5, "report_seconds": 5.0}


def filters(epsilon: float = 300.0) -> dict[Account, RenyiFilter]:
    return {
        "training": RenyiFilter.planned(epsilon, 1e-5, PLAN),
        "evaluation": RenyiFilter.planned(epsilon, 1e-5, Gaussian(noise_multiplier=1.0)),
    }


def make_ledgers(folder: Path) -> None:
    """The ledgers in ``folder``; they do not wait for the disk, which no figure here needs."""
    facts = RunFacts(
        experiment="d",
        model="m.py:model",
        data="m.py:data",
        rounds=ROUNDS_OF_A_RUN,
        noise="site",
        collusion=0,
        delta=1e-5,
        target_epsilon=None,
        private=True,
        plans={"training": PLAN},
        exact_metrics=(),
        outside=(),
        records_per_person=1,
        identity="",
        pinned=True,
        kept=True,
        members={f"site{i}": "" for i in range(SITES)},
    ).to_dict()
    limits = filters()
    for number in range(SITES):
        with Ledger.write(folder / f"site{number}.ledger", f"site{number}", limits) as opened:
            opened._storage._connection.execute("PRAGMA synchronous=OFF")
            for start in range(0, ROUNDS, ROUNDS_OF_A_RUN):
                run = f"{start:032x}"
                opened.begin_run(run, facts)
                for round_ in range(1, ROUNDS_OF_A_RUN + 1):
                    noise = 4.0 + (start + round_) % MECHANISMS / 100
                    opened.charge(
                        "training",
                        PoissonGaussian(sampling_rate=0.01, noise_multiplier=noise),
                        run,
                        round_,
                    )


def charge_seconds(folder: Path, synchronous: str, count: int = 300) -> float:
    """The median time of one charge."""
    seconds = []
    with Ledger.write(folder / f"{synchronous}.ledger", "site", filters()) as opened:
        opened._storage._connection.execute(f"PRAGMA synchronous={synchronous}")
        for round_ in range(1, count + 1):
            start = time.perf_counter()
            opened.charge("training", PLAN, "ab" * 16, round_)
            seconds.append(time.perf_counter() - start)
    return median(seconds[5:])


def process_seconds(*arguments: str | Path, repeats: int) -> float:
    """The median time of `privfl ARGUMENTS`, start-up included."""
    command = [str(Path(sysconfig.get_path("scripts")) / "privfl"), *map(str, arguments)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            sys.exit(done.stderr)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=Path,
        help="Where the ledgers lie whose charges are timed: a disk like that of a site.",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        result = {
            "charge_seconds": charge_seconds(folder, "EXTRA"),
            "charge_without_flush_seconds": charge_seconds(folder, "OFF"),
        }
        (folder / "ledgers").mkdir()
        make_ledgers(folder / "ledgers")
        result["show_seconds"] = process_seconds(
            "budget", "show", folder / "ledgers", repeats=options.repeats
        )
        page = ("--output", folder / "page.html")
        result["report_seconds"] = process_seconds(
            "budget", "report", folder / "ledgers", *page, repeats=options.repeats
        )
        result["verify_seconds"] = process_seconds(
            "budget", "verify", folder / "ledgers", repeats=1
        )
        result["plan_seconds"] = process_seconds("plan", repeats=options.repeats)
        result["ledger_bytes"] = max(
            path.stat().st_size for path in (folder / "ledgers").glob("*.ledger")
        )
    for key, value in result.items():
        bar = (
            f"   {'met' if value <= BARS[key] else 'MISSED'} (bar <= {BARS[key]:g})"
            if key in BARS
            else ""
        )
        print(f"{key:<32}{value:.5g}{bar}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

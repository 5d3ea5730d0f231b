"""A run of privfl beside bare processes on the same cores: what the benchmarks of rounds and of
steps share.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def slowest(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> float:
    """The largest number that processes put into a queue, all at once: ``work(*arguments,
    barrier to start at, queue)``.
    """
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(len(arguments)), context.Queue()
    processes = [context.Process(target=work, args=(*given, start, results)) for given in arguments]
    for process in processes:
        process.start()
    found: float = max(results.get(timeout=300) for _ in arguments)
    for process in processes:
        process.join()
    return found


def phases(folder: str, *arguments: str) -> dict[str, float]:
    """Median seconds of the phases of a round of `mpiexec -n 5 privfl train`, and of both
    together ("all").
    """
    scripts = Path(sysconfig.get_path("scripts"))
    command = [
        str(scripts / "mpiexec"),
        "-n",
        "5",
        str(scripts / "privfl"),
        "train",
        *arguments,
        "--output",
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    (log,) = Path(folder).rglob("rounds.jsonl")
    # The first rounds warm caches up; the last one evaluates.
    records = [json.loads(line)["seconds"] for line in log.read_text().splitlines()][2:-1]
    found = {phase: median(r[phase] for r in records) for phase in ("training", "aggregation")}
    return found | {"all": median(r["training"] + r["aggregation"] for r in records)}

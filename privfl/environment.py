"""What this process runs in: versions, account, the launcher's variables, and the processors it
may use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from privfl._version import __version__

# SLURM_NTASKS is also set in a batch script itself, where one process is right;
# SLURM_STEP_NUM_TASKS only by srun.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK")


def launcher_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes the launcher says it started, or None."""
    return next(
        (int(environment[name]) for name in _SIZES if environment.get(name, "").isdigit()), None
    )


def launcher_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which of the launched processes this one is, or None."""
    names = (*_RANKS, "SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in environment else _RANKS
    return next(
        (int(environment[name]) for name in names if environment.get(name, "").isdigit()), None
    )


def versions() -> dict[str, str]:
    """What must be the same at all ranks: ciphertexts and messages do not travel between
    versions.
    """
    from importlib.metadata import version

    return {"privfl": __version__, "tenseal": version("tenseal")}


def user_id() -> str:
    """The account that this process runs under, by its number: a user has the same one on all
    machines of a cluster.
    """
    return str(os.getuid())


def threads_for(sites_here: int, environment: dict[str, str]) -> int:
    """Threads for one trainer when ``sites_here`` of them share this machine's processors."""
    chosen = environment.get("OMP_NUM_THREADS") or environment.get("SLURM_CPUS_PER_TASK") or ""
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, processors // max(1, sites_here))

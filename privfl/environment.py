"""What this process runs in: versions, user, the launcher's variables, usable processors."""

from __future__ import annotations

import os
from collections.abc import Mapping

from privfl._version import __version__

# SLURM_NTASKS is also set in a batch script itself, where one process is right;
# SLURM_STEP_NUM_TASKS only by srun.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK")


def launcher_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes the launcher says it started; None without a launcher."""
    return _first_number(_SIZES, environment)


def launcher_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which of the launched processes this one is, from 0; None without a launcher."""
    names = (*_RANKS, "SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in environment else _RANKS
    return _first_number(names, environment)


def _first_number(names: tuple[str, ...], environment: Mapping[str, str]) -> int | None:
    return next(
        (int(environment[name]) for name in names if environment.get(name, "").isdigit()), None
    )


def versions() -> dict[str, str]:
    """The versions that all ranks must have in common, by package.

    Ciphertexts and messages are not compatible between versions.
    """
    from importlib.metadata import version

    return {"privfl": __version__, "tenseal": version("tenseal")}


def user_id() -> str:
    """The number of the Unix user that this process runs as.

    A user has the same number on all machines of a cluster.
    """
    return str(os.getuid())


def threads_for(sites_here: int, environment: Mapping[str, str]) -> int:
    """How many threads one trainer uses if ``sites_here`` of them share this machine.

    ``OMP_NUM_THREADS`` and ``SLURM_CPUS_PER_TASK`` come first; otherwise the trainers share the
    processors equally.
    """
    requested = environment.get("OMP_NUM_THREADS") or environment.get("SLURM_CPUS_PER_TASK") or ""
    if requested.isdigit() and int(requested) > 0:
        return int(requested)
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, processors // max(1, sites_here))

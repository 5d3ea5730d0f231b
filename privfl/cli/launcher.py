"""What a launcher says about this process, and finding the launcher that fits this environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping

from privfl.errors import PrivflError

# SLURM_NTASKS is also set in a batch script itself, where one process is right; SLURM_STEP_NUM_TASKS only by srun.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK")


def size_by_environment(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many processes the launcher says it started, or None."""
    return next((int(environment[name]) for name in _SIZES if environment.get(name, "").isdigit()), None)


def rank_by_environment(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which of them this one is, or None."""
    names = (*_RANKS, "SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in environment else _RANKS
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)


def matching_mpiexec() -> str:
    """The mpiexec of this Python environment, which fits the MPI library that mpi4py will load; otherwise that of the PATH.

    Raises:
        PrivflError: there is none.
    """
    ours = shutil.which("mpiexec", path=sysconfig.get_path("scripts"))
    found = ours or shutil.which("mpiexec")
    if found is None:
        raise PrivflError("no mpiexec was found: `pip install 'privfl[mpich]'` brings one, or load your cluster's MPI module")
    return found


def mpiexec_command(ranks: int) -> list[str]:
    """The start of a command line that runs ``ranks`` processes on this machine, also where it has fewer processors."""
    mpiexec = matching_mpiexec()
    command = [mpiexec, "-n", str(ranks)]
    answer = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    # MPICH needs no options; Open MPI refuses more ranks than cores and binds ranks to single cores.
    if "Open MPI" in answer.stdout or "OpenRTE" in answer.stdout or "PRTE" in answer.stdout:
        command += ["--oversubscribe", "--bind-to", "none"]
    return command

"""What a launcher says about this process, and finding the launcher that fits this environment."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig

from privfl.errors import PrivflError


def matching_mpiexec() -> str:
    """The mpiexec of this Python environment, which fits the MPI library that mpi4py will load;
    otherwise that of the PATH.

    Raises:
        PrivflError: If no mpiexec is found.
    """
    ours = shutil.which("mpiexec", path=sysconfig.get_path("scripts"))
    mpiexec = ours or shutil.which("mpiexec")
    if mpiexec is None:
        raise PrivflError(
            "no mpiexec was found: `pip install 'privfl[mpich]'` brings one, or load your "
            "cluster's MPI module"
        )
    return mpiexec


def mpiexec_command(ranks: int) -> list[str]:
    """The start of a command line that runs ``ranks`` processes on this machine, also where it
    has fewer processors.
    """
    mpiexec = matching_mpiexec()
    command = [mpiexec, "-n", str(ranks)]
    answer = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    # MPICH needs no options; Open MPI refuses more ranks than cores and binds ranks to single
    # cores.
    if "Open MPI" in answer.stdout or "OpenRTE" in answer.stdout or "PRTE" in answer.stdout:
        command += ["--oversubscribe", "--bind-to", "none"]
    return command

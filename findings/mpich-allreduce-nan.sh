#!/usr/bin/env bash
# Expected: after `Allreduce` all ranks hold the same number; the maximum of numbers among which
# one is NaN is NaN, or the maximum of the rest.
# What is so: MPICH compares with `a > b ? a : b`, whose answer depends on the order when one is
# NaN, and every rank compares in an order of its own. Of four ranks with one NaN some hold NaN,
# some the right maximum, some a wrong one; a loop that stops by "largest loss of all sites" stops
# at some ranks and waits for ever at the others. `MIN` of 1, NaN, 3, 4 is 3 at rank 0. A sum is
# NaN everywhere.
# Versions: mpi4py 4.1.2, mpich 5.0.2, numpy 2.4.6.
# Source: the MPI standard says of MPI_Allreduce that the result appears at all members; it does not
# speak of NaN.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    mpi4py==4.1.2 mpich==5.0.2 numpy==2.4.6
cat >"$folder/job.py" <<'END'
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
if comm.rank == 0:
    print(MPI.Get_library_version().split("\n")[0].strip())
disagree, agree_on_sums = 0, True
for name, op in (("MAX", MPI.MAX), ("MIN", MPI.MIN), ("SUM", MPI.SUM)):
    for broken in range(comm.size):
        mine = np.array([np.nan if comm.rank == broken else 1.0 + comm.rank])
        result = np.empty(1)
        comm.Allreduce(mine, result, op=op)
        results = comm.gather(float(result[0]))
        if comm.rank == 0:
            given = ["nan" if rank == broken else f"{1.0 + rank:g}" for rank in range(comm.size)]
            print(f"{name} of {', '.join(given)}: ranks hold", results)
            same = len({str(value) for value in results}) == 1
            if name == "SUM":
                agree_on_sums &= same
            else:
                disagree += not same
if comm.rank == 0:
    print(f"ranks disagree in {disagree} of {2 * comm.size} maxima and minima")
    if not (disagree >= comm.size and agree_on_sums):
        print("changed: all ranks hold the same maximum")
        comm.Abort(1)
END
"$folder/venv/bin/mpiexec" -n 4 "$folder/venv/bin/python" "$folder/job.py"

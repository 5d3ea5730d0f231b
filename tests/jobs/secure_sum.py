"""Run under mpiexec: `privfl.SecureSum` on a user's communicator, in ways that a user would;
rank 0 prints what went wrong, or nothing.
"""

import json
import sys

import numpy as np
from mpi4py import MPI

import privfl
from privfl.errors import PrivflError

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
wrong = []


def expect(what: str, holds: bool) -> None:
    if not holds:
        wrong.append(f"rank {rank}: {what}")


def vector_of(rank: int, length: int) -> np.ndarray:
    return np.random.default_rng(rank).integers(-30000, 30000, length)


for path in ("star", "reduce"):
    with privfl.SecureSum(comm, path=path) as secure:
        for length in (0, 1, 5, 8192, 300_001):
            total = secure.sum(vector_of(rank, length))
            expect(
                f"{path}, {length} values",
                np.array_equal(total, sum(vector_of(r, length) for r in range(size))),
            )
        shaped = secure.sum(np.full((3, 4), rank, dtype=np.int32))
        expect(
            "shape and dtype",
            shaped.shape == (3, 4)
            and shaped.dtype == np.int64
            and (shaped == sum(range(size))).all(),
        )
        # A vector that does not fit at one rank is one sentence at all; the next sum works.
        for what, bad in {
            "integers beyond": np.array([2**40 if rank == 1 else 0]),
            "sums integers exactly, and was given float64": np.array([0.5 if rank == 1 else 1]),
            "a vector of shape (4,), rank 0 another one": np.zeros(
                4 if rank == 2 else 3, dtype=np.int64
            ),
        }.items():
            try:
                secure.sum(bad)
                expect(f"{what}: accepted", False)
            except PrivflError as error:
                expect(
                    f"{what}: {error}", (what in str(error) and "rank" in str(error)) or rank == 1
                )
        expect("after refusals", secure.sum(np.array([rank]))[0] == sum(range(size)))
with privfl.SecureSum(comm, range=2.0, value_bits=16, rounding="stochastic") as secure:
    numbers = np.random.default_rng(rank).uniform(-2, 2, 10_000)
    expected = sum(np.random.default_rng(r).uniform(-2, 2, 10_000) for r in range(size))
    error = secure.sum(numbers) - expected
    grid = 2.0 / (2**15 - 1)
    expect(
        "floats within the grid",
        np.abs(error).max() <= size * grid
        and abs(error.mean()) < 5 * grid * np.sqrt(size / 6 / 10_000),
    )
from privfl.transport import mpi  # noqa: E402

for _ in range(3000):  # MPI has some two thousand communicators at a time
    mpi.over(comm).close()
try:
    privfl.SecureSum(comm, value_bits=16 if rank else 17)
    expect("different arguments were accepted", False)
except PrivflError as error:
    expect(f"other arguments: {error}", "other arguments" in str(error))
everything = comm.gather(wrong, root=0)
if rank == 0:
    sys.stdout.write(json.dumps([what for part in everything for what in part]) + "\n")

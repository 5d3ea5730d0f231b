"""Secure aggregation beside the settings that everybody copies and beside a plain reduction, in
one run on the same machine.

    python -m benchmarks.secure_aggregation [--most PARAMETERS] [--repeats N] [--json FILE]

Three ways to sum float vectors of four sites: privfl's codec with and without masks; NVFlare's
settings by hand with TenSEAL (N = 8192, [60, 40, 40], scale 2^40, symmetric; one flat vector and
one context, which is kinder than NVFlare is); float32 without any protection. First single steps in
one process on one pinned core: what a client does before the wire and after it, what the server
does for one site. Then whole sums under `mpiexec -n 5`, all over the same transport. Then the peak
memory of rank 0 for 2 and 8 sites. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SITES, SPAN = 4, 1.0
SLOTS = 4096
NVFLARE = "NVFlare's settings"


def vector_of(site: int, parameters: int) -> np.ndarray:
    return np.random.default_rng(site).uniform(-SPAN, SPAN, parameters)


@dataclass(frozen=True)
class Way:
    """One way to sum: bytes per parameter on the wire, and what is timed, by name."""

    wire: float
    steps: dict[str, Callable[[], Any]]


STEPS = ("client before", "client after", "server per site")


def measured(ways: dict[str, Way], parameters: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median microseconds per parameter.

    All ways take turns, so that a machine whose speed drifts does not favour one of them.
    """
    seconds: dict[tuple[str, str], list[float]] = {
        (name, step): [] for name, way in ways.items() for step in way.steps
    }
    for _ in range(repeats + 1):
        for name, way in ways.items():
            for step, part in way.steps.items():
                started = time.perf_counter()
                part()
                seconds[name, step].append(time.perf_counter() - started)

    def of(name: str, step: str) -> float:
        # The first round warms caches up. The server's step is that for all sites.
        return (
            median(seconds[name, step][1:]) / parameters * 1e6 / (SITES if step == STEPS[2] else 1)
        )

    return {
        name: {"bytes": way.wire} | {step: of(name, step) for step in way.steps}
        for name, way in ways.items()
    }


# -- single steps ----------------------------------------------------------------------------------


def ours(parameters: int, peers: int) -> Way:
    """This codec with the masks of so many peers."""
    from privfl.secagg import (
        Checksum,
        Decryption,
        ExchangeKey,
        FixedPoint,
        Layout,
        Masks,
        Pairs,
        SumKey,
        WordAdder,
        derive,
        encrypt,
        usual_value_bits,
    )
    from privfl.transport import mpi

    p = derive(SITES, usual_value_bits(SITES))
    key, check, vector, grid = SumKey(p), bytes(32), vector_of(0, parameters), FixedPoint(p, SPAN)
    exchange = [ExchangeKey() for _ in range(peers + 1)]
    pairs = Pairs(exchange[0], [k.public for k in exchange])
    attempt = iter(range(1, 1 << 30))

    def up() -> list[np.ndarray]:
        masks = pairs.masks(1, next(attempt), b"benchmark") if peers else Masks([])
        return list(encrypt(vector, grid, Checksum(check, p), masks, key))

    alone = list(encrypt(vector, grid, Checksum(check, p), Masks([]), key))
    layout, adder = Layout(parameters, p), WordAdder(p)

    def server() -> None:
        adder.open(layout)
        for _ in range(SITES):
            for index, block in enumerate(alone):
                # What the transport does to a block at the receiving end, but for the copy by MPI.
                mpi._digest(b"", block.data.cast("B"))
                adder.add(index, block.data.cast("B"))
        for index in range(layout.blocks):
            adder.block(index)

    server()
    total = [bytes(adder.block(index)) for index in range(layout.blocks)]

    def down() -> None:
        decryption = Decryption(parameters, Checksum(check, p), key)
        for block in total:
            decryption.add(block)
        grid.numbers(decryption.totals())

    return Way(
        sum(block.nbytes for block in alone) / parameters,
        dict(zip(STEPS, (up, down, server), strict=True)),
    )


def nvflare_context() -> tuple[Any, Any]:
    """(the clients' context with the key, the server's without)."""
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = 2.0**40
    public = context.serialize(
        save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=True
    )
    return context, tenseal.context_from(public)


def nvflare_encrypt(context: Any, vector: np.ndarray) -> Iterator[bytes]:
    import tenseal

    for start in range(0, len(vector), SLOTS):
        yield tenseal.ckks_vector(context, vector[start : start + SLOTS]).serialize()


def nvflare(parameters: int) -> Way:
    import tenseal

    context, public = nvflare_context()
    vector = vector_of(0, parameters)
    sent = list(nvflare_encrypt(context, vector))
    total = [tenseal.ckks_vector_from(public, c) for c in sent]

    def server() -> None:
        for _ in range(SITES):
            for running, ciphertext in zip(total, sent, strict=True):
                running.add_(tenseal.ckks_vector_from(public, ciphertext))

    def down() -> None:
        np.concatenate([tenseal.ckks_vector_from(context, c).decrypt() for c in sent])

    steps = (lambda: list(nvflare_encrypt(context, vector)), down, server)
    return Way(sum(map(len, sent)) / parameters, dict(zip(STEPS, steps, strict=True)))


def plain(parameters: int) -> Way:
    vector = vector_of(0, parameters)
    sent, total = vector.astype(np.float32), np.zeros(parameters, dtype=np.float32)

    def server() -> None:
        for _ in range(SITES):
            np.add(total, sent, out=total)

    steps = (lambda: vector.astype(np.float32), lambda: sent.astype(np.float64), server)
    return Way(4.0, dict(zip(STEPS, steps, strict=True)))


# -- whole sums under mpiexec ----------------------------------------------------------------------


def whole(way: str, sites: int, parameters: int, repeats: int) -> dict[str, float]:
    """{"seconds", "peak"} of a job."""
    mpiexec = str(Path(sysconfig.get_path("scripts")) / "mpiexec")
    command = [
        mpiexec,
        "-n",
        str(sites + 1),
        sys.executable,
        "-m",
        "benchmarks.jobs.whole_sum",
        way,
        str(parameters),
        str(repeats),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# -- the report ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--most",
        type=int,
        default=10_000_000,
        help="largest number of parameters; the others are tenths of it",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = [options.most // 10**k for k in (3, 2, 1, 0)]
    result: dict[str, Any] = {
        "steps": single_steps(sizes, options.repeats),
        "sums": {},
        "peak of rank 0": {},
    }
    print(f"\nwhole sum, {SITES} sites under mpiexec: microseconds per parameter")
    for size in sizes:
        repeats = options.repeats if size < 10**7 else 1
        row = {
            way: whole(way, SITES, size, repeats)["seconds"] / size * 1e6
            for way in ("privfl", "privfl-reduce", NVFLARE, "plain")
        }
        result["sums"][size] = row
        print(f"{size:>10}  " + "  ".join(f"{way} {value:.4f}" for way, value in row.items()))
    wire = result["steps"][sizes[-1]]["privfl, masks"]["bytes"] * sizes[-1]
    for sites in (2, 8):
        result["peak of rank 0"][sites] = whole("privfl", sites, sizes[-1], 1)["peak"] / wire
    print(
        "\npeak memory of rank 0 in units of one contribution: "
        + ", ".join(f"{v:.2f} for {s} sites" for s, v in result["peak of rank 0"].items())
    )
    # What was asked for is asked of a million parameters and more.
    result["bars"] = bars(result, sizes) if options.most >= 10**6 else {}
    print("\nbars" if result["bars"] else "\nno bars below a million parameters")
    for name, (value, bar, met) in result["bars"].items():
        print(f"  {'met   ' if met else 'MISSED'}  {name}: {value:.3g} (bar {bar})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def single_steps(sizes: list[int], repeats: int) -> dict[int, Any]:
    """All single steps, on one core."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(everywhere)})
    print(f"one pinned core; microseconds per parameter, {SITES} sites")
    print(
        f"{'parameters':>10}  {'':<22}{'bytes':>8}"
        + "".join(f"{step:>{len(step) + 2}}" for step in STEPS)
    )
    found: dict[int, Any] = {}
    for size in sizes:
        ways = {
            "privfl, no masks": ours(size, 0),
            "privfl, masks": ours(size, SITES - 1),
            NVFLARE: nvflare(size),
            "plain float32": plain(size),
        }
        found[size] = measured(ways, size, repeats)
        for name, row in found[size].items():
            cells = "".join(f"{row[step]:>{len(step) + 2}.4f}" for step in STEPS)
            print(f"{size:>10}  {name:<22}{row['bytes']:>8.2f}{cells}")
    size = sizes[-2]
    by_peers = measured({str(peers): ours(size, peers) for peers in (0, 7)}, size, repeats)
    cost = (by_peers["7"]["client before"] - by_peers["0"]["client before"]) / 7
    print(f"\nmasks at {size} parameters: {cost:.4f} microseconds per parameter and peer")
    os.sched_setaffinity(0, everywhere)
    return found


def bars(result: dict[str, Any], sizes: list[int]) -> dict[str, tuple[float, str, bool]]:
    """What was asked for at a million parameters and more, the least favourable size counting."""
    large = [size for size in sizes if size >= 10**6]
    steps = result["steps"]

    def times_faster(name: str, step: str) -> float:
        return min(steps[size][NVFLARE][step] / steps[size][name][step] for size in large)

    def client(size: int) -> float:
        row = steps[size]["privfl, masks"]
        return row["client before"] + row["client after"]

    peaks = list(result["peak of rank 0"].values())
    wire = max(steps[size]["privfl, masks"]["bytes"] for size in large)
    summed = min(result["sums"][size][NVFLARE] / result["sums"][size]["privfl"] for size in large)
    linear = [client(size) for size in sizes[1:]]
    return {
        "bytes per parameter": (wire, "<= 8.1", wire <= 8.1),
        "client before the wire, no masks, times faster": (
            v := times_faster("privfl, no masks", "client before"),
            ">= 6",
            v >= 6,
        ),
        "client before the wire, masks, times faster": (
            v := times_faster("privfl, masks", "client before"),
            ">= 5",
            v >= 5,
        ),
        "server per site, times faster": (
            v := times_faster("privfl, masks", "server per site"),
            ">= 20",
            v >= 20,
        ),
        "whole sum, times faster": (summed, ">= 5", summed >= 5),
        "client cost per parameter, largest / smallest": (
            v := max(linear) / min(linear),
            "<= 1.1",
            v <= 1.1,
        ),
        "peak of rank 0, 8 sites / 2 sites": (
            v := peaks[1] / peaks[0],
            "0.9 to 1.1",
            0.9 <= v <= 1.1,
        ),
        "peak of rank 0 / one contribution": (max(peaks), "<= 3", max(peaks) <= 3),
    }


if __name__ == "__main__":
    main()

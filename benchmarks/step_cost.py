"""What a step of fedsgd costs beside the same Opacus step without a sum over sites, and where
the time goes.

    python -m benchmarks.step_cost [--most PARAMETERS] [--steps N] [--repeats N] [--json FILE]

Four sites with the demo's digits and an MLP 64-h-10 of 10^4, 10^5 and 10^6 parameters, an expected
batch of 8 records a site. Bare: four processes that run nothing but Opacus' own optimizer, all at
once. privfl: `mpiexec -n 5 privfl train`, with two values in a word and with one. Bare and privfl
take turns; medians are compared. The parts of a site's work are timed one by one in a process that
has a core for itself. "Ahead" are encryptions of zero, which an agent makes while its trainer
computes and "encryption" only adds integers to; "wire and waiting" is what is left of the sum in
the real run, in which five ranks and four trainers share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.beside import phases, slowest

SITES = ("north", "east", "south", "west")
BATCH, SIGMA, CLIP, LR = 8, 2.0, 1.0, 0.1
WIDTHS = {10_000: 133, 100_000: 1333, 1_000_000: 13333}
BITS = {"two values in a word": 22, "one value in a word": 28}

TASK = """
from torch import nn
from privfl.demo.digits import data, loss

def model():
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
"""


def _bare(site: str, width: int, steps: int, rate: float, start: Any, results: Any) -> None:
    """Opacus alone: its loader and optimizer, with the noise of torch's generators."""
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch import nn

    from privfl.demo import digits
    from privfl.dp.sampling import PoissonBatches
    from privfl.noise.randomness import SystemRandomness

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    train = digits.data(site)[0]
    model = GradSampleModule(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=BATCH,
    )
    seconds = []
    start.wait()
    for batch in PoissonBatches(len(train), rate, steps, SystemRandomness()):
        began = time.perf_counter()
        x, y = train[torch.tensor(batch, dtype=torch.long)]
        digits.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    results.put(median(seconds[2:]))


def bare_step(width: int, steps: int, rates: dict[str, float]) -> float:
    """Median seconds of a step at the slowest of four bare processes."""
    return slowest(_bare, [(site, width, steps, rates[site]) for site in SITES])


def privfl_step(width: int, steps: int, rates: dict[str, float], bits: int) -> dict[str, float]:
    """Median seconds of a step in a real run, and of its two phases."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "experiment.yaml"
        (Path(folder) / "task.py").write_text(TASK.replace("WIDTH", str(width)))
        values = {
            "sites": list(SITES),
            "rounds": steps,
            "algorithm": "fedsgd",
            "sampling_rate": rates,
            "model": "task.py:model",
            "data": "task.py:data",
            "loss": "task.py:loss",
            "optimizer": {"lr": LR},
            "privacy": {
                "noise": "distributed",
                "noise_multiplier": SIGMA,
                "delta": 1e-5,
                "max_grad_norm": CLIP,
            },
            "secure_aggregation": {"value_bits": bits},
        }
        experiment.write_text(json.dumps(values))
        return phases(folder, str(experiment))


def parts(parameters: int, bits: int, repeats: int) -> dict[str, float]:
    """Median seconds of each part of one site's work on one vector."""
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        made = work()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return made

    for _ in range(repeats):
        _one_sum(parameters, bits, timed)
    return {name: median(values) for name, values in seconds.items()}


def _one_sum(parameters: int, bits: int, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    import numpy as np

    from privfl.noise.distributed import SENSITIVITY, Shares, StepGrid
    from privfl.noise.randomness import SystemRandomness
    from privfl.secagg import Checksum, Decryption, SumKey, WordAdder, derive
    from privfl.secagg.codec import _masked, _words
    from privfl.secagg.layout import Layout
    from privfl.secagg.masks import Masks
    from privfl.secagg.quantise import WrappingIntegers

    derived = derive(len(SITES), bits)
    layout = Layout(parameters, derived)
    key, check, blocks = SumKey(derived), os.urandom(32), layout.blocks
    shares = Shares(StepGrid(1e-4, 2.0**14, SENSITIVITY), SystemRandomness())
    vector = np.random.default_rng(0).normal(size=parameters)
    integers = timed("noise", lambda: shares.add(vector))
    # Masks with each of the three others; the sum below is of vectors without, as if they had
    # cancelled.
    pairs = [(os.urandom(32), True) for _ in range(len(SITES) - 1)]
    masked = timed(
        "masks",
        lambda: list(
            _masked(integers, WrappingIntegers(), Checksum(check, derived), Masks(pairs), derived)
        ),
    )
    timed(
        "ahead",
        lambda: [key.encrypt_ahead(layout.all_ciphertexts) for _ in range(layout.all_ciphertexts)],
    )
    timed("encryption", lambda: [_words(block, key) for block in masked])
    adder = WordAdder(derived)
    adder.open(layout)
    for _ in SITES:
        for number, block in enumerate(
            _masked(integers, WrappingIntegers(), Checksum(check, derived), Masks([]), derived)
        ):
            adder.add(number, _words(block, key).data.cast("B"))
    sums = [bytes(adder.block(number)) for number in range(blocks)]

    def decrypt() -> Any:
        decryption = Decryption(parameters, Checksum(check, derived), key)
        for block in sums:
            decryption.add(block)
        return decryption.totals()

    total = timed("decryption", decrypt)
    assert np.array_equal(total, len(SITES) * integers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from privfl.demo import digits

    rates = {site: BATCH / len(digits.data(site)[0]) for site in SITES}
    rows = []
    for parameters, width in WIDTHS.items():
        if parameters > options.most:
            continue
        bare, ours = [], {name: [] for name in BITS}
        for _ in range(options.repeats):
            bare.append(bare_step(width, options.steps, rates))
            for name, bits in BITS.items():
                if parameters < 1_000_000 or bits == 28:
                    ours[name].append(privfl_step(width, options.steps, rates, bits))
        for name, bits in BITS.items():
            if not ours[name]:
                continue
            row: dict[str, Any] = {"parameters": parameters, "packing": name, "bare": median(bare)}
            row["privfl"] = median(o["all"] for o in ours[name])
            row["added"] = row["privfl"] - row["bare"]
            row |= parts(parameters, bits, 5)
            aggregation = median(o["aggregation"] for o in ours[name])
            row["wire and waiting"] = aggregation - sum(
                row[part] for part in ("masks", "encryption", "decryption")
            )
            rows.append(row)
    names = list(rows[0])
    print("milliseconds", *names[2:], sep="  ")
    for row in rows:
        print(
            f"{row['parameters']:>9} {row['packing']:<22}",
            *(f"{1e3 * row[name]:10.1f}" for name in names[2:]),
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

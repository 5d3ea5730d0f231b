"""What a round of privfl costs beside the same Opacus steps run by bare processes on the same
cores.

    python -m benchmarks.round_cost [--rounds N] [--repeats N] [--json FILE]

MLP 64-64-10 (4810 parameters) on the demo's four sites, one local epoch at an expected batch of 32.
Bare: four processes that run nothing but Opacus' own optimizer, loader and steps, all at once.
privfl: `mpiexec -n 5 privfl train`, with the trainers' noise from the operating system, CKKS, MPI
and the comparison of replicas. The two take turns; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.beside import phases, slowest

SITES = ("north", "east", "south", "west")
BATCH = 32
SIGMA, CLIP, LR = 1.5, 1.0, 0.5


def _bare(site: str, rounds: int, steps: int, rate: float, start: Any, results: Any) -> None:
    """Opacus alone: its engine's loader and optimizer, the same number of steps."""
    import torch
    from opacus import GradSampleModule
    from opacus.data_loader import wrap_collate_with_empty
    from opacus.optimizers import DPOptimizer
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler
    from torch.utils.data import DataLoader, default_collate

    from privfl.demo import digits

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    train = digits.data(site)[0]
    model = GradSampleModule(digits.mlp())
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=BATCH,
    )
    sampler = UniformWithReplacementSampler(
        num_samples=len(train), sample_rate=rate, steps=rounds * steps
    )
    shapes = [t.shape[1:] for t in train.tensors]
    collate = wrap_collate_with_empty(
        collate_fn=default_collate,
        sample_empty_shapes=shapes,
        dtypes=[t.dtype for t in train.tensors],
    )
    loader = DataLoader(train, batch_sampler=sampler, collate_fn=collate)
    start.wait()
    began = time.perf_counter()
    for x, y in loader:
        if len(x):
            digits.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    results.put((time.perf_counter() - began) / rounds)


def bare_round(rounds: int, steps: int, rates: dict[str, float]) -> float:
    """Seconds that the slowest of four bare processes takes for the steps of one round."""
    return slowest(_bare, [(site, rounds, steps, rates[site]) for site in SITES])


def privfl_round(rounds: int, steps: int, rates: dict[str, float]) -> dict[str, float]:
    """Median seconds of a round, and of its phases, in a real run."""
    settings = {
        "model": "digits.py:mlp",
        "rounds": rounds,
        "local_steps": steps,
        "sampling_rate": "{" + ", ".join(f"{site}: {rate!r}" for site, rate in rates.items()) + "}",
        "optimizer": f"{{name: sgd, lr: {LR}}}",
        "privacy": f"{{noise_multiplier: {SIGMA}, delta: 1.0e-5, max_grad_norm: {CLIP}}}",
        "evaluation.every": rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        return phases(
            folder,
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from privfl.demo import digits

    rates = {site: BATCH / len(digits.data(site)[0]) for site in SITES}
    steps = max(round(1 / rate) for rate in rates.values())
    bare, ours = [], []
    for _ in range(options.repeats):
        bare.append(bare_round(options.rounds, steps, rates))
        ours.append(privfl_round(options.rounds, steps, rates))
    result = {
        "sites": len(SITES),
        "parameters": 4810,
        "steps_per_round": steps,
        "bare_seconds": median(bare),
        "privfl_seconds": median(o["all"] for o in ours),
        "privfl_training_seconds": median(o["training"] for o in ours),
        "privfl_aggregation_seconds": median(o["aggregation"] for o in ours),
    }
    result["bound_seconds"] = 1.5 * result["bare_seconds"] + 0.030
    for name, value in result.items():
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

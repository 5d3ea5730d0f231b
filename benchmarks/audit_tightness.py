"""How much of a claimed epsilon an audit of one run can show.

    python -m benchmarks.audit_tightness [--runs N]

Every record is a canary with a direction of its own, longer than the clipping norm, and in every
step if it takes part at all; the attacker sees every step. No audit of one run can show more, so
what is missing to the claim is the audit's, and not the protection's. Lower bounds at 95 %, the
median of all runs and their range; in a Python that has it, also what JAX-Privacy's auditor says of
the same scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from privacy_audits.bounds import one_run
from privacy_audits.bounds.thresholds import Bonferroni
from privacy_audits.targets import training

CANARIES, STEPS, DELTA, ALPHA = 1000, 50, 1e-5, 0.05
Scores, Truth = NDArray[np.float64], NDArray[np.bool_]
Bound = Callable[[Scores, Truth], float]


def scores(sigma: float, took_part: Truth) -> Scores:
    """How far privfl's local training moved along each canary; shape (CANARIES,)."""
    inputs = torch.eye(CANARIES)
    inputs[~torch.from_numpy(took_part)] = 0.0
    model = nn.Linear(CANARIES, 1, bias=False)
    nn.init.zeros_(model.weight)
    local = training.local(
        model,
        lambda output, target: (output.squeeze(1) * target).mean(),
        TensorDataset(inputs, torch.full((CANARIES,), 5.0)),
        sampling_rate=1.0,
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        steps=STEPS,
        lr=1.0,
    )
    moved: Scores = -training.updates(local, 1)[0]
    return moved


def _bounds() -> dict[str, Bound]:
    thresholds = Bonferroni.halves(CANARIES)

    def every(found: Scores, took_part: Truth) -> float:
        return thresholds.bound(
            found, took_part, lambda g, alpha: one_run.epsilon(g, DELTA, alpha), ALPHA
        )

    def gaussian(found: Scores, took_part: Truth) -> float:
        return thresholds.bound(
            found, took_part, lambda g, alpha: one_run.gaussian_epsilon(g, DELTA, alpha), ALPHA
        )

    bounds = {"every mechanism": every, "Gaussian": gaussian}
    try:
        from jax_privacy.auditing import CanaryScoreAuditor
    except ImportError:
        return bounds

    def theirs(name: str) -> Bound:
        return lambda found, took_part: float(
            getattr(CanaryScoreAuditor(found[took_part], found[~took_part]), name)(ALPHA, DELTA)
        )

    return bounds | {
        "JAX-Privacy": theirs("epsilon_one_run"),
        "JAX-Privacy, f-DP": theirs("epsilon_one_run_fdp"),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    bounds, rng = _bounds(), np.random.default_rng()
    print("| claimed | " + " | ".join(bounds) + " |")
    print("|---|" + "---|" * len(bounds))
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        sigma = training.noise_for(epsilon, DELTA, 1.0, STEPS)
        found: dict[str, list[float]] = {name: [] for name in bounds}
        for _ in range(runs):
            took_part = rng.random(CANARIES) < 0.5
            said = scores(sigma, took_part)
            for name, bound in bounds.items():
                found[name].append(bound(said, took_part))
        cells = [f"{median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in found.values()]
        print(f"| {epsilon:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

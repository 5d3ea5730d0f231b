"""Accuracy against epsilon at four real hospitals: noise at each site, distributed noise, and none.

    HEART_DISEASE_DIR=... python -m benchmarks.accuracy [--runs N] [--epsilons E ...] [--json FILE]
    [--figure FILE]

What `examples/heart_disease/fedavg.yaml` and `secure.yaml` do, with the same trainers, noise, grid
and optimizers, in one process: sums are added without encryption, which changes no integer of
fedsgd, and an update of fedavg by half a step of its grid (tests/runs/test_fedsgd.py and
tests/runs/test_run.py hold real runs against that). Accuracy is the mean over the four hospitals'
held-out rows. The line without noise is logistic regression on the pooled training rows, to
convergence.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "heart_disease"
# An example for each algorithm.
MODES = {"fedavg": "fedavg.yaml", "fedsgd": "secure.yaml"}
SCALINGS, EPSILONS = ("public", "flamby"), (0.1, 0.3, 1.0, 3.0, 10.0)


@cache
def _hospitals(scaling: str) -> tuple[Any, dict[str, Any]]:
    """The example's module, and (training, held-out) data of every site."""
    import privfl
    from privfl.config import load_experiment

    sys.path.insert(0, str(EXAMPLE))
    import heart_disease

    warnings.simplefilter("ignore", privfl.OutsideGuarantee)
    sites = load_experiment(EXAMPLE / MODES["fedsgd"]).sites
    return heart_disease, {site: heart_disease.data(site, scaling=scaling) for site in sites}


@cache
def noise_multiplier(mode: str, epsilon: float) -> float:
    """What meets ``epsilon`` against each other site; hospitals of all sizes need the same,
    because all their records are in every step.
    """
    from privfl.accounting import (
        DiscreteGaussian,
        PoissonGaussian,
        epsilon_of,
        least_noise_multiplier,
    )
    from privfl.config import load_experiment
    from privfl.noise.distributed import SENSITIVITY

    experiment = load_experiment(EXAMPLE / MODES[mode])
    kind: Callable[..., Any] = PoissonGaussian
    fields: dict[str, Any] = {
        "sampling_rate": experiment.sampling_rate,
        "steps": experiment.rounds * experiment.local_steps,
    }
    if mode == "fedsgd":
        kind, fields = DiscreteGaussian, fields | {"sensitivity": SENSITIVITY}
    delta = experiment.privacy.delta
    found = least_noise_multiplier(
        lambda s: epsilon_of([kind(noise_multiplier=s, **fields)], delta).upper, epsilon
    )
    assert found is not None
    return found


def run(task: tuple[str, str, float]) -> float:
    """The accuracy of one run of (mode, scaling, epsilon)."""
    import numpy as np
    import torch

    from privfl.admission.plan import parameters_of
    from privfl.config import load_experiment
    from privfl.dp.training import LocalTraining
    from privfl.noise.distributed import DistributedNoise, Shares
    from privfl.noise.randomness import SystemRandomness
    from privfl.trainer.main import recipe_of

    mode, scaling, epsilon = task
    torch.set_num_threads(1)
    experiment = load_experiment(EXAMPLE / MODES[mode])
    example, hospitals = _hospitals(scaling)
    sigma, clip = noise_multiplier(mode, epsilon), experiment.privacy.max_grad_norm
    trainers = []
    for site, (train, _) in hospitals.items():
        recipe = recipe_of(experiment, site, sigma if mode == "fedavg" else None)
        model = example.model()
        trainers.append(
            LocalTraining(
                model, example.loss, train, recipe, SystemRandomness(), torch.device("cpu")
            )
        )
    replica, records = trainers[0].flat(), sum(t.records for t in trainers)
    if mode == "fedavg":
        for _ in range(experiment.rounds):
            mean = sum(
                t.train_round(replica).astype(np.float64) * (t.records / records) for t in trainers
            )
            replica = (replica + mean).astype(np.float32)
    else:
        grid = DistributedNoise(sigma, clip, len(trainers), experiment.collusion).grid(
            value_range=None,
            largest_total=parameters_of(experiment).largest_total,
            parameters=trainers[0].parameters,
            expected=experiment.rate(experiment.sites[0]) * records,
            records=records,
            steps=experiment.rounds,
        )
        shares = [Shares(grid, SystemRandomness()) for _ in trainers]
        for _ in range(experiment.rounds):
            total = sum(
                s.add(t.sum_gradients(replica)) for s, t in zip(shares, trainers, strict=True)
            )
            moved = [t.follow(total * (grid.step / records)) for t in trainers]
            replica = moved[0]
            assert all(np.array_equal(replica, other) for other in moved)
    trainers[0].load(replica)
    hits = []
    with torch.no_grad():
        for _, held_out in hospitals.values():
            x, y = held_out.tensors
            right, of = example.accuracy(trainers[0].model(x), y)
            hits.append(float(right) / of)
    return float(np.mean(hits))


def without_noise(scaling: str) -> float:
    """Pooled training rows, no clipping, no noise: the mean over the hospitals' held-out rows."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    _, hospitals = _hospitals(scaling)
    x, y = (
        np.concatenate([train.tensors[k].numpy() for train, _ in hospitals.values()])
        for k in (0, 1)
    )
    found = LogisticRegression(C=np.inf, tol=1e-8, max_iter=100_000).fit(x, y)
    return float(
        np.mean(
            [
                found.score(held_out.tensors[0], held_out.tensors[1])
                for _, held_out in hospitals.values()
            ]
        )
    )


def measure(runs: int, epsilons: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each mode, scaling and epsilon, and one without noise for each scaling."""
    import numpy as np

    rows = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for scaling in SCALINGS:
            for mode in MODES:
                for epsilon in epsilons:
                    found = np.array(pool.map(run, [(mode, scaling, epsilon)] * runs, chunksize=1))
                    row = {
                        "scaling": scaling,
                        "mode": mode,
                        "epsilon": epsilon,
                        "noise_multiplier": noise_multiplier(mode, epsilon),
                    }
                    rows.append(
                        row
                        | {
                            "runs": runs,
                            "mean": found.mean(),
                            "std": found.std(ddof=1) if runs > 1 else 0.0,
                        }
                    )
            rows.append({"scaling": scaling, "mode": "none", "mean": without_noise(scaling)})
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The curves as SVG, with bars of one standard deviation of a run."""
    import matplotlib
    from matplotlib.figure import Figure

    names = {"fedsgd": "distributed noise (fedsgd)", "fedavg": "noise at each site (fedavg)"}
    colours = {"fedsgd": "#0b6e4f", "fedavg": "#c2571a"}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "privfl", "font.size": 9}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, scaling in zip(figure.subplots(1, 2, sharey=True), SCALINGS, strict=True):
            for mode in ("fedsgd", "fedavg"):
                mine = [row for row in rows if (row["scaling"], row["mode"]) == (scaling, mode)]
                x, mean, std = ([row[key] for row in mine] for key in ("epsilon", "mean", "std"))
                axes.errorbar(
                    x,
                    mean,
                    std,
                    marker="o",
                    markersize=3.5,
                    capsize=2,
                    lw=1.2,
                    color=colours[mode],
                    label=names[mode],
                )
            (none,) = (
                row["mean"] for row in rows if (row["scaling"], row["mode"]) == (scaling, "none")
            )
            axes.axhline(none, ls="--", lw=1, color="0.35", label="no privacy, pooled rows")
            axes.set(xscale="log", xlabel="epsilon at delta 1e-4", title=f"scaling: {scaling}")
            axes.set_xticks(list(EPSILONS), [f"{e:g}" for e in EPSILONS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("accuracy, mean of four hospitals")
        figure.axes[1].legend(loc="lower right", frameon=False)
        figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if not os.environ.get("HEART_DISEASE_DIR"):
        parser.error(
            "set HEART_DISEASE_DIR to the folder with the data (examples/heart_disease/README.md)"
        )
    rows = measure(options.runs, options.epsilons)
    print(
        f"{'scaling':8} {'mode':8} {'epsilon':>7} {'noise':>9} {'accuracy':>9} "
        f"{'std of a run':>13} {'of the mean':>12}"
    )
    for row in rows:
        if row["mode"] == "none":
            print(f"{row['scaling']:8} none     {'inf':>7} {'0':>9} {row['mean']:9.4f}")
        else:
            error = row["std"] / math.sqrt(row["runs"])
            numbers = (
                f"{row['epsilon']:7g} {row['noise_multiplier']:9.3f} {row['mean']:9.4f} "
                f"{row['std']:13.4f} {error:12.4f}"
            )
            print(f"{row['scaling']:8} {row['mode']:8} {numbers}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()

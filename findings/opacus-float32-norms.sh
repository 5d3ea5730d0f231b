#!/usr/bin/env bash
# Expected: a gradient clipped by Opacus to norm 1 has a norm of at most 1, give or take 1e-6.
# What is so: norms are taken in float32, and torch's sum of 10^7 equal squares is too small by
# 1.6 percent; the clipped gradient has norm 1.008 (10^7 elements) or 1.010 (2 * 10^7). The noise
# is made for 1.
# Versions: opacus 1.6.0, torch 2.13.0. How far the sum is off depends on how the processor's
# vector units split it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" - <<'END'
import warnings

import opacus
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

warnings.simplefilter("ignore")
print("opacus", opacus.__version__, "torch", torch.__version__)
print("vector units that torch uses here:", torch.backends.cpu.get_cpu_capability())


def norm_of_clipped(size):
    model = GradSampleModule(nn.Linear(size, 1, bias=False), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    model(torch.full((1, size), 0.1)).sum().backward()
    optimizer.step()
    return torch.linalg.vector_norm(optimizer.params[0].grad, dtype=torch.float64).item()


norms = {size: norm_of_clipped(size) for size in (1000, 10**7, 2 * 10**7)}
for size, norm in norms.items():
    print(f"{size} elements: clipped to 1, norm {norm:.6f}")
if not (abs(norms[1000] - 1) < 1e-4 and norms[2 * 10**7] > 1.001):
    raise SystemExit("changed: the norm of a large gradient is exact")
END

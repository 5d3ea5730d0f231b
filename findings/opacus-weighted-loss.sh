#!/usr/bin/env bash
# Expected: class weights, `cross_entropy(..., weight=w)`, multiply each record's loss; under
# Opacus one record still changes the clipped sum by at most the clipping norm.
# What is so: torch divides by the weights of the *whole batch* and Opacus multiplies by the
# number of records, so a record of a rare class scales the gradients of all others. Here one
# record changes a sum clipped to 1 by 15. Opacus cannot see it: every single gradient is clipped.
# `(per_record_loss * weight[target]).mean()` is what was meant.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: torch documentation of CrossEntropyLoss, reduction "mean" with `weight`.
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
from torch.nn.functional import cross_entropy

warnings.simplefilter("ignore")
inputs = torch.full((33, 2), 0.6)
targets = torch.zeros(33, dtype=torch.long)
targets[32] = 1  # the only record of the rare class
weight = torch.tensor([1.0, 100.0])


def change_by_the_last_record(loss):
    sums = []
    for count in (32, 33):
        model = GradSampleModule(nn.Linear(2, 2, bias=False))
        nn.init.zeros_(model._module.weight)
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=0.0,
                                max_grad_norm=1.0, expected_batch_size=1)
        loss(model(inputs[:count]), targets[:count]).backward()
        optimizer.step()
        sums.append(optimizer.params[0].grad)
    return (sums[1] - sums[0]).norm().item()


print("opacus", opacus.__version__, "torch", torch.__version__)
changes = [change_by_the_last_record(loss) for loss in (
    lambda out, y: cross_entropy(out, y),
    lambda out, y: cross_entropy(out, y, weight=weight),
    lambda out, y: (cross_entropy(out, y, reduction="none") * weight[y]).mean(),
)]
for name, change in zip(("no weights", "weight=", "weighted by hand"), changes):
    print(f"{name}: one record changes the sum of gradients clipped to 1 by {change:.2f}")
if not (changes[0] <= 1.001 and changes[1] > 10 and changes[2] <= 1.001):
    raise SystemExit("changed: class weights no longer couple the records")
END

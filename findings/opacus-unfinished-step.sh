#!/usr/bin/env bash
# Expected: leaving a `BatchMemoryManager` loop in the middle of a logical batch (break,
# exception, time limit) and calling `zero_grad()` drops what was accumulated.
# What is so: `zero_grad()` keeps `summed_grad` while the last step was a skipped one. The next
# step adds its whole batch to it: here 24 records of one pass and 32 of the next in one sum,
# charged as one step. Records that are in both count twice.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: opacus/optimizers/optimizer.py, `zero_grad`.
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
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
model = nn.Linear(4, 1, bias=False)
engine = opacus.PrivacyEngine(accountant="rdp")
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    data_loader=DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=32),
    noise_multiplier=0.0,
    max_grad_norm=1.0,
    poisson_sampling=False,
    loss_reduction="sum",
)


def step(inputs):
    optimizer.zero_grad()
    model(inputs).sum().backward()
    optimizer.step()


print("opacus", opacus.__version__, "torch", torch.__version__)
manager = BatchMemoryManager(
    data_loader=loader, max_physical_batch_size=8, optimizer=optimizer
)
with manager as pieces:
    for index, (inputs,) in enumerate(pieces):
        if index == 3:
            break  # 24 of 32 records are summed
        step(inputs)

(inputs,) = next(iter(loader))
step(inputs)
norm = optimizer.params[0].grad.norm().item()
charged = sum(steps for _, _, steps in engine.accountant.history)
print(f"a batch of {len(inputs)} records, each clipped to 1: the sum has norm {norm:.2f}")
print(f"steps charged: {charged}")
if not (len(inputs) == 32 and abs(norm - 56) < 1e-3 and charged == 1):
    raise SystemExit("changed: an unfinished step no longer enters the next one")
END

#!/usr/bin/env bash
# Expected: `make_private` on a loader of N records in batches of B samples at rate B / N and
# makes as many steps a pass as the loader had batches.
# What is so: the rate is 1 / len(loader). Of 1000 records in batches of 64 it is 0.0625 and not
# 0.064; `drop_last=True`, which Opacus says it ignores, makes it 0.0667. The number of steps is
# int(1 / rate), and 1 / (1 / 93) is below 93 in floating point: of 930 records in batches of 10 a
# pass has 92 steps.
# Versions: opacus 1.6.0, torch 2.13.0. The same happens with 70 of the lengths below 1000.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" - <<'END'
import logging
import warnings

import opacus
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
print("opacus", opacus.__version__, "torch", torch.__version__)
print("records  batch  drop_last  batches  batch/records  rate    expected  steps a pass")
found = []
for records, size, drop_last in ((1000, 64, False), (1000, 64, True), (920, 10, False),
                                 (930, 10, False)):
    model = nn.Linear(2, 1)
    loader = DataLoader(TensorDataset(torch.zeros(records, 2)), batch_size=size,
                        drop_last=drop_last)
    _, optimizer, private = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    steps = sum(1 for _ in private)
    found.append((round(private.sample_rate, 4), len(loader), steps))
    print(f"{records:7} {size:6} {drop_last!s:>10} {len(loader):8} {size / records:14.4f} "
          f"{private.sample_rate:7.4f} {optimizer.expected_batch_size:8} {steps:13}")
lost = sum(int(1 / (1 / length)) < length for length in range(1, 1000))
print(f"lengths below 1000 that lose a step: {lost}")
if found != [(0.0625, 16, 16), (0.0667, 15, 15), (0.0109, 92, 92), (0.0108, 93, 92)]:
    raise SystemExit("changed: rate or number of steps")
END

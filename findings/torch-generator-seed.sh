#!/usr/bin/env bash
# Expected: `torch.Generator()` without a seed starts from entropy, as `random.Random()` and
# `numpy.random.default_rng()` do, so `noise_generator=torch.Generator()` gives each site noise of
# its own.
# What is so: it starts from the constant 67280421310721 in every process. Two processes, and any
# reader of this file, draw the same "noise"; one subtracts it. torch's global generator is seeded
# from entropy.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: c10/core/GeneratorImpl.h, `default_rng_seed_val`; the documentation of torch.Generator
# does not name it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" - <<'END'
import json
import subprocess
import sys
import warnings

import opacus
import torch

CHILD = '''
import json, warnings
warnings.simplefilter("ignore")
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

model = nn.Linear(2, 1, bias=False)
model, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    data_loader=DataLoader(TensorDataset(torch.zeros(8, 2)), batch_size=4),
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    noise_generator=torch.Generator(),
    loss_reduction="sum",
)
model(torch.zeros(4, 2)).sum().backward()
optimizer.step()
print(json.dumps([torch.Generator().initial_seed(), optimizer.params[0].grad.tolist(),
                  torch.initial_seed()]))
'''
print("opacus", opacus.__version__, "torch", torch.__version__)
runs = []
for site in range(2):
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    runs.append(json.loads(done.stdout))
    seed, noise, other = runs[-1]
    print(f"site {site}: torch.Generator() has seed {seed}, noise {noise}; the global one {other}")
known = torch.normal(0.0, 1.0, (1, 2), generator=torch.Generator()).tolist()
print("drawn here, from a new torch.Generator():", known)
if not (runs[0][:2] == runs[1][:2] == [67280421310721, known] and runs[0][2] != runs[1][2]):
    raise SystemExit("changed: an unseeded torch.Generator() differs between processes")
END

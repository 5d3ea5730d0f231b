#!/usr/bin/env bash
# Expected: a step hook that a user attaches to Opacus' optimizer is called besides the one that
# counts epsilon, as torch's own hooks are.
# What is so: there is one slot. The second `attach_step_hook` takes the place of the first, which
# was the accountant's: training goes on with noise, and epsilon stays 0.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: opacus/optimizers/optimizer.py, `attach_step_hook` ("Attaches a hook").
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
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
torch.manual_seed(0)
records = TensorDataset(torch.randn(64, 5), torch.randint(0, 2, (64,)))


def train(second_hook):
    model = nn.Linear(5, 2)
    engine = opacus.PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(records, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    calls = []
    if second_hook:
        optimizer.attach_step_hook(calls.append)
    steps = 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        steps += 1
    return steps, len(calls), engine.get_epsilon(1e-5)


print("opacus", opacus.__version__, "torch", torch.__version__)
alone, both = train(second_hook=False), train(second_hook=True)
print("no hook of ours:  steps %d, calls of our hook %d, epsilon %.4f" % alone)
print("a hook of ours:   steps %d, calls of our hook %d, epsilon %.4f" % both)
if not (alone[2] > 1 and both == (alone[0], alone[0], 0.0)):
    raise SystemExit("changed: the accountant's hook is no longer replaced")
END

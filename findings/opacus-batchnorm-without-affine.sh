#!/usr/bin/env bash
# Expected: Opacus' validator refuses every BatchNorm, because it mixes the records of a batch.
# What is so: it looks at layers with trainable parameters only. `BatchNorm1d(affine=False)`
# passes validation and `make_private`; one record then moves a sum that is clipped to 1 by more
# than 5, and the running mean of the records goes into the model without noise.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: opacus/validators/module_validator.py walks `trainable_modules`; a frozen BatchNorm is
# the subject of opacus issue 472.
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
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
torch.manual_seed(0)
inputs, targets = torch.randn(33, 5) + 3, torch.randint(0, 2, (33,))
inputs[32] = 1000.0


def network(affine):
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2))


print("opacus", opacus.__version__, "torch", torch.__version__)
models = [network(affine=True), network(affine=False)]
refusals = [len(ModuleValidator.validate(model, strict=False)) for model in models]
print("errors of the validator: with affine parameters %d, without %d" % tuple(refusals))

model = network(affine=False)
model, optimizer, _ = opacus.PrivacyEngine(accountant="rdp").make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=33),
    noise_multiplier=0.0,
    max_grad_norm=1.0,
    poisson_sampling=False,
    loss_reduction="sum",
)
statistics = model._module[1].running_mean


def clipped_sum(count):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs[:count]), targets[:count], reduction="sum")
    loss.backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in optimizer.params]).clone()


before = statistics.clone()
moved = (clipped_sum(33) - clipped_sum(32)).norm().item()
print("one record, clipped to 1, moves the sum by %.2f" % moved)
print("the running mean went from", before.tolist(), "to", statistics.tolist())
if not (refusals[0] > 0 and refusals[1] == 0 and moved > 2 and not torch.equal(before, statistics)):
    raise SystemExit("changed: a BatchNorm without affine parameters is refused or harmless")
END

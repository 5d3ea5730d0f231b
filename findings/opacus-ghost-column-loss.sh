#!/usr/bin/env bash
# Expected: with `grad_sample_mode="ghost"` a regression whose outputs and targets have shape
# (batch, 1), as a last linear layer gives them, is clipped like any other.
# What is so: ghost clipping multiplies the losses, shape (batch, 1), by the clip factors, shape
# (batch,), which broadcasts to all pairs: each record is weighted by the factors of all. Eight
# records clipped to 1 have a sum of norm 1000 and more. No error, no warning; with shape (batch,)
# all is well, and so it is without ghost clipping.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: opacus/utils/fast_gradient_clipping_utils.py, class
# `DPTensorFastGradientClipping`, whose docstring names the shape [batch_size, 1].
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
inputs = torch.cat([torch.full((1, 4), 100.0), torch.ones(7, 4)])


def clipped_sum(mode, shape):
    torch.manual_seed(0)
    last = nn.Identity() if shape == (8, 1) else nn.Flatten(0)
    model = nn.Sequential(nn.Linear(4, 1), last)
    targets = torch.zeros(shape)
    parts = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=8),
        criterion=nn.MSELoss(reduction="sum"),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    model, optimizer = parts[:2]
    criterion = parts[2] if mode == "ghost" else nn.MSELoss(reduction="sum")
    criterion(model(inputs), targets).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in optimizer.params]).norm().item()


print("opacus", opacus.__version__, "torch", torch.__version__)
norms = {(mode, shape): clipped_sum(mode, shape) for mode in ("hooks", "ghost")
         for shape in ((8,), (8, 1))}
for (mode, shape), norm in norms.items():
    print(f"{mode}, outputs of shape {shape}: sum of 8 gradients clipped to 1 has norm {norm:.1f}")
bounded = [norm <= 8.001 for norm in norms.values()]
if bounded != [True, True, True, False]:
    raise SystemExit("changed: a loss of shape (batch, 1) is clipped, or others are not")
END

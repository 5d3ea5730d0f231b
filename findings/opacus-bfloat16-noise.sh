#!/usr/bin/env bash
# Expected: a model in bfloat16 trains under Opacus with somewhat coarser gradients; the noise is
# added as always.
# What is so: sum and noise are bfloat16 too, which near 600 knows every fourth number only. Noise
# of standard deviation 1 is rounded away: of 600 records clipped to 1, 95 of 100 noisy sums are
# the exact sum. Neither the validator nor the accountant says a word.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: opacus/optimizers/optimizer.py, `_generate_noise` draws in the parameter's dtype.
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
from opacus.validators import ModuleValidator
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
print("opacus", opacus.__version__, "torch", torch.__version__)


def exact_among(dtype, times=400):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    assert not ModuleValidator.validate(model, strict=False)
    model = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=1.0,
                            max_grad_norm=1.0, expected_batch_size=1, loss_reduction="sum")
    exact = 0
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.full((600, 1), 8.0, dtype=dtype)).sum().backward()
        optimizer.step()
        exact += optimizer.params[0].grad.item() == 600.0
    return exact / times


shares = {dtype: exact_among(dtype) for dtype in (torch.float32, torch.bfloat16)}
for dtype, share in shares.items():
    print(f"{dtype}: noisy sums of 600 clipped gradients that are exactly 600: {share:.1%}")
if not (shares[torch.float32] < 0.01 and shares[torch.bfloat16] > 0.8):
    raise SystemExit("changed: noise is no longer drawn and added in bfloat16")
END

#!/usr/bin/env bash
# Expected: `make_private` on a loader with a `SubsetRandomSampler` (training and held-out records
# in one data set) trains on the subset, or refuses the sampler.
# What is so: with Poisson sampling, the default, the sampler is dropped without a word and the
# whole data set is sampled. Of 1000 records with 200 held out a fifth of all batches is held-out
# records: their accuracy, and an audit that takes them for non-members, say nothing. The rate
# comes from the subset's 16 batches, so batches have 62 records and not 50. Records of weight 0 in
# a `WeightedRandomSampler` are drawn as often as others. With `poisson_sampling=False` the sampler
# stays. `Subset(dataset, indices)` is what works.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: issues 600 and 813 of Opacus (`WeightedRandomSampler`); opacus/data_loader.py.
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
from torch.utils.data import (
    DataLoader,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

warnings.simplefilter("ignore")
print("opacus", opacus.__version__, "torch", torch.__version__)
torch.manual_seed(0)
records = TensorDataset(torch.zeros(1000, 2), torch.arange(1000))
members = range(800)
weights = [1.0] * 800 + [0.0] * 200


def outsiders(loader, **options):
    model = nn.Linear(2, 1)
    _, optimizer, private = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    drawn = torch.cat([batch[1] for _ in range(20) for batch in private])
    return (drawn >= 800).double().mean().item(), optimizer.expected_batch_size


shuffled = DataLoader(records, batch_size=50, sampler=SubsetRandomSampler(members))
weighted = DataLoader(records, batch_size=50, sampler=WeightedRandomSampler(weights, 800))
found = {}
for name, loader, options in (
    ("SubsetRandomSampler", shuffled, {}),
    ("WeightedRandomSampler", weighted, {}),
    ("SubsetRandomSampler, poisson_sampling=False", shuffled, {"poisson_sampling": False}),
    ("Subset", DataLoader(Subset(records, members), batch_size=50), {}),
):
    share, size = found[name] = outsiders(loader, **options)
    print(f"{name}: {share:.1%} of the records drawn are held out; expected batch size {size}")
shares = [share for share, _ in found.values()]
if not (shares[0] > 0.15 and shares[1] > 0.15 and shares[2] == shares[3] == 0
        and found["SubsetRandomSampler"][1] == 62):
    raise SystemExit("changed: the sampler is kept")
END

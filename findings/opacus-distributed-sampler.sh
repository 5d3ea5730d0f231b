#!/usr/bin/env bash
# Expected: Opacus' two Poisson samplers differ only in that one splits the records over ranks; an
# empty sample is a batch in both, since its step needs noise and is charged.
# What is so: `UniformWithReplacementSampler` yields empty batches,
# `DistributedUniformWithReplacementSampler` leaves them out (its length counts them). Ranks whose
# samples are empty make fewer steps than the others, and fewer than were charged.
# Versions: opacus 1.6.0, torch 2.13.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" - <<'END'
import tempfile

import opacus
import torch
import torch.distributed as dist
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)

print("opacus", opacus.__version__, "torch", torch.__version__)
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    plain = UniformWithReplacementSampler(num_samples=20, sample_rate=0.05, steps=200)
    split = DistributedUniformWithReplacementSampler(total_size=20, sample_rate=0.05)
    found = [[len(batch) for batch in plain]]
    passes = [[len(batch) for batch in split] for _ in range(10)]
    found.append([size for one in passes for size in one])
    dist.destroy_process_group()
expected = 200 * 0.95**20
print(f"200 samples of 20 records at rate 0.05; empty ones expected: {expected:.0f}")
for name, sizes in zip(("plain", "distributed"), found):
    print(f"{name}: batches {len(sizes)}, of which empty {sizes.count(0)}")
print("length that the distributed one gives for one pass:", len(split))
if not (len(found[0]) == 200 and 40 < found[0].count(0) < 110 and len(split) == 20
        and found[1].count(0) == 0 and 90 < len(found[1]) < 160):
    raise SystemExit("changed: the two samplers treat empty samples alike")
END

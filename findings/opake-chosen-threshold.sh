#!/usr/bin/env bash
# Expected: the epsilon lower bound of a one-run audit at significance 0.05 is above the truth in
# at most 5 of 100 audits; without a `threshold` the audit finds one and allows for the search.
# What is so: it takes the threshold with the most right guesses and tests them as if that
# threshold had been fixed beforehand. Of scores that are noise (true epsilon 0) a third of the
# audits with 100 canaries and 40 of 100 with 1800 claim an epsilon above 0, which proves any
# mechanism faulty that has none. With `threshold=0.0` it is 6 of 100.
# Versions: opake-auditing 0.16.1, torch 2.13.0.
# Source: opake documentation of `OneRunEstimate.eps_delta`; Xiang et al. 2025.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    opake-auditing==0.16.1 opake-base==0.16.1 opake-engine==0.16.1 opake-accounting==0.16.1 \
    torch==2.13.0 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'END'
from importlib.metadata import version

import numpy as np
from opake import auditing
from opake.random import key

print("opake-auditing", version("opake-auditing"))
AUDITS = 300
rng = np.random.default_rng(0)
found = {}
for canaries in (100, 1800):
    chosen, fixed = [], []
    for number in range(AUDITS):
        coins = auditing.coin_flip(range(canaries), num_canaries=canaries, key=key(number))
        scores = auditing.canary_scores(rng.normal(size=canaries),
                                        canary_indices=coins.canary_indices)
        bound = auditing.one_run(scores, coin_flip=coins).eps_delta()
        chosen.append(bound.epsilon_at(delta=1e-5, significance=0.05))
        fixed.append(bound.epsilon_at(delta=1e-5, significance=0.05, threshold=0.0))
    found[canaries] = [np.mean(np.array(bounds) > 0) for bounds in (chosen, fixed)]
    for name, bounds, rate in zip(("chosen", "fixed"), (chosen, fixed), found[canaries]):
        print(f"{canaries} canaries, noise, threshold {name}: above 0 in {rate:.0%} of {AUDITS} "
              f"audits at significance 5%, largest {max(bounds):.3f}")
if not all(chosen > 0.2 and fixed < 0.12 for chosen, fixed in found.values()):
    raise SystemExit("changed: the search for a threshold is allowed for")
END

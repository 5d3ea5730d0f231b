#!/usr/bin/env bash
# Expected: `CanaryScoreAuditor(in_scores, out_scores)` takes lists of any two lengths; of scores
# that are noise every bound is 0, whatever the lengths (as `epsilon_clopper_pearson` says).
# What is so: the one-run bounds hold only if every canary was held in with probability 1/2, and
# this is neither checked nor corrected. With 900 held in and 300 held out "all were in" is right
# in 3 of 4 cases, whatever the scores: `epsilon_one_run` says 0.94 or more of noise, and with 900
# and 100 1.94; `epsilon_one_run_fdp` 1.36 and 2.91. All at 95 % confidence, in each of 10
# repetitions. With lists of equal length they say 0.
# Versions: jax-privacy 2.0.0, jax 0.10.2.
# Source: Steinke, Nasr, Jagielski 2023, algorithm 1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    jax-privacy==2.0.0 jax==0.10.2 dp-accounting==0.6.0 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'END'
from importlib.metadata import version

import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor

print("jax-privacy", version("jax-privacy"), "jax", version("jax"))
rng = np.random.default_rng(0)
found = {}
for held_in, held_out in ((900, 900), (900, 600), (900, 300), (900, 100), (300, 900)):
    audits = [CanaryScoreAuditor(rng.normal(size=held_in), rng.normal(size=held_out))
              for _ in range(10)]
    bounds = [[method(audit, 0.05, 1e-5) for audit in audits]
              for method in (CanaryScoreAuditor.epsilon_one_run,
                             CanaryScoreAuditor.epsilon_one_run_fdp,
                             CanaryScoreAuditor.epsilon_clopper_pearson)]
    found[held_in, held_out] = [min(values) for values in bounds]
    print(f"{held_in} held in, {held_out} held out, noise: one run {min(bounds[0]):.2f} to "
          f"{max(bounds[0]):.2f}, f-DP {min(bounds[1]):.2f} to {max(bounds[1]):.2f}, "
          f"Clopper-Pearson {min(bounds[2]):.2f} to {max(bounds[2]):.2f}")
if not (found[900, 900] == [0, 0, 0] and found[900, 300][0] > 0.8 and found[900, 300][1] > 0.8
        and found[900, 300][2] == 0 and found[900, 100][0] > 1.8):
    raise SystemExit("changed: unequal numbers of canaries no longer count as a leak")
END

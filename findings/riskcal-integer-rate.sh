#!/usr/bin/env bash
# Expected: `get_beta_for_dpsgd(..., alpha=0)`, the smallest false negative rate of an attack on
# DP-SGD that makes no false positives, is next to 1; 0 and 0.0 mean the same.
# What is so: results are put into an array of the type of alpha. With the integer 0 (or
# `np.array([0, 1])`) 0.99999... is cut to 0: an attack that finds every member and is never
# wrong. `get_beta_from_pld` does the same. At 0.0 beta is right, and at 0.1 it is 0.80.
# Versions: riskcal 1.5.1, dp-accounting 0.6.0, numpy 2.4.6.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    riskcal==1.5.1 dp-accounting==0.6.0 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'END'
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from riskcal.analysis import get_beta_from_pld
from riskcal.calibration import get_beta_for_dpsgd

print("riskcal", version("riskcal"), "dp-accounting", version("dp-accounting"))
found = []
for alpha in (0, 0.0, np.array([0, 1]), np.array([0.0, 1.0]), 0.1):
    beta = get_beta_for_dpsgd(noise_multiplier=3.83, sample_rate=0.25, num_steps=40, alpha=alpha)
    found.append(beta)
    print(f"alpha {alpha!r}: beta {beta!r}")
for noise_multiplier in (0.5, 1.0, 2.0):
    loss = privacy_loss_distribution.from_gaussian_mechanism(noise_multiplier)
    print(f"one Gaussian, noise multiplier {noise_multiplier}: alpha 0 gives "
          f"{get_beta_from_pld(loss, 0)}, 0.0 gives {get_beta_from_pld(loss, 0.0)}")
if not (found[0] == 0 and found[1] > 0.99 and found[2][0] == 0 and found[3][0] > 0.99):
    raise SystemExit("changed: 0 and 0.0 are the same rate")
END

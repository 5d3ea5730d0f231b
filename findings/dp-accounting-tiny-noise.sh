#!/usr/bin/env bash
# Expected: with next to no noise (a unit taken wrongly, a learned noise scale that underflows)
# epsilon is huge or infinite, and never falls as noise does.
# What is so: from a noise multiplier of 1e-152 down some Renyi orders of a *sampled* Gaussian
# become NaN, inf - inf; NaN is taken for the best order, and the accountant says epsilon 0:
# perfect privacy for no noise. Without sampling it says 5.5e303 and then inf.
# Versions: dp-accounting 0.6.0.
# Source: dp_accounting/rdp/rdp_privacy_accountant.py, `_compute_log_a_frac` and
# `compute_epsilon`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    dp-accounting==0.6.0
"$folder/venv/bin/python" - <<'END'
import logging
import math
import warnings
from importlib.metadata import version

import dp_accounting
from dp_accounting import rdp

warnings.simplefilter("ignore")
logging.getLogger("absl").setLevel(logging.ERROR)
print("dp-accounting", version("dp-accounting"))


def epsilon(rate, noise_multiplier):
    accountant = rdp.RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian))
    return accountant.get_epsilon(1e-5), sum(map(math.isnan, accountant.rdp))


found = {}
for noise_multiplier in (1.0, 1e-2, 1e-100, 1e-151, 1e-152, 1e-153, 1e-160, 0.0):
    found[noise_multiplier], orders = epsilon(0.01, noise_multiplier)
    print(f"noise multiplier {noise_multiplier:g}: epsilon {found[noise_multiplier]:.4g} "
          f"({orders} orders are NaN); not sampled {epsilon(1.0, noise_multiplier)[0]:.4g}")
if not (found[1e-151] > 1e300 and found[1e-153] == found[1e-160] == 0 and found[0.0] == math.inf):
    raise SystemExit("changed: no noise no longer means epsilon 0")
END

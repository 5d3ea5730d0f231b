#!/usr/bin/env bash
# Expected: more sampling costs more: the Renyi accountant's epsilon rises with the sampling rate.
# What is so: at orders between whole numbers terms of a series with alternating signs are added
# without their signs, which makes a bound and no value, and where 1000 terms are not enough the
# order is left out, with a warning. At rate 0.5 none of the orders 1.1 to 1.9 but the last is
# left, and at 0.8 (noise multiplier 1, 1000 steps) epsilon is 626, at 0.9 it is 616. The order
# 1.5 at rate 0.3, noise multiplier 8, has 0.0136 where the integral gives 0.00106. All are upper
# bounds; a search that relies on monotony goes wrong.
# Versions: dp-accounting 0.6.0.
# Source: dp_accounting/rdp/rdp_privacy_accountant.py, `_compute_log_a_frac`; Mironov, Talwar,
# Zhang 2019, section 3.3.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    dp-accounting==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import logging
import math
from importlib.metadata import version

import dp_accounting
import numpy as np
from dp_accounting import rdp

logging.getLogger("absl").setLevel(logging.ERROR)
print("dp-accounting", version("dp-accounting"))


def account(rate, noise_multiplier, steps, orders=None):
    accountant = rdp.RdpAccountant(orders)
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return accountant


def integral(rate, sigma, order):
    # log E[(1 - q + q exp((2z - 1) / 2 sigma^2))^order] / (order - 1) for z ~ N(0, sigma^2)
    z = np.linspace(-12 * sigma, order + 12 * sigma, 200_001)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
    density = -0.5 * (z / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    total = np.logaddexp.reduce(density + order * ratio) + math.log(z[1] - z[0])
    return float(total) / (order - 1)


epsilons = {}
for rate in (0.5, 0.8, 0.9):
    accountant = account(rate, 1.0, 1000)
    epsilons[rate], order = accountant.get_epsilon_and_optimal_order(1e-5)
    low = [o for o, value in zip(accountant.orders, accountant.rdp) if o < 2 and value < math.inf]
    print(f"rate {rate}: epsilon {epsilons[rate]:.2f} by order {order:g}; "
          f"orders below 2 that are left: {len(low)} of 9")
bound, value = account(0.3, 8.0, 1, [1.5]).rdp[0], integral(0.3, 8.0, 1.5)
print(f"order 1.5, rate 0.3, noise multiplier 8: {bound:.5f}, by the integral {value:.5f}")
if not (epsilons[0.9] < epsilons[0.8] and bound > 10 * value):
    raise SystemExit("changed: epsilon rises with the rate, or the order 1.5 is exact")
END

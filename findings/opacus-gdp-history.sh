#!/usr/bin/env bash
# Expected: Opacus' GaussianAccountant, which wants one noise multiplier for the whole run,
# refuses another one and keeps what it has counted.
# What is so: it takes the last entry off its history before it checks. It raises, as it should,
# but 1000 steps are gone; a loop that catches the error and goes on counts from zero: epsilon
# 1.62 becomes 0.03.
# Versions: opacus 1.6.0, torch 2.13.0.
# Source: opacus/accountants/gdp.py, `step`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" - <<'END'
import warnings

import opacus
from opacus.accountants import GaussianAccountant

warnings.simplefilter("ignore")
print("opacus", opacus.__version__)
accountant = GaussianAccountant()
for _ in range(1000):
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
before = accountant.get_epsilon(1e-5)
print(f"after 1000 steps: epsilon {before:.4f}, history {accountant.history}")
try:
    accountant.step(noise_multiplier=1.1, sample_rate=0.01)
except ValueError as error:
    print("another noise multiplier:", error)
left = list(accountant.history)
print("history after that:", left)
accountant.step(noise_multiplier=1.1, sample_rate=0.01)
after = accountant.get_epsilon(1e-5)
print(f"one more step: epsilon {after:.4f}, history {accountant.history}")
if not (before > 1.5 and left == [] and after < 0.1):
    raise SystemExit("changed: the history outlives a refused step")
END

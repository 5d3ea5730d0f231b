#!/usr/bin/env bash
# Expected: `CanaryScoreAuditor.epsilon_from_gdp(significance=0.05, ...)` is a bound for a Gaussian
# mechanism at 95 % confidence: of scores that are noise, the same for held-in and held-out
# canaries, it says 0 in at least 95 of 100 cases.
# What is so: of 900 + 900 canaries it never said 0, and half the time more than epsilon 3.9 (a
# real leak of mu = 1 is epsilon 4.38); of 10 + 10 canaries half the time more than 16. It takes
# mu from upper bounds of the two error rates, and then the absolute value of mu. Where the bounds
# are loose and add up to more than 1 mu is negative; the fewer the canaries, the larger is its
# absolute value. `epsilon_clopper_pearson` says 0 of the same scores.
# Versions: jax-privacy 2.0.0, jax 0.10.2.
# Source: jax_privacy/auditing.py, `epsilon_from_gdp`; Dong, Roth, Su 2019, equation 6.
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
from scipy.optimize import brentq
from scipy.stats import norm

print("jax-privacy", version("jax-privacy"), "jax", version("jax"))
DELTA = 1e-5
rng = np.random.default_rng(0)


def true_epsilon(mu):
    def gap(epsilon):
        left = norm.cdf(mu / 2 - epsilon / mu)
        return left - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - DELTA
    return brentq(gap, 0, 50) if mu else 0.0


found = {}
for canaries, mu in ((10, 0.0), (200, 0.0), (900, 0.0), (900, 0.2), (900, 1.0)):
    audits = [CanaryScoreAuditor(rng.normal(mu, 1, canaries), rng.normal(0, 1, canaries))
              for _ in range(40)]
    gdp = np.array([audit.epsilon_from_gdp(0.05, DELTA) for audit in audits])
    plain = np.array([audit.epsilon_clopper_pearson(0.05, DELTA) for audit in audits])
    truth = true_epsilon(mu)
    found[canaries, mu] = np.median(gdp), np.mean(gdp > truth), np.mean(plain > truth)
    print(f"{canaries} + {canaries} canaries, mu {mu}: true epsilon {truth:.2f}, by GDP "
          f"{gdp.min():.2f} to {gdp.max():.2f} (median {np.median(gdp):.2f}), too large in "
          f"{found[canaries, mu][1]:.0%}; Clopper-Pearson in {found[canaries, mu][2]:.0%}")
if not (found[900, 0.0][0] > 2 and found[900, 0.0][1] > 0.9 and found[10, 0.0][1] > 0.5
        and all(plain <= 0.1 for _, _, plain in found.values())):
    raise SystemExit("changed: noise no longer has an epsilon")
END

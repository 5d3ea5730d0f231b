#!/usr/bin/env bash
# Expected: a Paillier ciphertext of a float hides the float; its size on the wire may depend on
# the key, and on nothing else.
# What is so: `phe` keeps mantissa and exponent, and the exponent travels in the clear. It is that
# of the float's last bit: each encrypted gradient shows its size to within a factor of 16, and a
# Python int (exponent 0) shows that it is one. A `precision` argument, the same for all, makes
# the exponents equal. A product with a float moves the exponent by 14 or so.
# Versions: phe 1.5.0.
# Source: phe/encoding.py says of `exponent` that it is never encrypted.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    phe==1.5.0
"$folder/venv/bin/python" - <<'END'
import math
from importlib.metadata import version

from phe import paillier

print("phe", version("phe"))
public, secret = paillier.generate_paillier_keypair(n_length=1024)
values = (1000.3, 1.3, 1.3e-3, 1.3e-6, 1.3e-9)
exponents = [public.encrypt(value).exponent for value in values]
fixed = [public.encrypt(value, precision=1e-12).exponent for value in values]
for value, exponent, same in zip(values, exponents, fixed, strict=True):
    guess = 16.0 ** (exponent + 13)
    print(f"{value:g}: exponent {exponent}, so near {guess:.1e}; with precision=1e-12: {same}")
within = [abs(math.log(value, 16) - exponent - 13) <= 1.0
          for value, exponent in zip(values, exponents, strict=True)]
product = public.encrypt(1.0)
for _ in range(5):
    product = product * 0.5
print("exponent after five products with 0.5:", product.exponent, "value", secret.decrypt(product))
if not (all(within) and len(set(fixed)) == 1):
    raise SystemExit("changed: exponents do not show the size of a float")
END

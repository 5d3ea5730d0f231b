#!/usr/bin/env bash
# Expected: shares by Shamir's scheme can be added: each party adds its shares of two secrets, and
# what the parties combine is the sum of the secrets; that is what secure sums rest on.
# What is so: PyCryptodome's field is GF(2^128), where addition is XOR. Shares added as numbers
# combine to nothing of meaning; shares "added" in the field combine to 100 XOR 60 = 88 and not
# 160. shamirs, over a prime, gives 160.
# Versions: pycryptodome 3.24.1, shamirs 4.0.0.
# Source: PyCryptodome's documentation, Secret Sharing Schemes ("finite field"), does not mention
# sums.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    pycryptodome==3.24.1 shamirs==4.0.0
"$folder/venv/bin/python" - <<'END'
from importlib.metadata import version

import shamirs
from Crypto.Protocol.SecretSharing import Shamir

print("pycryptodome", version("pycryptodome"), "shamirs", version("shamirs"))
secrets = (100, 60)
shares = [Shamir.split(2, 3, secret.to_bytes(16, "big")) for secret in secrets]
pairs = [(index, int.from_bytes(one, "big"), int.from_bytes(other, "big"))
         for (index, one), (_, other) in zip(*shares, strict=True)]


def combined(add):
    held = [(index, add(one, other).to_bytes(16, "big")) for index, one, other in pairs[:2]]
    return int.from_bytes(Shamir.combine(held), "big")


as_numbers = combined(lambda one, other: (one + other) % 2**128)
in_field = combined(lambda one, other: one ^ other)
primes = [shamirs.shares(secret, quantity=3, threshold=2) for secret in secrets]
by_prime = shamirs.interpolate([one + other for one, other in zip(*primes, strict=True)][:2])
print("sum wanted:", sum(secrets))
print("pycryptodome, shares added as numbers:", as_numbers)
print("pycryptodome, shares added in its field:", in_field)
print("shamirs, shares added:", by_prime)
if not (as_numbers != 160 and in_field == 100 ^ 60 and by_prime == 160):
    raise SystemExit("changed: sums of shares")
END

#!/usr/bin/env bash
# Expected: symmetric encryption halves a fresh ciphertext, since its second polynomial is random
# and a seed can stand for it; SEAL does so.
# What is so: TenSEAL's `ENCRYPTION_TYPE.SYMMETRIC` writes as many bytes as the public-key form.
# The seeded form exists in the layer below: `sealapi`'s `encrypt_symmetric` with *one* argument
# returns an object that can only be saved, at half the size.
# Versions: tenseal 0.3.18.
# Source: SEAL, Encryptor::encrypt_symmetric, which returns Serializable<Ciphertext>.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    tenseal==0.3.18
"$folder/venv/bin/python" - <<'END'
import os
import tempfile

import tenseal
from tenseal import sealapi

print("tenseal", tenseal.__version__)
values, sizes = [0.5] * 4096, {}
for name in ("ASYMMETRIC", "SYMMETRIC"):
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=getattr(tenseal.ENCRYPTION_TYPE, name),
    )
    context.global_scale = 2**40
    sizes[name] = len(tenseal.ckks_vector(context, values).serialize())

parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
parameters.set_poly_modulus_degree(8192)
parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(8192, [60, 40, 40]))
context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
encryptor = sealapi.Encryptor(context, sealapi.KeyGenerator(context).secret_key())
plain, whole = sealapi.Plaintext(), sealapi.Ciphertext()
sealapi.CKKSEncoder(context).encode(values, 2.0**40, plain)
encryptor.encrypt_symmetric(plain, whole)
with tempfile.TemporaryDirectory() as folder:
    seeded = encryptor.encrypt_symmetric(plain)
    for name, thing in (("sealapi", whole), ("sealapi, seeded", seeded)):
        path = os.path.join(folder, "saved")
        thing.save(path)
        sizes[name] = os.path.getsize(path)
for name, size in sizes.items():
    print(f"{name}: {size} bytes for 4096 values")
if not (abs(sizes["SYMMETRIC"] / sizes["ASYMMETRIC"] - 1) < 0.01
        and sizes["sealapi, seeded"] < 0.55 * sizes["sealapi"]):
    raise SystemExit("changed: symmetric ciphertexts are smaller, or seeded ones are not")
END

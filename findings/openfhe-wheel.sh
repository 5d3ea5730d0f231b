#!/usr/bin/env bash
# Expected: a wheel tagged `py3-none-any` is pure Python and works with every Python 3 on every
# system; a compiled extension is tagged for its Python and platform.
# What is so: openfhe's wheels are `py3-none-any` and hold a shared library for one Python on
# Linux x86-64, named by the Ubuntu release at the end of the version (22.4: CPython 3.10). `pip
# install openfhe` succeeds on any other Python, and `import openfhe` says "No module named
# 'openfhe.openfhe'".
# Versions: openfhe 1.6.1.0.22.4.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
    openfhe==1.6.1.0.22.4
"$folder/venv/bin/python" - "$folder"/*.whl <<'END'
import sys
import zipfile

path = sys.argv[1]
with zipfile.ZipFile(path) as wheel:
    names = wheel.namelist()
    metadata = wheel.read(next(n for n in names if n.endswith(".dist-info/WHEEL"))).decode()
    about = wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
extensions = [name for name in names if name.split("/")[-1].startswith("openfhe.cpython")]
tag = next(line for line in metadata.splitlines() if line.startswith("Tag:"))
wanted = next(line for line in about.splitlines() if line.startswith("Requires-Python"))
print(path.rsplit("/", 1)[1])
print(tag, "|", wanted, "|", *extensions)
if not (tag == "Tag: py3-none-any" and len(extensions) == 1 and "310-x86_64" in extensions[0]):
    raise SystemExit("changed: the wheel is tagged for what it holds, or holds more")
END

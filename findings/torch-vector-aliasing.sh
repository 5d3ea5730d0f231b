#!/usr/bin/env bash
# Expected: `vector_to_parameters(vector, model.parameters())` copies numbers into a model, as
# `load_state_dict` does.
# What is so: the parameters become views of the vector. Two simulated sites that are given one
# global vector share their weights: a step of one site moves the other and the "global" vector,
# and the update, new minus old, is zero. `vector_to_parameters(vector.clone(), ...)` is what was
# meant.
# Versions: torch 2.13.0.
# Source: torch/nn/utils/convert_parameters.py; the documentation does not say so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

print("torch", torch.__version__)


def train_one_of_two(copy):
    everywhere = torch.zeros(3)
    sites = [nn.Linear(2, 1), nn.Linear(2, 1)]
    for site in sites:
        vector_to_parameters(copy(everywhere), site.parameters())
    optimizer = torch.optim.SGD(sites[0].parameters(), lr=1.0)
    sites[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = [parameters_to_vector(site.parameters()).tolist() for site in sites]
    update = parameters_to_vector(sites[0].parameters()) - everywhere
    return weights, update.tolist()


shared, apart = train_one_of_two(lambda v: v), train_one_of_two(torch.clone)
for name, (weights, update) in (("one vector", shared), ("a clone each", apart)):
    print(f"{name}: trained site {weights[0]}, other site {weights[1]}, update {update}")
if not (shared == ([[-1.0] * 3] * 2, [0.0] * 3) and apart == ([[-1.0] * 3, [0.0] * 3], [-1.0] * 3)):
    raise SystemExit("changed: vector_to_parameters copies")
END

#!/usr/bin/env bash
# Expected: Flower's `DifferentialPrivacyServerSideFixedClipping(FedAvg(), ...)` bounds what one
# client can change in the new model by clipping norm / clients, since its noise is
# noise_multiplier * clipping_norm / clients.
# What is so: FedAvg goes on weighting clients by their examples. Of four clients one with 970 of
# 1000 examples moves the model by 0.97 instead of 0.25: the noise is a quarter of what the noise
# multiplier says. With the new `accountant` argument unequal weights raise; without it there is
# no word.
# Versions: flwr 1.42.0.
# Source: flwr/serverapp/strategy/dp_fixed_clipping.py; "Accounted mode requires ... uniform
# FedAvg aggregation".
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    flwr==1.42.0
"$folder/venv/bin/python" - <<'END'
import logging

import flwr
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.task_identity import TaskIdentity

logging.disable(logging.WARNING)
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as a running server has
START = np.zeros(4, dtype=np.float32)


def reply(update, examples):
    question = Message(RecordDict(), dst_node_id=1, message_type="train")
    content = RecordDict({
        "arrays": ArrayRecord([START + update.astype(np.float32)]),
        "metrics": MetricRecord({"num-examples": examples}),
    })
    return Message(content, reply_to=question)


def model_after_a_round(updates, examples):
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), noise_multiplier=1e-9, clipping_norm=1.0, num_sampled_clients=len(updates)
    )
    strategy.current_arrays = ArrayRecord([START])
    arrays, _ = strategy.aggregate_train(1, list(map(reply, updates, examples)))
    return arrays.to_numpy_ndarrays()[0]


print("flwr", flwr.__version__)
small, large = np.eye(4), np.eye(4)
small[0] *= 1e-6
large[0] *= 10.0  # will be clipped to 1
moved = {}
for examples in ((250, 250, 250, 250), (970, 10, 10, 10)):
    change = model_after_a_round(large, examples) - model_after_a_round(small, examples)
    moved[examples] = float(np.linalg.norm(change))
    print(f"examples {examples}: the first client moves the model by {moved[examples]:.3f}; "
          "noise is scaled to 0.250")
if not (abs(moved[250, 250, 250, 250] - 0.25) < 1e-3 and moved[970, 10, 10, 10] > 0.9):
    raise SystemExit("changed: clients count alike under differential privacy")
END

"""Metrics as a vector that adds up: pooled values, means over sites, and sites that have nothing
to say.
"""

from __future__ import annotations

import numpy as np

from privfl.federation.metrics import pack, unpack
from privfl.federation.strategies import fedavg

LAYOUT = {"balanced": 2, "accuracy": 1}


def test_pooled_values_and_means_over_sites():
    sites = [
        {"accuracy": ([8.0], [10.0]), "balanced": ([4.0, 1.0], [5.0, 5.0])},
        {"accuracy": ([1.0], [2.0]), "balanced": ([1.0, 0.0], [2.0, 0.0])},
        {},
    ]
    total = np.sum([pack(site, LAYOUT) for site in sites], axis=0)
    assert len(total) == (2 + 2) + (4 + 2)
    values = unpack(total, LAYOUT)
    assert values["accuracy"] == 9 / 12
    assert values["accuracy_mean_over_sites"] == (0.8 + 0.5) / 2
    assert values["balanced"] == (5 / 7 + 1 / 5) / 2
    assert values["balanced_mean_over_sites"] == ((0.8 + 0.2) / 2 + 0.5) / 2


def test_no_site_has_held_out_records():
    assert unpack(pack({}, LAYOUT), LAYOUT) == {}


def test_fedavg_adds_the_mean():
    replica = np.array([1.0, -2.0], dtype=np.float32)
    moved = fedavg(replica, np.array([0.5, 0.25]))
    assert moved.dtype == np.float32
    assert moved.tolist() == [1.5, -1.75]

"""How the mean of the sites' updates becomes the next replica."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def fedavg(replica: NDArray[np.float32], mean_update: NDArray[np.float64]) -> NDArray[np.float32]:
    """Federated averaging (McMahan et al. 2017): the replica moves by the mean.

    Both of shape (parameters,).
    """
    return (replica.astype(np.float64) + mean_update).astype(np.float32)

"""Which canaries take part in a run: drawn by the audit, read by trainers and by the judge."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def draw(folder: Path, sites: Sequence[str], count: int) -> None:
    """Decide for each of ``count`` canaries of every site whether it takes part, with probability
    1/2, and leave that in ``folder``.
    """
    rng = np.random.default_rng(secrets.randbits(128))
    for site in sites:
        np.save(_path(folder, site), rng.random(count) < 0.5)


def read(folder: Path, site: str) -> NDArray[np.bool_]:
    """Which canaries of a site take part; shape (canaries,)."""
    drawn: NDArray[np.bool_] = np.load(_path(folder, site), allow_pickle=False)
    return drawn


def _path(folder: Path, site: str) -> Path:
    return folder / f"truth-{site}.npy"

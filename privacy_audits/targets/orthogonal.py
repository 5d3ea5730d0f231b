"""Records whose gradients point along axes of their own, so that a sum of clipped gradients tells
which records are in it and how long each one is. A task for an experiment file: model, data, loss.

The loss is linear in the model, so a record's gradient never changes: its target times its input.
Every site has the coordinates of :func:`places` to itself; those of :func:`blank` are nobody's and
hold noise alone. They are a layer of their own, but for one of each site's straddling record, which
has another in the first layer and a third among biases: only a bound on everything together cuts it
right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from privacy_audits.targets import truth

SITES = ("aa", "bbb", "cccc")
# Canaries of a site, each of which takes part in the run with probability 1/2.
CANARIES = 600
# Records of a site that always take part.
WITNESSES = 300
# Coordinates that belong to no record.
BLANK = 1200
# Lengths of the gradients, in clipping norms; the clipping norm is 1.
LONG, HUGE, SHORT = 5.0, 1e6, 0.25


@dataclass(frozen=True)
class Places:
    """Which coordinates belong to a site.

    Attributes:
        canaries: those of its canaries, one each; shape (CANARIES,).
        witnesses: those of its witnesses, one each; shape (WITNESSES,).
        straddling: the three of a record with a part in either layer and in a bias.
        huge: that of a record with a gradient far above the clipping norm.
        short: that of a record with a gradient below it.
        infinite: that of a record whose gradient is not finite.
    """

    canaries: NDArray[np.int64]
    witnesses: NDArray[np.int64]
    straddling: tuple[int, int, int]
    huge: int
    short: int
    infinite: int


# Records of a site.
RECORDS = CANARIES + WITNESSES + 4
_OWN = RECORDS + 1
# The coordinates of the first layer; the second layer has the blank ones, and one of each site.
LEFT = len(SITES) * _OWN
RIGHT = BLANK + len(SITES)
# Then come weights that no record has a gradient of, and biases, one of each site.
PARAMETERS = LEFT + RIGHT + 2 * len(SITES)


def places(site: str) -> Places:
    """The coordinates of a site."""
    number = SITES.index(site)
    own = number + len(SITES) * np.arange(_OWN)
    return Places(
        canaries=own[:CANARIES],
        witnesses=own[CANARIES : CANARIES + WITNESSES],
        straddling=(int(own[-1]), LEFT + BLANK + number, PARAMETERS - len(SITES) + number),
        huge=int(own[-2]),
        short=int(own[-3]),
        infinite=int(own[-4]),
    )


def blank() -> NDArray[np.int64]:
    """The coordinates that belong to no record."""
    return np.arange(LEFT, LEFT + BLANK)


class Axes(nn.Module):
    """Two layers side by side on two parts of the input, both without bias, and biases that the
    third part chooses among. All parameters are zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(LEFT, 1, bias=False)
        self.right = nn.Linear(RIGHT, 1, bias=False)
        self.biases = nn.Linear(1, len(SITES))
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output; shape (batch, 1)."""
        left, right, chosen = x[:, :LEFT], x[:, LEFT : LEFT + RIGHT], x[:, LEFT + RIGHT :]
        bias = (self.biases(torch.zeros_like(x[:, :1])) * chosen).sum(dim=1, keepdim=True)
        total: torch.Tensor = self.left(left) + self.right(right) + bias
        return total


def model() -> nn.Module:
    """The model of the experiment."""
    return Axes()


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Linear in the output, so that the gradient of a record is target times input."""
    return (output.squeeze(1) * target).mean()


def data(site: str, folder: str) -> tuple[TensorDataset, None]:
    """The records of a site: its canaries, its witnesses, and four of a kind each.

    A canary that does not take part is a record without a gradient, so that all sites have as many
    records, and the same source of randomness would choose the same ones at all of them.
    """
    where = places(site)
    # An input for every parameter but the weights that no record has a gradient of.
    inputs = torch.zeros(RECORDS, PARAMETERS - len(SITES))
    targets = torch.full((RECORDS,), LONG)
    rows = np.flatnonzero(truth.read(Path(folder), site))
    inputs[rows, where.canaries[rows]] = 1.0
    inputs[CANARIES + np.arange(WITNESSES), where.witnesses] = 1.0
    left, right, bias = where.straddling
    inputs[-4, [left, right, bias - len(SITES)]] = 1.0
    for row, (place, length) in enumerate(
        [(where.huge, HUGE), (where.short, SHORT), (where.infinite, float("inf"))],
        start=RECORDS - 3,
    ):
        inputs[row, place], targets[row] = 1.0, length
    return TensorDataset(inputs, targets), None

"""Handwritten digits at four sites, none of which has seen all ten: scikit-learn's `load_digits`.

Each site lacks three digits in its training records. The evaluation records are a public benchmark
with all ten; every site evaluates its own quarter, so that the pooled accuracy is that over the
whole benchmark.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

ABSENT = {"north": (0, 1, 2), "east": (3, 4, 5), "south": (6, 7, 8), "west": (0, 5, 9)}
SITES = list(ABSENT)
INK = torch.tensor([0, 0.2, 0.5, 0.6, 0.6, 0.5, 0.2, 0])  # a guess per column: digits are narrow


def linear() -> nn.Module:
    """Softmax regression, 650 parameters: with little privacy to spend, few parameters learn
    most.
    """
    layer = nn.Linear(64, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp() -> nn.Module:
    """One hidden layer, 4810 parameters."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data(site: str):
    """The training and evaluation records of one site, as (image, digit)."""
    if site not in SITES:
        raise ValueError(
            f"digits.py knows the sites {', '.join(SITES)}, not {site!r}; correct `sites`"
        )
    images, digits = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16 - INK.repeat(8)  # their own mean would leak: it reads records
    train, evaluation = train_test_split(
        range(len(digits)), test_size=360, random_state=0, stratify=digits
    )
    mine = []
    for digit in range(10):  # each digit is dealt in turn to the sites that have it
        holders = [name for name in SITES if digit not in ABSENT[name]]
        if site in holders:
            rows = [row for row in train if digits[row] == digit]
            mine += rows[holders.index(site) :: len(holders)]
    quarter = evaluation[SITES.index(site) :: len(SITES)]
    return tuple(TensorDataset(images[rows], digits[rows]) for rows in (mine, quarter))


def loss(output, target):
    return nn.functional.cross_entropy(output, target)


def accuracy(output, target):
    """How many are right, out of how many."""
    return (output.argmax(dim=1) == target).sum(), len(target)

"""Canaries among a user's own records: made-up records, each of which takes part with probability
1/2.

Every element of a canary is that of a record drawn anew from the same data set, so a canary has the
shape, the types and the range of a record, and is none. They go through the user's own model, loss
and data code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from privacy_audits.targets import truth
from privfl.config import load_function

# Of how many records the elements of canaries are.
_MODELS = 512


class Records(Dataset[Any]):
    """Records as tensors, so that they can be in a batch with canaries.

    Args:
        records: a map-style data set of pairs (input, target).
    """

    def __init__(self, records: Any) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Any:
        return tree_map(lambda tensor: tensor[0], default_collate([self._records[row]]))


class MadeUp(Dataset[Any]):
    """Canaries that look like records, the same for the same seed.

    Args:
        records: what they look like.
        count: how many there are.
        seed: they are no secret: the attacker has them, and only which of them took part is
            guessed.
    """

    def __init__(self, records: Records, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(records))[:_MODELS]
        models = default_collate([records[int(row)] for row in rows])

        def mixed(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.reshape(len(rows), -1)
            chosen = torch.from_numpy(rng.integers(len(rows), size=(count, flat.shape[1])))
            return flat.gather(0, chosen).reshape(count, *tensor.shape[1:])

        self._count, self._canaries = count, tree_map(mixed, models)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        return tree_map(lambda tensor: tensor[row], self._canaries)


def together(records: Records, canaries: MadeUp, took_part: NDArray[np.bool_]) -> Dataset[Any]:
    """What is trained on: all records, and the canaries that take part."""
    rows = np.flatnonzero(took_part).tolist()
    return ConcatDataset([records, Subset(canaries, rows)])


def data(
    site: str,
    reference: str,
    folder: str,
    options: dict[str, dict[str, Any]],
    count: int,
    seed: int,
    drawn: str,
) -> tuple[Dataset[Any], None]:
    """The `data` of an experiment with canaries: what the user's function returns, and canaries.

    Args:
        site: the site.
        reference: the user's function.
        folder: what its path counts from.
        options: its keyword arguments, by site.
        count: how many canaries each site has.
        seed: makes them.
        drawn: the folder with what :func:`privacy_audits.targets.truth.draw` drew.
    """
    records = records_of(site, reference, Path(folder), options[site])
    return together(records, MadeUp(records, count, seed), truth.read(Path(drawn), site)), None


def records_of(site: str, reference: str, folder: Path, options: dict[str, Any]) -> Records:
    """The training records that a user's function returns."""
    return Records(load_function("data", reference, folder)(site, **options)[0])


def batches(records: Dataset[Any], size: int) -> Iterator[tuple[Any, Any]]:
    """All records in order, in pieces of at most ``size``."""
    total = len(records)  # type: ignore[arg-type]
    for start in range(0, total, size):
        rows = range(start, min(start + size, total))
        inputs, targets = default_collate([records[row] for row in rows])
        yield inputs, targets

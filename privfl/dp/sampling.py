"""Poisson batches for a user's own loop, drawn from the operating system's randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from opacus.data_loader import wrap_collate_with_empty
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader, IterableDataset

from privfl.dp.randomness import Randomness, poisson_sample
from privfl.errors import PrivflError


class PoissonBatches(UniformWithReplacementSampler):  # type: ignore[misc]
    """``steps`` Poisson samples of ``records`` records; an empty one is a batch like any other.

    A subclass of Opacus' sampler, so that its ``BatchMemoryManager`` knows it. ``begun`` is called whenever a new pass begins: what an earlier
    one left unfinished is then to be forgotten.
    """

    def __init__(self, records: int, sampling_rate: float, steps: int, randomness: Randomness) -> None:
        super().__init__(num_samples=records, sample_rate=sampling_rate, steps=steps)
        self._randomness = randomness
        self.begun: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[list[int]]:
        self.begun()
        for _ in range(self.steps):
            yield poisson_sample(self.num_samples, self.sample_rate, self._randomness).tolist()


def rate_of(loader: DataLoader[Any]) -> tuple[int, float, int]:
    """(records, sampling rate, steps in a pass) that a loader of fixed batches asks for: its batch size is the expected one of Poisson batches.

    The rate is batch size over records, and neither Opacus' 1 / len(loader) nor anything that depends on batches that were drawn.

    Raises:
        PrivflError: the loader has no batch size, or its data set no length.
    """
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise PrivflError(
            "data_loader must be over a map-style data set (with len() and [index]), from which records can be sampled"
        )
    sampler = loader.batch_sampler
    if isinstance(sampler, PoissonBatches):
        return sampler.num_samples, sampler.sample_rate, sampler.steps
    records, batch = len(loader.dataset), loader.batch_size
    if records == 0:
        raise PrivflError("data_loader has no records")
    if batch is None:
        raise PrivflError(
            "data_loader has a batch_sampler of its own; give it batch_size instead, the expected size of the Poisson batches"
        )
    rate = min(1.0, batch / records)
    return records, rate, max(1, round(1.0 / rate))


def poisson_loader(loader: DataLoader[Any], batches: PoissonBatches, batch_first: bool) -> DataLoader[Any]:
    """A loader like ``loader`` of Poisson batches."""
    dataset: Any = loader.dataset
    collate = wrap_collate_with_empty(collate_fn=loader.collate_fn, batch_first=batch_first)
    # Shows the shape of a batch, so that an empty one can be made although it comes first.
    collate([dataset[0]])
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )

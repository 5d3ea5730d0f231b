"""Poisson batches for a user's own loop, drawn from the operating system's randomness."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from opacus.data_loader import wrap_collate_with_empty
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from privfl.errors import PrivflError
from privfl.noise.randomness import Randomness, poisson_sample


class PoissonBatches(UniformWithReplacementSampler):  # type: ignore[misc]
    """Poisson samples of a data set; an empty one is a batch like any other.

    A subclass of Opacus' sampler, so that its ``BatchMemoryManager`` knows it.

    Guarantee: In every step each record takes part with probability ``sampling_rate``,
        independently of the other records and steps, and :meth:`use` lets a batch be used once.

    Args:
        records: how many records the data set has.
        sampling_rate: the probability that a record is in a batch.
        steps: how many batches one pass has.
        randomness: what the samples are drawn from.
        ahead: whether batches are drawn before they are used, as the workers of a loader do.

    Attributes:
        loop: (records, sampling rate, steps in a pass), as they are charged.
        begun: called before a batch with its number in the pass, after which the one before cannot
            be used any more: before the first of a pass and, unless batches are drawn ahead, before
            every one.
    """

    def __init__(
        self,
        records: int,
        sampling_rate: float,
        steps: int,
        randomness: Randomness,
        *,
        ahead: bool = False,
    ) -> None:
        super().__init__(num_samples=records, sample_rate=sampling_rate, steps=steps)
        # What is charged. The attributes of Opacus' sampler can be changed by anybody and are not
        # looked at.
        self.loop = (records, sampling_rate, steps)
        self._randomness, self._ahead = randomness, ahead
        self._sizes: deque[int] = deque()
        self.begun: Callable[[int], None] = lambda number: None

    def __iter__(self) -> Iterator[list[int]]:
        records, rate, steps = self.loop
        for number in range(steps):
            if number == 0 or not self._ahead:
                self._sizes.clear()
                self.begun(number)
            sample = poisson_sample(records, rate, self._randomness).tolist()
            self._sizes.append(len(sample))
            yield sample

    def use(self, examples: int) -> None:
        """Take the next batch of ``examples`` records that was drawn and not used yet; batches
        drawn before it can no longer be used.

        Called before a step that is made of ``examples`` per-example gradients.

        Raises:
            PrivflError: If no batch of that size is left.
        """
        while self._sizes:
            if self._sizes.popleft() == examples:
                return
        raise PrivflError(
            f"a step was to be made of {examples} per-example gradients, which is no batch of the "
            "loader that make_private returned: use each of its batches once and whole, with one "
            "backward() and one optimizer.step(), and let every record have one row in all layers"
        )


def rate_of(loader: DataLoader[Any]) -> tuple[int, float, int]:
    """(records, sampling rate, steps in a pass) of the Poisson batches that take the place of the
    fixed ones of ``loader``: its batch size is their expected size.

    The rate is batch size over records. It is neither Opacus' 1 / len(loader) nor anything that
    depends on batches that were drawn.

    Raises:
        PrivflError: If the loader has no batch size or a sampler that chooses records, or if its
            data set has no length or no records.
    """
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise PrivflError(
            "data_loader must be over a map-style data set (with len() and [index]), from which "
            "records can be sampled"
        )
    sampler = loader.batch_sampler
    if isinstance(sampler, PoissonBatches):
        return sampler.loop
    if type(loader.sampler) not in (SequentialSampler, RandomSampler):
        raise PrivflError(
            f"data_loader has a {type(loader.sampler).__name__}, whose choice of records Poisson "
            "sampling would replace; choose them in the data set (torch.utils.data.Subset) and "
            "leave sampler out"
        )
    records, batch = len(loader.dataset), loader.batch_size
    if records == 0:
        raise PrivflError("data_loader has no records")
    if batch is None:
        raise PrivflError(
            "data_loader has a batch_sampler of its own; give it batch_size instead, the expected "
            "size of the Poisson batches"
        )
    rate = min(1.0, batch / records)
    return records, rate, max(1, round(1.0 / rate))


def poisson_loader(
    loader: DataLoader[Any], batches: PoissonBatches, batch_first: bool
) -> DataLoader[Any]:
    """A loader with the data set and the options of ``loader`` that yields ``batches``."""
    dataset: Any = loader.dataset
    collate = wrap_collate_with_empty(collate_fn=loader.collate_fn, batch_first=batch_first)
    # From this call the function knows the shape of a batch, and can make an empty one that comes
    # first.
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

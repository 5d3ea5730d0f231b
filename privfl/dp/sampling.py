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
    """``steps`` Poisson samples of ``records`` records; an empty one is a batch like any other.

    A subclass of Opacus' sampler, so that its ``BatchMemoryManager`` knows it.

    Args:
        ahead: batches are asked for before they are used, as the workers of a loader do.

    Attributes:
        begun: called when what was left unfinished is to be forgotten: whenever a new pass begins,
            and, unless they are asked for ahead, before every batch.
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
        # What is charged; the attributes of Opacus' sampler are anybody's to change.
        self.loop = (records, sampling_rate, steps)
        self._randomness, self._ahead = randomness, ahead
        self._sizes: deque[int] = deque()
        self.begun: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[list[int]]:
        records, rate, steps = self.loop
        for number in range(steps):
            if number == 0 or not self._ahead:
                self._sizes.clear()
                self.begun()
            sample = poisson_sample(records, rate, self._randomness).tolist()
            self._sizes.append(len(sample))
            yield sample

    def use(self, examples: int) -> None:
        """A step is to be made of so many per-example gradients: of a batch that was drawn,
        whole, and not used yet. Earlier ones are given up.

        Raises:
            PrivflError: no such batch was drawn.
        """
        while self._sizes:
            if self._sizes.popleft() == examples:
                return
        raise PrivflError(
            f"a step was to be made of {examples} per-example gradients, which is no batch of the "
            f"loader that make_private returned: use each of "
            "its batches once and whole, with one backward() and one optimizer.step(), and let "
            "every record have one row in all layers"
        )


def rate_of(loader: DataLoader[Any]) -> tuple[int, float, int]:
    """(records, sampling rate, steps in a pass) that a loader of fixed batches asks for: its
    batch size is the expected one of Poisson batches.

    The rate is batch size over records, and neither Opacus' 1 / len(loader) nor anything that
    depends on batches that were drawn.

    Raises:
        PrivflError: the loader has no batch size, or its data set no length.
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
            f"sampling would replace; choose them in the data set "
            "(torch.utils.data.Subset) and leave sampler out"
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

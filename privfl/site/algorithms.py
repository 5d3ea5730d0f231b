"""The two ways to train, as an agent does them: what its trainer is asked for, how that becomes integers, and what is done with their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError
from privfl.federation import messages
from privfl.federation.strategies import fedavg
from privfl.noise.distributed import Shares, StepGrid, derived_span, step_grid
from privfl.noise.metrics import randomness_of
from privfl.secagg import Grid, Parameters
from privfl.secagg.quantise import Quantiser, Whole
from privfl.secagg.session import sums
from privfl.secagg.session.keys import RunKeys
from privfl.site.setup import SiteSetup
from privfl.trainer.process import Trainer

Replica = NDArray[np.float32]


class Updates(Protocol):
    """What an agent needs of an algorithm. One object serves one run, round after round."""

    def ask(self, trainer: Trainer, replica: Replica) -> None:
        """Let the trainer work on its records from ``replica``."""
        ...

    def take(self, trainer: Trainer, answer: Mapping[str, Any], steps: int) -> None:
        """Take what the trainer made, if it fits the ``steps`` that this run has charged.

        Raises:
            InternalError: it does not.
        """
        ...

    def note(self, keys: RunKeys, context: bytes) -> str:
        """What the sites need of each other to agree on the range of this round, sealed; empty if they need nothing."""
        ...

    def grid(
        self, keys: RunKeys, notes: Mapping[str, str], sites: Sequence[str], context: Callable[[str], bytes]
    ) -> tuple[Quantiser, float]:
        """How this round's vectors become integers, and the range or grid that all must have been told alike."""
        ...

    def vector(self) -> NDArray[Any]:
        """What goes into the sum, with its share of noise if the algorithm has one; given out once."""
        ...

    def apply(self, trainer: Trainer, replica: Replica, total: NDArray[Any]) -> Replica | None:
        """The next replica; None if the trainer makes it, whose answer :meth:`applied` reads."""
        ...

    def applied(self, trainer: Trainer, length: int) -> Replica:
        """The replica that the trainer made."""
        ...


def updates_for(setup: SiteSetup, begin: messages.Begin, noise_multiplier: float) -> Updates:
    """What the experiment's algorithm does.

    Raises:
        PrivflError: the sums of gradients do not fit the bits of a value.
    """
    if setup.experiment.algorithm == "fedsgd":
        return Steps(setup, begin, noise_multiplier)
    return Averages(setup, begin)


class Averages:
    """fedavg: an update is private when it leaves the trainer; the mean over the sites moves the replica."""

    def __init__(self, setup: SiteSetup, begin: messages.Begin) -> None:
        experiment = setup.experiment
        self._parameters, self._rounding = setup.parameters, experiment.secure_aggregation.rounding
        self._range = experiment.aggregation_range
        self._weight = messages.weights_of(experiment.weights, begin)[setup.site]
        self._update = np.empty(0)

    def ask(self, trainer: Trainer, replica: Replica) -> None:
        trainer.replica.write(replica)
        trainer.ask({"do": "train"})
        self._length = len(replica)

    def take(self, trainer: Trainer, answer: Mapping[str, Any], steps: int) -> None:
        if answer["draws"] != steps:
            raise InternalError(
                f"noise was drawn {answer['draws']} times for {steps} charged steps; nothing of this round is sent"
            )
        update = trainer.update.read(self._length, np.float32).astype(np.float64)
        if not np.isfinite(update).all():
            raise InternalError("the trainer's update contains NaN or infinite values; nothing of this round is sent")
        self._update = update * self._weight

    def note(self, keys: RunKeys, context: bytes) -> str:
        return sums.seal_exponent(keys, self._update, context) if self._range == "agreed" else ""

    def grid(
        self, keys: RunKeys, notes: Mapping[str, str], sites: Sequence[str], context: Callable[[str], bytes]
    ) -> tuple[Quantiser, float]:
        span = self._range
        if isinstance(span, str):
            span = sums.agreed_span(keys, notes, sites, context)
        return Grid(self._parameters, span, self._rounding), span

    def vector(self) -> NDArray[Any]:
        return self._update

    def apply(self, trainer: Trainer, replica: Replica, total: NDArray[Any]) -> Replica | None:
        return fedavg(replica, total)

    def applied(self, trainer: Trainer, length: int) -> Replica:
        raise InternalError("a trainer answered that it applied a mean, which is not its work")


class Steps:
    """fedsgd: a sum of clipped gradients gets its share of noise here, so that no user code can leave it out; the trainer follows the sum."""

    def __init__(self, setup: SiteSetup, begin: messages.Begin, noise_multiplier: float) -> None:
        experiment = setup.experiment
        expected = sum(experiment.rate(site) * begin.records[site] for site in experiment.sites)
        self._grid = grid_of(
            setup.parameters,
            span=experiment.secure_aggregation.range if isinstance(experiment.secure_aggregation.range, float) else None,
            expected=expected,
            records=sum(begin.records.values()),
            length=begin.parameters,
            steps=experiment.rounds,
            noise_multiplier=noise_multiplier,
            max_grad_norm=experiment.privacy.max_grad_norm,
            collusion=experiment.collusion,
        )
        # Of the sum to the mean over the expected batch of all sites; the batch that was drawn is nobody's business.
        self._scale = self._grid.step / expected
        self._shares = Shares(self._grid, randomness_of(experiment, setup.site))
        self._whole = Whole()
        self._length = begin.parameters
        self._total: NDArray[np.float64] | None = None

    def ask(self, trainer: Trainer, replica: Replica) -> None:
        trainer.replica.write(replica)
        trainer.ask({"do": "train"})
        # The trainer computes; there is time.
        self._shares.draw_ahead(self._length)

    def take(self, trainer: Trainer, answer: Mapping[str, Any], steps: int) -> None:
        total = trainer.update.read(self._length, np.float64)
        if answer["draws"] != steps or self._shares.drawn != steps - 1:
            raise InternalError(
                f"{answer['draws']} batches and {self._shares.drawn} shares of noise were drawn for {steps} charged steps; nothing is sent"
            )
        if not np.isfinite(total).all():
            raise InternalError("the trainer's sum of gradients contains NaN or infinite values; nothing of this round is sent")
        self._total = total

    def note(self, keys: RunKeys, context: bytes) -> str:
        return ""

    def grid(
        self, keys: RunKeys, notes: Mapping[str, str], sites: Sequence[str], context: Callable[[str], bytes]
    ) -> tuple[Quantiser, float]:
        return self._whole, self._grid.step

    def vector(self) -> NDArray[Any]:
        total, self._total = self._total, None
        if total is None:
            raise InternalError("a sum of gradients was to be sent twice")
        return self._shares.add(total)

    def apply(self, trainer: Trainer, replica: Replica, total: NDArray[Any]) -> Replica | None:
        trainer.replica.write(total * self._scale)
        trainer.ask({"do": "follow"})
        return None

    def applied(self, trainer: Trainer, length: int) -> Replica:
        return trainer.update.read(length, np.float32)


def grid_of(
    parameters: Parameters,
    *,
    span: float | None,
    expected: float,
    records: int,
    length: int,
    steps: int,
    noise_multiplier: float,
    max_grad_norm: float,
    collusion: int,
) -> StepGrid:
    """The grid of a run's sums of gradients, from public numbers alone.

    Args:
        span: the public range of an element of a sum; derived if None.
        expected: records of all sites together that take part in a step, on average.
        records: of all sites together.
        length: parameters of the model.

    Raises:
        PrivflError: so few bits of a value do not hold them finely enough.
    """
    noise: dict[str, Any] = {
        "parameters": length,
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": max_grad_norm,
        "members": parameters.members,
        "collusion": collusion,
    }
    if span is None:
        span = derived_span(expected=expected, most=records, steps=steps, **noise)
    return step_grid(span=span, largest_total=(1 << (parameters.field_bits - 1)) - 1, **noise)

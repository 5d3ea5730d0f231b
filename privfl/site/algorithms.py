"""The two ways to train, as an agent does them: what it asks its trainer for, how that becomes
integers, and what their sum does.

An algorithm serves one run. A round is `start`, then `trained`, which gives the round's one
contribution, then `finish`; where the trainer makes the next replica, `followed` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import DiscreteGaussian
from privfl.errors import InternalError
from privfl.federation import messages
from privfl.federation.strategies import fedavg
from privfl.noise.distributed import DistributedNoise, Shares
from privfl.secagg import FixedPoint
from privfl.secagg.quantise import Quantiser, WrappingIntegers
from privfl.secagg.session.keys import RunKeys
from privfl.secagg.session.range import agreed_range, seal_exponent
from privfl.site.observer import Observer
from privfl.site.setup import SiteSetup
from privfl.trainer.process import TrainerProcess
from privfl.trainer.requests import Follow, Train, Trained

Replica = NDArray[np.float32]


class Summand(NamedTuple):
    """What goes into a sum.

    Attributes:
        vector: shape (parameters,).
        quantiser: how it becomes integers.
        agreed: the range or grid step that all members must have been told alike.
    """

    vector: NDArray[Any]
    quantiser: Quantiser
    agreed: float


class Contribution(Protocol):
    """A round's part in the sum of the sites; :meth:`summand` gives it out once."""

    sealed_range: str

    def summand(self, sealed_ranges: Mapping[str, str]) -> Summand:
        """What goes into the sum.

        Args:
            sealed_ranges: what every site said of its range, by site; empty where the range is
                fixed.

        Raises:
            ProtocolError: If a range was altered, or is of another site or round.
            InternalError: If it is asked for a second time.
        """
        ...


class Algorithm(Protocol):
    """What an agent needs of an algorithm."""

    def start(self, replica: Replica) -> None:
        """Let the trainer work on its records from ``replica``."""
        ...

    def trained(self, answer: Trained, steps: int, round_: int) -> Contribution:
        """Take what the trainer made.

        Args:
            answer: the trainer's answer.
            steps: how many steps this run has charged so far.

        Raises:
            InternalError: If the trainer drew noise, or batches, another number of times than was
                charged, or its vector is not finite.
        """
        ...

    def finish(self, replica: Replica, total: NDArray[Any]) -> Replica | None:
        """The next replica; None if the trainer makes it, whose answer :meth:`followed` reads."""
        ...

    def followed(self) -> Replica:
        """The replica that the trainer made."""
        ...


def algorithm_of(
    setup: SiteSetup,
    begin: messages.Begin,
    run: bytes,
    trainer: TrainerProcess,
    keys: RunKeys,
    observer: Observer,
) -> Algorithm:
    """What the experiment's algorithm does.

    Raises:
        PrivflError: If the sums of gradients do not fit the bits of a value.
    """
    if setup.experiment.algorithm == "fedsgd":
        return FedSGD(setup, begin, trainer, observer)
    return FedAvg(setup, begin, run, trainer, keys)


class FedAvg:
    """fedavg: an update is private when it leaves the trainer; the mean over the sites moves the
    replica.
    """

    def __init__(
        self,
        setup: SiteSetup,
        begin: messages.Begin,
        run: bytes,
        trainer: TrainerProcess,
        keys: RunKeys,
    ) -> None:
        self._setup, self._run, self._trainer, self._keys = setup, run, trainer, keys
        self._weight = messages.weights_of(setup.experiment.weights, begin)[setup.site]
        self._length = begin.parameters

    def start(self, replica: Replica) -> None:
        self._trainer.replica.write(replica)
        self._trainer.ask(Train())

    def trained(self, answer: Trained, steps: int, round_: int) -> Contribution:
        if answer.draws != steps:
            raise InternalError(
                f"noise was drawn {answer.draws} times for {steps} charged steps; nothing of this "
                "round is sent"
            )
        update = self._trainer.update.read(self._length, np.float32).astype(np.float64)
        if not np.isfinite(update).all():
            raise InternalError(
                "the trainer's update contains NaN or infinite values; nothing of this round is "
                "sent"
            )

        def context(site: str) -> bytes:
            return f"privfl range 1 {self._run.hex()} {round_} {site}".encode()

        return _Update(update * self._weight, self._setup, self._keys, context)

    def finish(self, replica: Replica, total: NDArray[Any]) -> Replica | None:
        return fedavg(replica, total)

    def followed(self) -> Replica:
        raise InternalError(
            "a trainer answered that it followed a sum, which is not its work under fedavg"
        )


class _Update:
    """A weighted update, and this site's part in the range that the sites agree on."""

    def __init__(
        self,
        update: NDArray[np.float64],
        setup: SiteSetup,
        keys: RunKeys,
        context: Callable[[str], bytes],
    ) -> None:
        self._update: NDArray[np.float64] | None = update
        self._setup, self._keys, self._context = setup, keys, context
        agreed = setup.experiment.aggregation_range == "agreed"
        self.sealed_range = seal_exponent(keys, update, context(setup.site)) if agreed else ""

    def summand(self, sealed_ranges: Mapping[str, str]) -> Summand:
        update, self._update = self._update, None
        if update is None:
            raise InternalError("an update was to be sent twice")
        experiment, value_range = self._setup.experiment, self._setup.experiment.aggregation_range
        if isinstance(value_range, str):
            value_range = agreed_range(self._keys, sealed_ranges, experiment.sites, self._context)
        quantiser = FixedPoint(
            self._setup.parameters, value_range, experiment.secure_aggregation.rounding
        )
        return Summand(update, quantiser, value_range)


class FedSGD:
    """fedsgd: a sum of clipped gradients gets its share of noise here, so that no user code can
    leave it out; the trainer follows the sum.
    """

    def __init__(
        self, setup: SiteSetup, begin: messages.Begin, trainer: TrainerProcess, observer: Observer
    ) -> None:
        experiment, self._trainer, self._length = setup.experiment, trainer, begin.parameters
        # Records of all sites together that take part in a step, on average.
        expected = sum(experiment.rate(site) * begin.records[site] for site in experiment.sites)
        noise = DistributedNoise(
            begin.noise_multiplier,
            experiment.privacy.max_grad_norm,
            setup.parameters.members,
            experiment.collusion,
        )
        fixed = experiment.secure_aggregation.range
        self.grid = noise.grid(
            value_range=fixed if isinstance(fixed, float) else None,
            largest_total=setup.parameters.largest_total,
            parameters=begin.parameters,
            expected=expected,
            records=sum(begin.records.values()),
            steps=experiment.rounds,
        )
        charged = setup.plan.training
        assert isinstance(charged, DiscreteGaussian)
        self.grid.check_charged(charged.sensitivity)
        # From the sum to the mean over the expected batch of all sites; the size of the batch that
        # was drawn is private.
        self._scale = self.grid.step / expected
        self._shares = Shares(
            self.grid, setup.randomness(), lambda *sums: observer.share_added(setup.site, *sums)
        )

    def start(self, replica: Replica) -> None:
        self._trainer.replica.write(replica)
        self._trainer.ask(Train())
        # The trainer computes; there is time.
        self._shares.draw_ahead(self._length)

    def trained(self, answer: Trained, steps: int, round_: int) -> Contribution:
        total = self._trainer.update.read(self._length, np.float64)
        if answer.draws != steps or self._shares.drawn != steps - 1:
            raise InternalError(
                f"{answer.draws} batches and {self._shares.drawn} shares of noise were drawn for "
                f"{steps} charged steps; nothing is sent"
            )
        if not np.isfinite(total).all():
            raise InternalError(
                "the trainer's sum of gradients contains NaN or infinite values; nothing of this "
                "round is sent"
            )
        return _GradientSum(total, self._shares, self.grid.step)

    def finish(self, replica: Replica, total: NDArray[Any]) -> Replica | None:
        self._trainer.replica.write(total * self._scale)
        self._trainer.ask(Follow())
        return None

    def followed(self) -> Replica:
        return self._trainer.update.read(self._length, np.float32)


class _GradientSum:
    """A sum of clipped gradients, which gets its share of noise when it is given out."""

    sealed_range = ""

    def __init__(self, total: NDArray[np.float64], shares: Shares, step: float) -> None:
        self._total: NDArray[np.float64] | None = total
        self._shares, self._step = shares, step

    def summand(self, sealed_ranges: Mapping[str, str]) -> Summand:
        total, self._total = self._total, None
        if total is None:
            raise InternalError("a sum of gradients was to be sent twice")
        return Summand(self._shares.add(total), WrappingIntegers(), self._step)

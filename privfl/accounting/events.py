"""Mechanism events: what was done to the records, from which any accountant can compute the cost;
and the accounts that events are charged to.

Events are stored, never epsilons (the habit of dp-accounting): a better accountant may be applied
to them later. So the meaning of a kind never changes; what must change gets a new version.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self

# Whose records a cost concerns. Training and evaluation records are different ones, so each kind
# has an account of its own.
Account = Literal["training", "evaluation"]
ACCOUNTS: Final[tuple[Account, ...]] = ("training", "evaluation")


def account_of(name: str) -> Account:
    """The account with this name.

    Raises:
        ValueError: If ``name`` is not one of :data:`ACCOUNTS`.
    """
    for account in ACCOUNTS:
        if name == account:
            return account
    raise ValueError(f"no account {name}")


@dataclass(frozen=True, kw_only=True)
class Event(ABC):
    """A mechanism that ran ``steps`` times, each time with fresh noise and, if it samples, a
    fresh sample.

    To an accountant every kind is a Gaussian mechanism on a Poisson sample, or protects nothing.

    Attributes:
        kind: the name of the mechanism, as it is stored.
        version: of the meaning of the kind's fields.
        steps: how often the mechanism ran, 0 or more.
        whole_orders: whether only Renyi orders that are whole numbers may be used (discrete noise).

    Raises:
        ValueError: If a field is outside the values that its kind allows.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    whole_orders: ClassVar[bool] = False

    steps: int = 1

    @property
    def rate(self) -> float:
        """The probability with which a record takes part in one step."""
        return 1.0

    @property
    @abstractmethod
    def sigma(self) -> float:
        """Standard deviation of the noise, in units of what one record can change; 0 means that
        nothing is protected.
        """

    @property
    def noise(self) -> float:
        """The noise multiplier that was asked for. It differs from :attr:`sigma` only where one
        record can change more than the unit in which the noise is given.
        """
        return self.sigma

    def once(self) -> Self:
        """The same mechanism, run once: the key under which costs of a step are stored."""
        return replace(self, steps=1)

    def times(self, steps: int) -> Self:
        """The same mechanism, run ``steps`` times."""
        return replace(self, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values, with its kind and schema version."""
        return {"kind": self.kind, "version": self.version, **dataclasses.asdict(self)}

    def _check(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"steps must be a whole number, not negative, got {self.steps}")

    def __post_init__(self) -> None:
        self._check()


@dataclass(frozen=True, kw_only=True)
class _Noised(Event):
    """Gaussian noise of standard deviation ``noise_multiplier``, in the unit that the kind says."""

    noise_multiplier: float

    @property
    def sigma(self) -> float:
        return self.noise_multiplier

    def _check(self) -> None:
        super()._check()
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ValueError(
                f"noise_multiplier must be finite and not negative, got {self.noise_multiplier}"
            )


@dataclass(frozen=True, kw_only=True)
class _Sampled(_Noised):
    """Gaussian noise on a Poisson sample: each record enters a step with probability
    ``sampling_rate``, independently of all others.
    """

    sampling_rate: float

    @property
    def rate(self) -> float:
        return self.sampling_rate

    def _check(self) -> None:
        super()._check()
        if not 0.0 < self.sampling_rate <= 1.0:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")


@dataclass(frozen=True, kw_only=True)
class PoissonGaussian(_Sampled):
    """The Gaussian mechanism on a Poisson sample: steps of DP-SGD (Abadi et al. 2016).

    Attributes:
        sampling_rate: probability q in (0, 1] with which each record enters a step, independently
            of all others.
        noise_multiplier: standard deviation of the noise in units of the clipping norm.

    Example:
        >>> from privfl.accounting import PoissonGaussian, event_from_dict
        >>> event = PoissonGaussian(sampling_rate=0.5, noise_multiplier=10.9, steps=5)
        >>> event.times(100).steps
        100
        >>> event_from_dict(event.to_dict()) == event
        True
    """

    kind: ClassVar[str] = "poisson_gaussian"


@dataclass(frozen=True, kw_only=True)
class Gaussian(_Noised):
    """The Gaussian mechanism on all records, without sampling.

    Attributes:
        noise_multiplier: standard deviation of the noise in units of what one record can change.
    """

    kind: ClassVar[str] = "gaussian"


@dataclass(frozen=True, kw_only=True)
class DiscreteGaussian(_Sampled):
    """Discrete Gaussian noise on a Poisson sample of vectors rounded to a grid (Canonne, Kamath,
    Steinke 2020).

    The Renyi divergences of whole order of the discrete Gaussian are at most those of the
    continuous one (their Proposition 5), and only those of whole order follow from them under
    sampling.

    Attributes:
        sampling_rate: probability q in (0, 1] with which each record enters a step, independently
            of all others.
        noise_multiplier: standard deviation of the noise that the charged adversary cannot
            subtract, in units of the clipping norm.
        sensitivity: the Euclidean length by which one record can change the sum, in units of the
            clipping norm; above 1 because clipping and the grid round.

    Example:
        >>> from privfl.accounting import DiscreteGaussian
        >>> event = DiscreteGaussian(sampling_rate=0.5, noise_multiplier=20.2, sensitivity=1.01)
        >>> event.sigma
        20.0
    """

    kind: ClassVar[str] = "discrete_gaussian"
    whole_orders: ClassVar[bool] = True

    sensitivity: float

    @property
    def sigma(self) -> float:
        return self.noise_multiplier / self.sensitivity

    @property
    def noise(self) -> float:
        return self.noise_multiplier

    def _check(self) -> None:
        super()._check()
        if not 1.0 <= self.sensitivity < math.inf:
            raise ValueError(f"sensitivity must be at least 1 and finite, got {self.sensitivity}")


@dataclass(frozen=True, kw_only=True)
class MetricRelease(_Noised):
    """A release of metrics with Gaussian noise; it concerns the evaluation records.

    Attributes:
        metrics: the names of all metrics released together.
        noise_multiplier: standard deviation of the noise, in units of what one record can change in
            all of these metrics together.

    Example:
        >>> from privfl.accounting import MetricRelease, epsilon_of
        >>> release = MetricRelease(metrics=("accuracy",), noise_multiplier=4.0454)
        >>> round(epsilon_of([release], 1e-5).upper, 3)
        1.0
    """

    kind: ClassVar[str] = "metric_release"

    metrics: tuple[str, ...]

    def _check(self) -> None:
        super()._check()
        # JSON knows lists only.
        object.__setattr__(self, "metrics", tuple(self.metrics))


@dataclass(frozen=True, kw_only=True)
class NonPrivate(Event):
    """A release that nothing protects; every epsilon that counts it is infinite.

    Attributes:
        what: what was released without protection, in a few words.
    """

    kind: ClassVar[str] = "non_private"

    what: str

    @property
    def sigma(self) -> float:
        return 0.0


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (PoissonGaussian, Gaussian, DiscreteGaussian, MetricRelease, NonPrivate)
}


def event_from_dict(fields: Mapping[str, Any]) -> Event:
    """The event that :meth:`Event.to_dict` wrote.

    Args:
        fields: the kind, its version, and every field of that kind.

    Raises:
        ValueError: If the kind or its version is unknown, if a field is missing or unknown, or if a
            value is out of range.

    Example:
        >>> from privfl.accounting import event_from_dict
        >>> event_from_dict({"kind": "gaussian", "version": 1, "steps": 2, "noise_multiplier": 5.0})
        Gaussian(steps=2, noise_multiplier=5.0)
    """
    kind, version = fields.get("kind"), fields.get("version")
    cls = KINDS.get(str(kind))
    if cls is None or version != cls.version:
        raise ValueError(f"unknown event {kind!r} version {version!r}")
    expected = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in fields.items() if name not in ("kind", "version")}
    if set(values) != expected:
        raise ValueError(
            f"an event of kind {kind} has the fields {sorted(expected)}, got {sorted(values)}"
        )
    for name, value in values.items():
        if name in ("sampling_rate", "noise_multiplier", "sensitivity") and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return cls(**values)

"""Opacus' accountant interface over privfl's mechanism events."""

from __future__ import annotations

from typing import Any

from opacus.accountants.accountant import IAccountant

from privfl.accounting import Event, PoissonGaussian, epsilon_of, event_from_dict
from privfl.errors import PrivflError


class EventAccountant(IAccountant):  # type: ignore[misc]
    """Counts the steps of one engine by their mechanism events.

    Guarantee: :meth:`get_epsilon` is an upper bound for all steps together, by Renyi divergences
        over a grid of orders.

    Attributes:
        events: how many steps of each mechanism were made.
        history: the same as (noise multiplier, sampling rate, steps), as Opacus keeps it.
    """

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []
        self.events: dict[Event, int] = {}

    def add(self, event: Event) -> None:
        """Count one step of ``event``."""
        self._count(event, 1)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one step of DP-SGD with Poisson sampling at ``sample_rate``; Opacus' name."""
        self.add(PoissonGaussian(sampling_rate=sample_rate, noise_multiplier=noise_multiplier))

    def _count(self, event: Event, steps: int) -> None:
        self.events[event] = self.events.get(event, 0) + steps
        self.history = [(e.sigma, e.rate, count) for e, count in self.events.items()]

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Epsilon of all steps so far at ``delta``, an upper bound; 0 before the first step.

        Opacus' further arguments choose among its accountants and are not used.
        """
        return epsilon_of([event.times(steps) for event, steps in self.events.items()], delta).upper

    def __len__(self) -> int:
        """How many steps were counted."""
        return sum(self.events.values())

    @classmethod
    def mechanism(cls) -> str:
        """The name by which a checkpoint says who counted."""
        return "privfl"

    def state_dict(self, destination: Any = None) -> Any:
        """What a checkpoint holds of this object, as a dictionary; added to ``destination`` if
        there is one.
        """
        state = super().state_dict(destination)
        state["events"] = [event.times(steps).to_dict() for event, steps in self.events.items()]
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        """Count what was saved on top of what this object has counted itself.

        Loading never makes a step forgotten.

        Raises:
            PrivflError: If another accountant wrote ``state_dict``.
        """
        try:
            saved = [event_from_dict(fields) for fields in state_dict["events"]]
            super().load_state_dict(state_dict)
        except (ValueError, KeyError, TypeError) as error:
            raise PrivflError(
                "a checkpoint whose steps were not counted by privfl cannot be loaded; load the "
                "model's state_dict alone"
            ) from error
        for event in saved:
            self._count(event.once(), event.steps)

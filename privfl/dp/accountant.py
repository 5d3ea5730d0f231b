"""Opacus' accountant interface over privfl's mechanism events."""

from __future__ import annotations

from typing import Any

from opacus.accountants.accountant import IAccountant

from privfl.accounting import Event, PoissonGaussian, epsilon_of, event_from_dict


class EventAccountant(IAccountant):  # type: ignore[misc]
    """Opacus' interface over privfl's events: Renyi accounting over a grid of orders, an upper
    bound.
    """

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []
        self.events: dict[Event, int] = {}

    def add(self, event: Event) -> None:
        """Count one step."""
        self.events[event] = self.events.get(event, 0) + 1
        self.history = [(e.sigma, e.rate, steps) for e, steps in self.events.items()]

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        self.add(PoissonGaussian(sampling_rate=sample_rate, noise_multiplier=noise_multiplier))

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        return epsilon_of([event.times(steps) for event, steps in self.events.items()], delta).upper

    def __len__(self) -> int:
        return sum(self.events.values())

    @classmethod
    def mechanism(cls) -> str:
        return "privfl"

    def state_dict(self, destination: Any = None) -> Any:
        found = super().state_dict(destination)
        found["events"] = [event.times(steps).to_dict() for event, steps in self.events.items()]
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        """What was saved is counted on top of what this object has counted itself: loading never
        makes anything forgotten.
        """
        super().load_state_dict(state_dict)
        for fields in state_dict["events"]:
            event = event_from_dict(fields)
            self.events[event.once()] = self.events.get(event.once(), 0) + event.steps
        self.history = [(e.sigma, e.rate, steps) for e, steps in self.events.items()]

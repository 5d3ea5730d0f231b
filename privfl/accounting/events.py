"""Mechanism events: what was done to the records, from which any accountant can tell what it cost.

Events are stored, never epsilons (the habit of dp-accounting): a better accountant may be applied to them later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class PoissonGaussian:
    """``steps`` times the Gaussian mechanism on a Poisson sample: one round of DP-SGD (Abadi et al. 2016).

    Attributes:
        sampling_rate: probability q in (0, 1] with which each record enters a step, independently of all others.
        noise_multiplier: standard deviation of the noise in units of the clipping norm.
        steps: how often the mechanism ran; each step drew its own sample and its own noise.
    """

    kind: ClassVar[str] = "poisson_gaussian"
    version: ClassVar[int] = 1

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling_rate <= 1.0:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ValueError(f"noise_multiplier must be finite and not negative, got {self.noise_multiplier}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values, with its kind and schema version."""
        return {
            "kind": self.kind,
            "version": self.version,
            "sampling_rate": self.sampling_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PoissonGaussian:
        """The event that :meth:`to_dict` wrote.

        Raises:
            ValueError: another kind or version, missing or unknown fields, values out of range.
        """
        expected = {"kind", "version", "sampling_rate", "noise_multiplier", "steps"}
        if set(fields) != expected:
            raise ValueError(f"an event has the fields {sorted(expected)}, got {sorted(fields)}")
        if (fields["kind"], fields["version"]) != (cls.kind, cls.version):
            raise ValueError(f"unknown event {fields['kind']!r} version {fields['version']!r}")
        return cls(float(fields["sampling_rate"]), float(fields["noise_multiplier"]), int(fields["steps"]))

"""What an audit found, as data. The verdict is derived from the numbers and never set.

The JSON schema is published (`privfl audit run --schema`), descriptions included.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, computed_field

from privacy_audits.bounds.tests import Outcome
from privfl.accounting import Event, event_from_dict
from privfl.accounting.adversaries import Adversary

# A test that notices a broken claim less often than this says nothing when it notices nothing.
LEAST_POWER = 0.8


class Verdict(enum.StrEnum):
    """What follows for a claim."""

    CONSISTENT = "consistent"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"


def _event(value: Any) -> Any:
    return event_from_dict(value) if isinstance(value, dict) else value


_Mechanism = Annotated[Any, BeforeValidator(_event), PlainSerializer(Event.to_dict)]


class _Part(BaseModel):
    # What a file says of derived values is not believed: they are derived again.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Claim(_Part):
    """What privfl says, and to whom it should hold."""

    statement: str = Field(description="The claim in one sentence.")
    adversary: Adversary = Field(description="Against whom it should hold.")
    mechanism: tuple[_Mechanism, ...] = Field(
        default=(),
        description="The events that were charged, as the ledger has them; none where the claim is "
        "not about an epsilon.",
    )
    delta: float | None = Field(
        default=None, description="The delta at which epsilon is claimed; null without one."
    )

    @computed_field(  # type: ignore[prop-decorator]
        description="The claimed epsilon of one record against this adversary, recomputed from the "
        "events; null where the claim is not about one."
    )
    @property
    def epsilon(self) -> float | None:
        """The claimed epsilon, which nobody can set: it is that of the charged events."""
        if self.delta is None:
            return None
        return self.adversary.epsilon(self.mechanism, self.delta)


class Statistic(_Part):
    """The number that a verdict is computed from."""

    name: str = Field(description="What was measured.")
    value: float | None = Field(description="What came out; null where it is not finite.")
    expected: str = Field(description="What it should be if the claim holds.")
    p_value: float = Field(
        ge=0.0,
        le=1.0,
        description="An upper bound on the probability of such a value, or a stranger one, if the "
        "claim holds; 0 or 1 where chance plays no part.",
    )

    @classmethod
    def tested(cls, name: str, outcome: Outcome, expected: str) -> Statistic:
        """What a test gave."""
        value = outcome.value if math.isfinite(outcome.value) else None
        return cls(name=name, value=value, expected=expected, p_value=outcome.p_value)

    @classmethod
    def exact(cls, name: str, value: float, expected: str, *, holds: bool) -> Statistic:
        """A statistic in which chance plays no part."""
        return cls.tested(name, Outcome(value, 1.0 if holds else 0.0), expected)


class Picture(_Part):
    """Something to look at."""

    caption: str = Field(description="What is shown.")
    png: str = Field(description="The picture, as a PNG file in base64.")


class AuditResult(_Part):
    """One attack on one claim."""

    name: str = Field(description="The audit, and what of it, as `conformance/share variance`.")
    claim: Claim = Field(description="What was attacked.")
    attack: str = Field(description="How it was attacked, in one sentence.")
    statistic: Statistic = Field(description="What the verdict is computed from.")
    lower_bound: float | None = Field(
        default=None,
        description="A lower bound on epsilon that holds with `confidence`; null where the attack "
        "gives none.",
    )
    confidence: float = Field(
        gt=0.0, lt=1.0, description="The probability with which a true claim is not refuted."
    )
    power: float = Field(
        ge=0.0, le=1.0, description="The probability to refute the claim under `power_against`."
    )
    power_against: str = Field(description="The fault for which the power is stated.")
    seconds: float = Field(ge=0.0, description="How long the attack took.")
    pictures: tuple[Picture, ...] = Field(default=(), description="What the attack made visible.")

    @computed_field(  # type: ignore[prop-decorator]
        description="Against whom the claim should hold."
    )
    @property
    def adversary(self) -> str:
        """The adversary in plain words."""
        return self.claim.adversary.who

    @computed_field(  # type: ignore[prop-decorator]
        description="`refuted` if the statistic is too improbable for a true claim, or the lower "
        "bound exceeds the claimed epsilon; else `inconclusive` if the power is below "
        f"{LEAST_POWER}; else `consistent`."
    )
    @property
    def verdict(self) -> Verdict:
        """What follows; no audit can forget to decide."""
        epsilon = self.claim.epsilon
        if self.statistic.p_value < 1.0 - self.confidence or (
            self.lower_bound is not None and epsilon is not None and self.lower_bound > epsilon
        ):
            return Verdict.REFUTED
        return Verdict.CONSISTENT if self.power >= LEAST_POWER else Verdict.INCONCLUSIVE


class Results(_Part):
    """What a run of audits wrote with `--json`."""

    results: tuple[AuditResult, ...] = Field(description="One for each attack on a claim.")

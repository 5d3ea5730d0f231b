"""Events: what is stored of a mechanism comes back as it was, or not at all."""

from __future__ import annotations

import json
import math

import pytest

from privfl.accounting import (
    DiscreteGaussian,
    Event,
    Gaussian,
    MetricRelease,
    NonPrivate,
    PoissonGaussian,
    event_from_dict,
)
from privfl.accounting.events import KINDS

EVENTS: list[Event] = [
    PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.2345678901234567, steps=11),
    Gaussian(noise_multiplier=0.1 + 0.2, steps=3),
    DiscreteGaussian(sampling_rate=1 / 3, noise_multiplier=2.5, sensitivity=1.0000001, steps=0),
    MetricRelease(metrics=("accuracy", "loss"), noise_multiplier=7.0),
    NonPrivate(what="the labels of all records"),
]


def test_every_kind_is_tried_here():
    assert {event.kind for event in EVENTS} == set(KINDS)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_survives_storage(event: Event):
    stored = json.loads(json.dumps(event.to_dict()))
    assert event_from_dict(stored) == event
    assert event_from_dict(stored).to_dict() == event.to_dict()
    assert stored["version"] == 1


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_a_stored_event_of_other_fields_is_refused(event: Event):
    stored = event.to_dict()
    for broken in (
        {},
        {**stored, "version": 2},
        {**stored, "version": None},
        {**stored, "kind": "laplace"},
        {**stored, "kind": None},
        {**stored, "extra": 1},
        {name: value for name, value in stored.items() if name != "steps"},
        {**stored, "steps": -1},
        {**stored, "steps": 1.0},
        {**stored, "steps": True},
        {**stored, "steps": "1"},
    ):
        with pytest.raises(ValueError, match=r"."):
            event_from_dict(broken)


@pytest.mark.parametrize(
    "event", [e for e in EVENTS if "noise_multiplier" in e.to_dict()], ids=lambda event: event.kind
)
@pytest.mark.parametrize("value", ["1.0", None, True, [1.0], -1.0, math.nan, math.inf])
def test_a_stored_number_that_is_none_is_refused(event: Event, value: object):
    for name in {"sampling_rate", "noise_multiplier", "sensitivity"} & set(event.to_dict()):
        with pytest.raises(ValueError, match="must be"):
            event_from_dict({**event.to_dict(), name: value})


@pytest.mark.parametrize(
    "fields",
    [
        (0.0, 1.0, 1),
        (1.1, 1.0, 1),
        (0.5, -1.0, 1),
        (0.5, math.inf, 1),
        (0.5, 1.0, -1),
        (math.nan, 1.0, 1),
    ],
)
@pytest.mark.parametrize("more", [{}, {"sensitivity": 1.5}])
def test_impossible_events_are_refused(fields: tuple[float, float, int], more: dict[str, float]):
    kind = DiscreteGaussian if more else PoissonGaussian
    with pytest.raises(ValueError, match="must"):
        kind(sampling_rate=fields[0], noise_multiplier=fields[1], steps=fields[2], **more)


@pytest.mark.parametrize("sensitivity", [0.999, 0.0, -1.0, math.inf, math.nan])
def test_a_sensitivity_below_one_clipping_norm_is_refused(sensitivity: float):
    with pytest.raises(ValueError, match="sensitivity must"):
        DiscreteGaussian(sampling_rate=0.1, noise_multiplier=1.0, sensitivity=sensitivity)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_once_and_times_change_the_steps_only(event: Event):
    assert event.once().steps == 1
    assert event.times(7) == event.once().times(7)
    assert {**event.times(event.steps).to_dict()} == event.to_dict()
    assert len({event.once(), event.times(5).once()}) == 1


def test_the_noise_is_counted_in_what_one_record_changes():
    assert DiscreteGaussian(sampling_rate=0.1, noise_multiplier=3.0, sensitivity=1.5).sigma == 2.0
    assert [event.rate for event in EVENTS] == [0.1, 1.0, 1 / 3, 1.0, 1.0]
    assert NonPrivate(what="x").sigma == 0.0

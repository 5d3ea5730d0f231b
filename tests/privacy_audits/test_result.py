"""Verdicts follow from numbers, claims from events, and nobody can set either."""

from __future__ import annotations

import dataclasses
from typing import Any

import pydantic
import pytest

from privacy_audits.levels import LEVEL, TESTS, TOTAL, any_of
from privacy_audits.result import AuditResult, Claim, Results, Statistic, Verdict
from privfl.accounting import DiscreteGaussian, adversaries

EVENT = DiscreteGaussian(sampling_rate=0.5, noise_multiplier=20.2, sensitivity=1.01, steps=100)
PUBLIC, CHARGED, *_ = adversaries("distributed", 3, 1)


def result(**changes: Any) -> AuditResult:
    """A consistent result, but for ``changes``."""
    p_value = changes.pop("p_value", 0.5)
    fields: dict[str, Any] = {
        "name": "an audit/of something",
        "claim": Claim(statement="It holds.", adversary=CHARGED, mechanism=(EVENT,), delta=1e-5),
        "attack": "looks",
        "statistic": Statistic(name="ratio", value=1.0, expected="1", p_value=p_value),
        "confidence": 0.999,
        "power": 1.0,
        "power_against": "half the noise",
        "seconds": 1.0,
    }
    return AuditResult(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.CONSISTENT),
        ({"p_value": 0.0011}, Verdict.CONSISTENT),
        ({"p_value": 0.0009}, Verdict.REFUTED),
        ({"p_value": 0.0009, "power": 0.1}, Verdict.REFUTED),
        ({"power": 0.79}, Verdict.INCONCLUSIVE),
        ({"lower_bound": 1.0}, Verdict.CONSISTENT),
        ({"lower_bound": 5.0}, Verdict.REFUTED),
        ({"lower_bound": 5.0, "power": 0.1}, Verdict.REFUTED),
    ],
)
def test_the_verdict_follows_from_the_numbers(changes: dict[str, Any], verdict: Verdict):
    assert result(**changes).verdict is verdict


def test_nobody_sets_a_verdict_or_an_epsilon():
    assert result(verdict="refuted").verdict is Verdict.CONSISTENT
    claim = Claim(
        statement="It holds.", adversary=CHARGED, mechanism=(EVENT,), delta=1e-5, epsilon=100.0
    )
    assert claim.epsilon == CHARGED.epsilon([EVENT], 1e-5)
    with pytest.raises(pydantic.ValidationError):
        result().confidence = 0.5
    # The same events cost less against whom they show less.
    public = claim.model_copy(update={"adversary": PUBLIC})
    assert public.epsilon < claim.epsilon


def test_results_survive_a_file():
    results = Results(results=(result(), result(p_value=0.0)))
    read = Results.model_validate_json(results.model_dump_json())
    assert read == results
    assert read.results[0].claim.mechanism == (EVENT,)
    shown = results.model_dump(mode="json")["results"][1]
    assert shown["verdict"] == "refuted"
    assert shown["adversary"] == CHARGED.who
    wanted = {"name", "claim", "attack", "adversary", "statistic", "lower_bound", "confidence"}
    assert wanted | {"power", "verdict", "seconds"} <= set(shown)


def test_a_verdict_in_a_file_is_not_believed():
    text = Results(results=(result(p_value=0.0),)).model_dump_json()
    forged = text.replace('"verdict":"refuted"', '"verdict":"consistent"')
    assert forged != text
    assert Results.model_validate_json(forged).results[0].verdict is Verdict.REFUTED


def test_every_field_of_the_schema_is_described():
    schema = Results.model_json_schema(mode="serialization")
    for name, part in schema["$defs"].items():
        if name in ("Adversary", "Verdict"):
            continue
        for key, field in part["properties"].items():
            assert "description" in field, f"{name}.{key}"
    assert {f.name for f in dataclasses.fields(CHARGED)} == set(
        schema["$defs"]["Adversary"]["properties"]
    )


def test_the_levels_add_up():
    assert pytest.approx(TOTAL) == LEVEL * TESTS
    assert any_of([0.5, 0.01, 0.2]) == pytest.approx(0.03)
    assert any_of([0.5, 0.6]) == 1.0

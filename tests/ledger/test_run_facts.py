"""Facts of a run: what is written comes back, and rows of older ledgers are read as they were
meant.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from privfl.accounting import DiscreteGaussian, MetricRelease, NonPrivate, PoissonGaussian
from privfl.ledger import RunFacts

FACTS = RunFacts(
    experiment="ab" * 32,
    model="heart.py:model",
    data="heart.py:data",
    rounds=7,
    noise="distributed",
    collusion=2,
    delta=1e-5,
    target_epsilon=2.5,
    private=True,
    plans={
        "training": DiscreteGaussian(
            sampling_rate=1 / 3, noise_multiplier=0.1 + 0.2, sensitivity=1.01, steps=7
        ),
        "evaluation": MetricRelease(metrics=("auc", "loss"), noise_multiplier=20.0, steps=2),
    },
    exact_metrics=("accuracy",),
    outside=("the scaler reads every row", "die Werte für «Alter» sind gerundet"),
    records_per_person=3,
    identity="ed25519:aa",
    pinned=True,
    kept=True,
    members={"aa": "ed25519:aa", "bbb": "ed25519:bbb", "cccc": "ed25519:cccc"},
)
# A user's own loop: without coordinator, identities and target.
LOOP = replace(
    FACTS,
    experiment="",
    target_epsilon=None,
    plans={"training": PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.0, steps=9)},
    noise="site",
    collusion=0,
    exact_metrics=(),
    outside=(),
    identity="",
    pinned=False,
    members={"aa": ""},
    coordinator=False,
)
SEEDED = replace(FACTS, private=False, kept=False, plans={"training": NonPrivate(what="seed")})


def stored(facts: RunFacts) -> dict[str, Any]:
    """The facts after they were written as text."""
    values: dict[str, Any] = json.loads(json.dumps(facts.to_dict(), allow_nan=False))
    return values


@pytest.mark.parametrize("facts", [FACTS, LOOP, SEEDED], ids=["run", "loop", "seeded"])
def test_facts_survive_storage(facts: RunFacts):
    assert RunFacts.from_dict(stored(facts)) == facts
    assert RunFacts.from_dict(stored(facts)).to_dict() == facts.to_dict()


def test_every_fact_is_written():
    assert set(stored(LOOP)) == {field.name for field in fields(RunFacts)}
    assert set(stored(LOOP)) - set(stored(FACTS)) == {"coordinator"}


@pytest.mark.parametrize(
    ("fact", "meaning"),
    [("collusion", 0), ("outside", ()), ("coordinator", True), ("identity", "")],
)
def test_a_row_without_a_fact_that_came_later(fact: str, meaning: object):
    values = {name: value for name, value in stored(LOOP).items() if name != fact}
    assert RunFacts.from_dict(values) == replace(LOOP, **{fact: meaning})


@pytest.mark.parametrize(
    "fact",
    sorted(
        {field.name for field in fields(RunFacts)}
        - {"collusion", "outside", "coordinator", "identity"}
    ),
)
def test_a_row_without_a_fact_that_every_version_wrote_is_refused(fact: str):
    values = {name: value for name, value in stored(FACTS).items() if name != fact}
    with pytest.raises(KeyError, match=fact):
        RunFacts.from_dict(values)


@pytest.mark.parametrize(
    "plans",
    [
        {"holiday": stored(FACTS)["plans"]["training"]},
        {"training": {"kind": "laplace", "version": 1, "steps": 1}},
        {"training": stored(FACTS)["plans"]["training"] | {"version": 2}},
    ],
    ids=["account", "kind", "version"],
)
def test_plans_that_this_version_does_not_know_are_refused(plans: dict[str, Any]):
    with pytest.raises(ValueError, match=r"no account|unknown event"):
        RunFacts.from_dict(stored(FACTS) | {"plans": plans})

"""Ledgers that privfl 0.1.0 wrote before its modules were arranged anew (commit 9ac66c4).

They open, verify and take new charges, and what is written today for the same facts is the same to
the last character. They are kept as SQL, as SQLite dumps them:

- ``budget.sql``: a ledger with a budget, of three runs: one of `privfl train` with two sites, noise
  of each site, metrics with noise and a warning of data(); one of three sites with shared noise and
  pinned keys, the second round of which was refunded; and one of `PrivacyEngine`.
- ``alone.sql``: the ledger of one run alone, with a known seed.
- ``rounds.jsonl``, ``heads.jsonl``: heads of the first ledger that were shown to others.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from privfl.accounting import (
    ACCOUNTS,
    DiscreteGaussian,
    Event,
    Gaussian,
    MetricRelease,
    NonPrivate,
    PoissonGaussian,
)
from privfl.accounting.events import KINDS
from privfl.admission.plan import limits_of
from privfl.cli.budget import command
from privfl.config import load_experiment, load_site
from privfl.errors import BudgetError
from privfl.ledger import Head, Ledger, Row, RunFacts
from privfl.ledger import ledger as ledger_module
from privfl.reporting.from_ledger import checks, heads_in
from privfl.secagg import ExchangeKey
from privfl.secagg.session.roster import Member, Roster
from privfl.site.observer import Observer
from privfl.site.run_ledger import RunLedger
from privfl.site.setup import prepare_site
from tests.ledger.ledgers import by_sql

FILES = Path(__file__).with_name("written_by_0_1_0")
HEADS = {
    "budget": Head(
        "392a6126a240a6e5401492ecb7d48b85",
        19,
        "631aa9095231b59f7c583bf2777f948843a4384271dc1b6aa4e3bf7f17071960",
    ),
    "alone": Head(
        "88097b1dec2ccc761a026b4fc8492024",
        9,
        "f848b8e92701d0b39ec3ee46a9deffc84aae45d747bb7e0d78b16804075f2470",
    ),
}
every_ledger = pytest.mark.parametrize("name", HEADS)

TRAINING = PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.5)
SHARED = DiscreteGaussian(sampling_rate=0.1, noise_multiplier=1.875, sensitivity=1.01)
LOOP = DiscreteGaussian(sampling_rate=0.25, noise_multiplier=3.5, sensitivity=1.01)
METRICS = MetricRelease(metrics=("accuracy",), noise_multiplier=2.5597)
ALONE_METRICS = MetricRelease(metrics=("accuracy",), noise_multiplier=2.1492)
SEEDED = NonPrivate(what="insecure_test_seed")

# What the runs were, in the words of today.
OF_TWO_SITES = RunFacts(
    experiment="eb1446d5241de10712f6e50a2c73fe030f1d154f4f445d0969ba93c57f9aead7",
    model="task.py:model",
    data="task.py:data",
    rounds=2,
    noise="site",
    collusion=0,
    delta=1e-5,
    target_epsilon=None,
    private=True,
    plans={"training": TRAINING.times(6), "evaluation": METRICS},
    exact_metrics=(),
    outside=("la moyenne de l'âge is taken over all rows",),
    records_per_person=1,
    identity="ed25519:GY5G2E-b_5kzVg0cBmS2iR8cQRp9BcoSePIYSt5uEtc",
    pinned=False,
    kept=True,
    members={
        "aa": "ed25519:GY5G2E-b_5kzVg0cBmS2iR8cQRp9BcoSePIYSt5uEtc",
        "bbb": "ed25519:B2IM8GK1mrr59OF2uo_REHjhixiYeMsbdxXdZyAIvb0",
    },
)
OF_THREE_SITES = replace(
    OF_TWO_SITES,
    experiment="3c7c186779043bef89187c430e923bb771236767bd314f126a0d4905a7712181",
    rounds=5,
    noise="distributed",
    collusion=1,
    plans={"training": SHARED.times(5)},
    exact_metrics=("accuracy",),
    outside=(),
    records_per_person=3,
    identity="ed25519:RXtSYEfj5t8lGA-IWWqnqcStXCVoW7bS8vAGi2J3-9E",
    pinned=True,
    members={
        "aa": "ed25519:RXtSYEfj5t8lGA-IWWqnqcStXCVoW7bS8vAGi2J3-9E",
        "bbb": "ed25519:S3RHFYSxdmHYeZYJgJttGs9koXqIl7RSbTLW3awYfpI",
        "cccc": "ed25519:SL0FTJmf1UI528KD2932xUantoz8J3pEm5H_gaJ7Yao",
    },
)
OF_THE_ENGINE = replace(
    OF_THREE_SITES,
    experiment="",
    model="a Module of the user's own",
    data="a DataLoader",
    rounds=8,
    plans={"training": LOOP.times(8)},
    exact_metrics=(),
    identity="",
    pinned=False,
    members={"aa": "", "bbb": "", "cccc": ""},
    coordinator=False,
    records_per_person=1,
)
OF_ONE_RUN = replace(
    OF_TWO_SITES,
    experiment="2a590822aa8fe4343c6859a939b8da07d89e3759b24a58dde791c5dfd6ec1491",
    private=False,
    plans={"training": TRAINING.times(6), "evaluation": ALONE_METRICS},
    outside=(),
    identity="ed25519:TqUX5KIDDrjY5yi6zWARZY6Jhv7N3oSFN93a27Zx_z8",
    kept=False,
    members={
        "aa": "ed25519:TqUX5KIDDrjY5yi6zWARZY6Jhv7N3oSFN93a27Zx_z8",
        "bbb": "ed25519:S3RHFYSxdmHYeZYJgJttGs9koXqIl7RSbTLW3awYfpI",
    },
)
RUNS = {"budget": [OF_TWO_SITES, OF_THREE_SITES, OF_THE_ENGINE], "alone": [OF_ONE_RUN]}

MECHANISMS: dict[str, dict[int, Event]] = {
    "budget": {
        3: TRAINING,
        6: METRICS,
        9: SHARED,
        15: LOOP,
        18: Gaussian(noise_multiplier=50.0),
    },
    "alone": {3: SEEDED, 6: TRAINING, 8: ALONE_METRICS},
}
# By account, the steps of each mechanism.
STEPS = {
    "budget": {"training": {3: 6, 9: 2, 15: 2}, "evaluation": {6: 1, 18: 1}},
    "alone": {"training": {3: 1, 6: 3}, "evaluation": {3: 1, 8: 1}},
}


def restored(name: str, folder: Path) -> Path:
    """The ledger as it was, in a file."""
    path = folder / f"{name}.ledger"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((FILES / f"{name}.sql").read_text(encoding="utf-8"))
    return path


# -- reading ---------------------------------------------------------------------------------------


@every_ledger
def test_it_opens_and_verifies(name: str, tmp_path: Path):
    with Ledger.read(restored(name, tmp_path)) as ledger:
        assert ledger.head == HEADS[name]
        assert ledger.compare(HEADS[name]) is None
        assert ledger.problems() == []
        assert ledger.events == MECHANISMS[name]
        assert {account: ledger.steps(account) for account in ACCOUNTS} == STEPS[name]


def test_every_kind_of_row_and_of_event_is_in_these_ledgers(tmp_path: Path):
    rows, events = set(), set()
    for name in HEADS:
        with Ledger.read(restored(name, tmp_path)) as ledger:
            rows |= {row.kind for row in ledger.rows}
            events |= {event.kind for event in ledger.events.values()}
    assert rows == {"opened", "run", "mechanism", "charge", "refund"}
    assert events == set(KINDS)


def test_its_epsilons_are_what_they_were(tmp_path: Path):
    with Ledger.read(restored("budget", tmp_path)) as ledger:
        for account, epsilon in (
            ("training", 1.9231187831359535),
            ("evaluation", 2.0031414063338686),
        ):
            limit = ledger.filters[account]
            assert limit.epsilon_of(ledger.spent(account)) == pytest.approx(epsilon, rel=1e-12)


def test_every_head_that_was_shown_fits(tmp_path: Path):
    path = restored("budget", tmp_path)
    heads = heads_in([FILES])
    with Ledger.read(path) as ledger:
        chain, shown = checks(ledger, heads)
        assert (chain.ok, chain.detail) == (True, "the hashes of all 19 rows fit")
        assert (shown.ok, shown.detail) == (
            True,
            "7 signed heads that were shown to others fit, the last at row 13",
        )
    by_sql(path, "DELETE FROM rows WHERE number > 12")
    with Ledger.read(path) as ledger:
        assert ledger.compare(HEADS["budget"]) is not None
        assert checks(ledger, heads)[1].ok is False


@every_ledger
def test_the_facts_of_its_runs_are_read(name: str, tmp_path: Path):
    with Ledger.read(restored(name, tmp_path)) as ledger:
        facts = [RunFacts.from_dict(row.facts()) for row in ledger.rows if row.kind == "run"]
    assert facts == RUNS[name]


@every_ledger
def test_commands_show_and_report_it(name: str, tmp_path: Path):
    path, page = restored(name, tmp_path), tmp_path / "report.html"
    heads = ["--heads", str(FILES)] if name == "budget" else []
    for arguments in (
        ["show", str(path), *heads],
        ["report", str(path), *heads, "--output", str(page)],
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exception is None, result.output
    text = page.read_text(encoding="utf-8")
    for facts in RUNS[name]:
        assert facts.data in text
    assert HEADS[name].hash in text


# -- writing ---------------------------------------------------------------------------------------


def test_new_charges_go_onto_it(tmp_path: Path):
    path = restored("budget", tmp_path)
    with Ledger.write(path, "aa", {}) as ledger:
        limit, before, rows = ledger.filters["training"], ledger.spent("training"), [*ledger.rows]
        ledger.begin_run("ab" * 16, OF_TWO_SITES.to_dict())
        # A mechanism of that time is found again, a new one is described.
        assert ledger.charge("training", TRAINING.times(3), "ab" * 16, 1).mechanism == 3
        ledger.refund(ledger.charge("training", SHARED, "ab" * 16, 2), "peer")
        new = replace(METRICS, noise_multiplier=9.0)
        assert ledger.charge("evaluation", new, "ab" * 16, 2).mechanism == 24
        after = ledger.spent("training")
        np.testing.assert_allclose(after, before + 3 * limit.cost(TRAINING), rtol=1e-12)
        fits = limit.times(after, limit.cost(TRAINING))
        with pytest.raises(BudgetError, match=f"{fits} would fit"):
            ledger.charge("training", TRAINING.times(fits + 100), "ab" * 16, 3)
    with Ledger.read(path) as ledger:
        assert ledger.rows[:19] == rows
        assert len(ledger.rows) == 25
        assert ledger.problems() == []
        assert checks(ledger, heads_in([FILES]))[1].ok
        assert ledger.compare(HEADS["budget"]) is None


@every_ledger
def test_what_is_written_today_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same steps at the same times, from the classes of today: the same rows and hashes."""
    with Ledger.read(restored(name, tmp_path)) as ledger:
        recorded, orders = ledger.rows, ledger.orders
        vectors = {event: ledger.vector(number) for number, event in ledger.events.items()}
    monkeypatch.setattr(os, "urandom", lambda count: bytes.fromhex(HEADS[name].ledger))

    # Another machine may compute another last bit, about which this test says nothing.
    def divergences(event: Event, at: tuple[float, ...]) -> np.ndarray:
        assert at == orders
        return vectors[event]

    monkeypatch.setattr(ledger_module, "divergences", divergences)
    clock: list[Row] = [*recorded]
    monkeypatch.setattr(
        time, "gmtime", lambda *_: time.strptime(clock[0].time, "%Y-%m-%dT%H:%M:%SZ")
    )
    filters = {} if name == "alone" else limits_of(40.0, 1e-5, TRAINING.times(6))
    runs, charges = iter(RUNS[name]), {}
    with Ledger.write(tmp_path / "again.ledger", "aa", filters) as again:
        for row in recorded[1:]:
            clock[0] = row
            match row.kind:
                case "run":
                    again.begin_run(row.run, next(runs).to_dict())
                case "charge":
                    event = MECHANISMS[name][row.mechanism].times(row.steps)
                    charges[row.number] = again.charge(row.account, event, row.run, row.round)
                case "refund":
                    again.refund(charges[json.loads(row.body)["charge"]], "peer")
        for now, then in zip(again.rows, recorded, strict=True):
            assert now == then
        assert again.head == HEADS[name]


# An experiment of then, whose digest its ledger holds.
EXPERIMENT = """
sites: [aa, bbb, cccc]
rounds: 5
algorithm: fedsgd
local_steps: 1
sampling_rate: 0.1
model: task.py:model
data: task.py:data
loss: task.py:loss
optimizer: {name: sgd, lr: 0.2}
privacy: {noise: distributed, noise_multiplier: 1.5, delta: 1.0e-5, max_grad_norm: 1.0}
output: runs
evaluation: {records: public, metrics: {accuracy: 'task.py:accuracy'}}
"""


def test_the_ledger_of_a_run_begins_today_as_it_began_then(tmp_path: Path):
    """Rows by what writes them in a run, and not by this test."""
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    experiment = load_experiment(tmp_path / "experiment.yaml")
    (tmp_path / "aa.yaml").write_text(
        f"ledger: {tmp_path / 'aa.ledger'}\nbudget: {{epsilon: 40, delta: 1.0e-5}}\n"
        f"exact_metrics: [accuracy]\nrecords_per_person: 3\n"
    )
    setup = prepare_site("aa", experiment, tmp_path, load_site(tmp_path, "aa"))
    members = [
        Member(site, ExchangeKey().public, identity)
        for site, identity in OF_THREE_SITES.members.items()
    ]
    roster = Roster.of("ab" * 16, experiment.digest(), setup.parameters, members)
    ledger = RunLedger(setup, roster, "ab" * 16, tmp_path, Observer())
    ledger.begin(1.875, ())
    ledger.charge_round(1)
    ledger.close()
    with Ledger.read(restored("budget", tmp_path)) as then:
        run, mechanism, charge = then.rows[7:10]
    with Ledger.read(tmp_path / "aa.ledger") as today:
        assert [row.kind for row in today.rows] == ["opened", "run", "mechanism", "charge"]
        body = today.rows[1].body.replace(setup.identity.public, OF_THREE_SITES.identity)
        assert body.replace('"pinned": false', '"pinned": true') == run.body
        assert today.rows[2].facts()["event"] == mechanism.facts()["event"]
        assert today.rows[3][3:8] == ("ab" * 16, 1, "training", 3, 1)
        assert (today.rows[3].body, charge.body) == ("{}", "{}")

"""The ledger over whole runs: charged before anything leaves, refused beforehand, and read by
those who must check it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfl.accounting import PoissonGaussian
from privfl.federation.messages import Kind, decode
from privfl.federation.metrics import pack
from privfl.ledger import Ledger
from privfl.reporting.schema import Report
from privfl.site.observer import Observer
from tests.conftest import ROOT, Twin, edit, run_twin
from tests.ledgers import PRIVATE, read, run_ledgers


@pytest.mark.usefixtures("trainers_as_threads")
def test_the_heart_example_is_refused_when_the_budget_is_spent(
    heart_disease: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The issue's own case: two runs on one ledger; the second is refused with the rounds that
    still fit, and runs with those.
    """
    folder = tmp_path / "sites"
    folder.mkdir()
    for site in ("cleveland", "hungarian", "switzerland", "va"):
        (folder / f"{site}.yaml").write_text(
            f"ledger: ../{site}.ledger\nbudget: {{epsilon: 1.2, delta: 1.0e-4}}\nexact_metrics: "
            f"[accuracy, balanced_accuracy, auc]\n"
        )
    example = ROOT / "examples" / "heart_disease" / "fedavg.yaml"
    monkeypatch.setenv("HEART_DISEASE_DIR", str(heart_disease))

    def run(*settings: str) -> Twin:
        return run_twin(example, *settings, output=tmp_path / "runs", ranks=5, sites=folder)

    first = run()
    assert first.codes == [0] * 5, first.err
    assert "a ledger is kept across runs by cleveland (begins with this run)" in first.out
    assert "no ledger is kept" not in first.out
    second = run()
    assert second.codes == [2] * 5
    (fit,) = {
        int(n)
        for n in re.findall(r"(\d+) of the 15 rounds of this experiment would fit", second.err)
    }
    noise = re.search(r"would fit at noise multiplier ([\d.]+)", second.err)[1]
    assert second.err.count("privfl:") == 1, "once per job"
    assert not any("run folder" in line for line in second.out.splitlines())
    before = read(tmp_path / "va.ledger").head
    same_noise = f"privacy={{noise_multiplier: {noise}, delta: 1.0e-4, max_grad_norm: 0.1}}"
    assert run(same_noise, f"rounds={fit + 1}").codes == [2] * 5
    assert read(tmp_path / "va.ledger").head == before, "a refused run charges nothing"
    last = run(same_noise, f"rounds={fit}")
    assert last.codes == [0] * 5, last.err
    opened = read(tmp_path / "va.ledger")
    assert 1.15 < opened.filters["training"].epsilon_of(opened.spent("training")) <= 1.2
    assert not any("evaluation" in row.account for row in opened.charges()), (
        "public records are not charged"
    )


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_run_leaves_its_report(small: Path, tmp_path: Path, sites: Path):
    twin = run_twin(small, output=tmp_path / "runs", ranks=3, sites=sites)
    assert twin.codes == [0, 0, 0], twin.err
    found = Report.model_validate_json((twin.folder / "report.json").read_text())
    assert [site.site for site in found.sites] == ["aa", "bbb"]
    assert all(site.kept for site in found.sites)
    summary = json.loads((twin.folder / "summary.json").read_text())
    for site in found.sites:
        (run,) = site.runs
        assert (run.rounds_charged, run.training.steps) == (2, 6)
        assert run.exact_metrics == ["accuracy"]
        assert run.training.pld <= run.training.rdp <= summary["sites"][site.site]["epsilon"]
        assert read(tmp_path / f"{site.site}.ledger").head.hash == site.head
    page = (twin.folder / "report.html").read_text().lower()
    assert "aa" in page
    assert "no ledger is kept" not in page
    # The site's own page lies beside its ledger.
    assert (tmp_path / "aa.report.html").exists()


@pytest.mark.usefixtures("trainers_as_threads")
def test_without_site_files_the_ledger_covers_the_run_alone(small: Path, tmp_path: Path):
    twin = run_twin(small, output=tmp_path / "runs", ranks=3)
    assert twin.codes == [0, 0, 0], twin.err
    assert "no ledger is kept across runs" in twin.out
    assert "no ledger is kept across runs" in (twin.folder / "report.html").read_text().lower()
    for site, path in run_ledgers(twin).items():
        opened = read(path)
        assert opened.site == site
        assert [row.steps for row in opened.charges()] == [3, 3]
        # Its limit is the plan: not one more round would be admitted.
        limit = opened.filters["training"]
        event = PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.5, steps=1)
        assert not limit.admits(opened.spent("training") + limit.cost(event))


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_seeded_run_is_not_private_in_the_ledger_either(small: Path, tmp_path: Path):
    twin = run_twin(small, "insecure_test_seed=3", output=tmp_path / "runs", ranks=3)
    for path in run_ledgers(twin).values():
        kinds = [event.kind for event in read(path).events.values()]
        assert "non_private" in kinds
    found = Report.model_validate_json((twin.folder / "report.json").read_text())
    assert all(account.spent == "infinite" for site in found.sites for account in site.accounts)


@pytest.mark.usefixtures("trainers_as_threads")
def test_every_round_is_charged_before_the_trainer_hears_of_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from privfl.trainer.process import TrainerProcess
    from privfl.trainer.requests import Train

    ask, seen = TrainerProcess.ask, []

    def watch(self: TrainerProcess, request: Any) -> None:
        if isinstance(request, Train):
            (path,) = (tmp_path / "runs").rglob("aa/*.ledger")
            seen.append(sum(row.steps for row in read(path).charges()))
        ask(self, request)

    monkeypatch.setattr(TrainerProcess, "ask", watch)
    twin = run_twin(small, output=tmp_path / "runs", ranks=3)
    assert twin.codes == [0, 0, 0], twin.err
    # Two sites, so each count is seen twice, perhaps before the other site has written.
    assert sorted(seen)[-1] == 6
    assert all(count >= 3 for count in seen)


@pytest.mark.usefixtures("trainers_as_threads")
@pytest.mark.parametrize("forgotten", ["charge_round", "charge_metrics"])
def test_a_charge_that_is_forgotten_stops_the_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
):
    """The releases are checked against the ledger itself, also if the count of noise draws is
    fooled.
    """
    from privfl.site.run_ledger import RunLedger

    def forget(self: RunLedger, round_: int) -> None:
        self._steps["training" if forgotten == "charge_round" else "evaluation"] += 3

    monkeypatch.setattr(RunLedger, forgotten, forget)
    twin = run_twin(small, PRIVATE, output=tmp_path / "runs", ranks=3)
    assert twin.codes == [1, 1, 1]
    assert "was not charged to the" in twin.err
    assert not list((tmp_path / "runs").rglob("summary.json"))


@pytest.mark.usefixtures("trainers_as_threads")
def test_protections_are_looked_at_before_every_release(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from privfl.secagg.session.sums import SumSession

    monkeypatch.setattr(SumSession, "masked_members", property(lambda self: 1))
    twin = run_twin(small, output=tmp_path / "runs", ranks=3)
    assert twin.codes == [1, 1, 1]
    assert "masks is not active at site" in twin.err


def test_what_never_left_is_refunded_when_another_site_fails(
    small: Path, tmp_path: Path, sites: Path
):
    """Site bbb fails at once in its second round while aa still trains; aa gets that round back,
    bbb does not.
    """
    edit(
        small.parent / "task.py",
        "    return nn.functional",
        "    wait_or_fail(target)\n    return nn.functional",
    )
    (small.parent / "task.py").write_text(
        (small.parent / "task.py").read_text()
        + """

import sys, time
CALLS = []


def wait_or_fail(target):
    CALLS.append(1)
    if "bbb" in sys.argv and len(CALLS) > 60:
        raise ValueError("on purpose")
    if "aa" in sys.argv and len(CALLS) > 60:
        time.sleep(20)
"""
    )
    twin = run_twin(
        small,
        "rounds=60",
        "sampling_rate=1",
        "privacy.noise_multiplier=20",
        output=tmp_path / "runs",
        ranks=3,
        sites=sites,
    )
    assert twin.codes == [2, 2, 2], twin.err
    aa, bbb = (read(tmp_path / f"{site}.ledger") for site in ("aa", "bbb"))
    assert [row.kind for row in aa.charges()].count("refund") == 1
    assert aa.rows[-1].facts()["cause"] == "peer"
    assert "refund" not in [row.kind for row in bbb.charges()], (
        "its own error may depend on its records"
    )
    assert sum(aa.steps("training").values()) < sum(bbb.steps("training").values())


@pytest.mark.usefixtures("trainers_as_threads")
@pytest.mark.parametrize("trick", ["deleted", "emptied", "charged"])
def test_a_ledger_that_changes_while_the_run_starts(
    small: Path, tmp_path: Path, sites: Path, monkeypatch: pytest.MonkeyPatch, trick: str
):
    """Between the look at what is left and the first charge nobody may put another ledger there."""
    from privfl.site import agent

    assert run_twin(small, output=tmp_path / "first", ranks=3, sites=sites).codes == [0, 0, 0]
    make = agent.RunLedger
    ledger = tmp_path / "aa.ledger"

    def swapped(setup: Any, *rest: Any) -> Any:
        if setup.site == "aa" and trick == "charged":
            with Ledger.write(ledger, "aa", {}) as opened:
                opened.begin_run("cd" * 16, {})
        elif setup.site == "aa":
            ledger.unlink()
            if trick == "emptied":
                ledger.touch()
        return make(setup, *rest)

    monkeypatch.setattr(agent, "RunLedger", swapped)
    twin = run_twin(small, output=tmp_path / "second", ranks=3, sites=sites)
    assert twin.codes == [2, 2, 2]
    assert "aa.ledger was changed or replaced while this run started" in twin.err


@pytest.mark.usefixtures("trainers_as_threads")
def test_what_left_is_not_refunded_whatever_ends_the_run(small: Path, tmp_path: Path):
    """Rank 0 lies to one site in the end; the other one is stopped with everything released."""
    from privfl.transport import Transport

    class Relay:
        def __init__(self, inner: Transport) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def send(self, rank: int, head: bytes, bulk: Any) -> None:
            if self._inner.rank == 0 and rank == 1 and decode(head, bulk).kind is Kind.FINISH:
                body = json.loads(bytes(bulk))
                body["heads"]["bbb"]["rows"] += 1
                bulk = json.dumps(body).encode()
            self._inner.send(rank, head, bulk)

    twin = run_twin(small, PRIVATE, output=tmp_path / "runs", ranks=3, wrap=Relay)
    assert twin.codes == [1, 1, 1]
    (path,) = (tmp_path / "runs").rglob("bbb/*.ledger")
    assert [row.kind for row in read(path).charges()] == ["charge"] * 4


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_ledger_without_limits_is_no_budget(small: Path, tmp_path: Path, sites: Path):
    twin = run_twin(small, "insecure_test_seed=3", output=tmp_path / "runs", ranks=3)
    shutil.copy(run_ledgers(twin)["aa"], tmp_path / "aa.ledger")
    refused = run_twin(small, output=tmp_path / "more", ranks=3, sites=sites)
    assert refused.codes == [2, 2, 2]
    assert "was written for a single run and has no limits for the budget of site aa" in refused.err


# -- metrics with noise ----------------------------------------------------------------------------


class _Metrics(Observer):
    """What the trainers measured, and what their agents hand to the sum: numbers as a
    contribution has them.
    """

    def __init__(self) -> None:
        self.measured_numbers: list[np.ndarray] = []
        self.sent_numbers: list[np.ndarray] = []

    def measured(self, site: str, round_: int, metrics: Any) -> None:
        self.measured_numbers.append(
            pack(metrics, {name: len(sums) for name, (sums, _) in metrics.items()})
        )

    def contributed(self, site: str, round_: int, attempt: int, vector: np.ndarray) -> None:
        if attempt == 2:
            self.sent_numbers.append(vector.copy())


def _noise(seen: _Metrics) -> np.ndarray:
    """The difference in sums and counts, over all sites and rounds."""
    sent = np.concatenate([vector[:2] for vector in seen.sent_numbers])
    true = np.concatenate([vector[:2] for vector in seen.measured_numbers])
    return np.sort(sent) - np.sort(true) if len(sent) == len(true) else np.zeros(0)


@pytest.mark.usefixtures("trainers_as_threads")
def test_metrics_of_private_records_leave_with_noise_and_are_charged(small: Path, tmp_path: Path):
    seen = _Metrics()
    twin = run_twin(small, PRIVATE, "rounds=4", output=tmp_path / "runs", ranks=3, observer=seen)
    assert twin.codes == [0, 0, 0], twin.err
    assert len(seen.sent_numbers) == 8
    assert np.abs(_noise(seen)).min() > 1e-6, "every number has noise"
    rounds = [json.loads(line) for line in (twin.folder / "rounds.jsonl").read_text().splitlines()]
    for site, path in run_ledgers(twin).items():
        opened = read(path)
        charged = [row for row in opened.charges() if row.account == "evaluation"]
        assert [row.round for row in charged] == [1, 2, 3, 4]
        epsilon = opened.filters["evaluation"].epsilon_of(opened.spent("evaluation"))
        assert 19.9 < epsilon <= 20.0
        assert rounds[-1]["sites"][site]["evaluation"]["epsilon"] == pytest.approx(
            epsilon, rel=1e-6
        )
    # What everybody sees in the end is made from the noised numbers alone.
    total = np.sum(seen.sent_numbers[-2:], axis=0)
    assert rounds[-1]["metrics"]["accuracy"] == pytest.approx(total[0] / total[1], abs=1e-6)


@pytest.mark.usefixtures("trainers_as_threads")
def test_that_check_sees_when_the_noise_is_missing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from privfl.site import active_run

    monkeypatch.setattr(active_run, "noised", lambda measured, noise, randomness: measured)
    seen = _Metrics()
    assert run_twin(small, PRIVATE, output=tmp_path / "runs", ranks=3, observer=seen).codes == [
        0,
        0,
        0,
    ]
    assert np.abs(_noise(seen)).max() == 0.0


def test_the_noise_of_metrics_has_its_size():
    from privfl.noise.metrics import noised
    from privfl.noise.randomness import SystemRandomness

    measured = {"a": ([0.0] * 5000, [0.0] * 5000), "b": ([0.0] * 5000, [0.0] * 5000)}
    values = np.concatenate(
        [np.array(pair).ravel() for pair in noised(measured, 3.0, SystemRandomness()).values()]
    )
    expected = 3.0 * np.sqrt(2 * 2)
    assert abs(values.var() / expected**2 - 1.0) < 5 * np.sqrt(2 / len(values)) + 2**-9

"""Whole runs of fedsgd: what is added, what it is charged, that all sites hold one model, and
that it is plain SGD but for the noise.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import stats

from privfl.dp.training import LocalTraining
from privfl.federation import messages
from privfl.noise.discrete_gaussian import DiscreteGaussian
from privfl.noise.distributed import Shares
from privfl.reporting.numbers import decimals
from privfl.site import agent, algorithms
from privfl.site.active_run import ActiveRun
from privfl.site.run_ledger import RunLedger
from tests.conftest import Twin, run_cli, run_twin, secure_experiment
from tests.inside import Seen
from tests.ledgers import read, run_ledgers
from tests.runs.test_run import user_module

SITES = ("aa", "bbb", "cccc")
RANKS = len(SITES) + 1

# -- a run, looked at from inside ------------------------------------------------------------------


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Twin, Seen]:
    """Sixty steps of three sites, each with a trainer that is a process of its own."""
    folder = tmp_path_factory.mktemp("fedsgd")
    seen = Seen()
    twin = run_twin(
        secure_experiment(folder),
        output=folder / "runs",
        ranks=RANKS,
        wrap=seen.wrap,
        observer=seen,
    )
    assert twin.codes == [0] * RANKS, twin.err
    return twin, seen


def test_decrypted_sums_are_the_sums_of_the_integers(observed: tuple[Twin, Seen]):
    _, seen = observed
    every = np.array([seen.integers[site] for site in SITES])
    assert every.shape == (3, 60, 12)
    for site in SITES:
        assert np.array_equal(np.array(seen.totals[site]), every.sum(axis=0))
    assert len({total.tobytes() for total in seen.totals["aa"]}) == 60


def test_what_a_site_gives_is_its_rounded_sum_and_a_fresh_share(observed: tuple[Twin, Seen]):
    _, seen = observed
    for site in SITES:
        grid = seen.algorithms[site].grid
        for total, share, integers in zip(
            seen.sums[site], seen.noise[site], seen.integers[site], strict=True
        ):
            assert np.array_equal(integers - share, np.rint(total / grid.step).astype(np.int64))
    shares = np.array([seen.noise[site] for site in SITES], dtype=np.float64)
    # Against sigma C / sqrt(n - t) with 1.5, 1, 3 and 1.
    squares = float(((shares * grid.step) ** 2).sum() / (1.5**2 / 2))
    assert 1e-7 < stats.chi2(shares.size).cdf(squares) < 1 - 1e-7
    assert len({share.tobytes() for share in shares.reshape(180, 12)}) == 180


def test_all_sites_hold_one_model_to_the_last_bit(observed: tuple[Twin, Seen]):
    twin, seen = observed
    assert {site: len(seen.replicas[site]) for site in SITES} == dict.fromkeys(SITES, 61)
    for number, replica in enumerate(seen.replicas["aa"]):
        assert len({seen.replicas[site][number].tobytes() for site in SITES}) == 1
        assert number == 0 or not np.array_equal(replica, seen.replicas["aa"][number - 1])
    files = {path.read_bytes() for path in twin.folder.rglob("model.safetensors")}
    assert len(list(twin.folder.rglob("model.safetensors"))) == 4
    assert len(files) == 1
    tensors = load_file(twin.folder / "model.safetensors")
    assert np.array_equal(
        torch.cat([tensors["weight"].reshape(-1), tensors["bias"]]).numpy(), seen.replicas["aa"][-1]
    )


def test_steps_charged_are_sums_given_to_are_shares_drawn(observed: tuple[Twin, Seen]):
    twin, seen = observed
    summary = json.loads((twin.folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (twin.folder / "rounds.jsonl").read_text().splitlines()]
    for rank, site in enumerate(SITES, 1):
        opened = read(run_ledgers(twin)[site])
        assert sum(opened.steps("training").values()) == 60
        assert [row.steps for row in opened.charges()] == [1] * 60
        assert seen.contributions(rank) == [(number, 1) for number in range(1, 61)]
        assert len(seen.noise[site]) == 60
        assert summary["sites"][site]["steps"] == 60
        assert [record["sites"][site]["steps"] for record in rounds] == list(range(1, 61))
        (event,) = (
            e for e in opened.events.values() if e.kind == "discrete_gaussian" and e.steps == 1
        )
        assert (event.sampling_rate, event.noise_multiplier, event.sensitivity) == (0.1, 1.5, 1.01)


def test_everywhere_the_same_noise_and_adversaries(observed: tuple[Twin, Seen]):
    """One number and one list, on the screen, in the summary, the log of rounds and the report."""
    twin, _ = observed
    summary = json.loads((twin.folder / "summary.json").read_text())
    last = json.loads((twin.folder / "rounds.jsonl").read_text().splitlines()[-1])
    sites = json.loads((twin.folder / "report.json").read_text())["sites"]
    assert (summary["noise"], summary["collusion"]) == ("distributed", 1)
    for report in sites:
        site, run = summary["sites"][report["site"]], report["runs"][0]
        assert (
            list(site["adversaries"]["epsilon"].values())
            == last["sites"][report["site"]]["adversaries"]
        )
        told = {a["who"]: a["epsilon"] for a in run["adversaries"] if a["epsilon"] is not None}
        assert site["adversaries"] == {"accountant": "rdp", "epsilon": told}
        public, one, two = told.values()
        assert public < one == site["epsilon"] < two
        charge = report["accounts"][0]["charges"][0]
        assert (
            site["noise_multiplier"]
            == run["training"]["noise_multiplier"]
            == charge["noise_multiplier"]
            == 1.5
        )
    line = (
        f"against the public {decimals(public)}, against 1 of the other sites {decimals(one)}, "
        f"against all others together {decimals(two)}"
    )
    assert line in twin.out
    assert (
        "where noise is discrete no bound by PLD is known, and the column repeats RDP"
        in (twin.folder / "report.html").read_text()
    )


@pytest.mark.usefixtures("trainers_as_threads")
def test_adversaries_rise_whatever_admits_the_run(steps: Path, tmp_path: Path):
    """A filter's epsilon bounds one adversary only; among those of others it would be out of
    order.
    """
    folder = tmp_path / "sites"
    folder.mkdir()
    for site in SITES:
        (folder / f"{site}.yaml").write_text(
            f"ledger: {tmp_path / site}.ledger\nbudget: {{epsilon: 8, delta: 1.0e-5}}\n"
        )
    twin = run_twin(
        steps,
        "rounds=1",
        "privacy.noise_multiplier=5",
        output=tmp_path / "runs",
        ranks=RANKS,
        sites=folder,
    )
    assert twin.codes == [0] * RANKS, twin.err
    summary = json.loads((twin.folder / "summary.json").read_text())
    exported = [run_cli("budget", "export", f"{tmp_path / site}.ledger").out for site in SITES]
    for page in ((twin.folder / "report.json").read_text(), *exported):
        for report in json.loads(page)["sites"]:
            adversaries = summary["sites"][report["site"]]["adversaries"]
            epsilons = [
                a["epsilon"] for a in report["runs"][0]["adversaries"] if a["epsilon"] is not None
            ]
            assert epsilons == sorted(epsilons)
            assert adversaries["accountant"] == "rdp"
            assert list(adversaries["epsilon"].values()) == pytest.approx(epsilons, rel=1e-12)
            assert (
                epsilons[1]
                == report["runs"][0]["training"]["rdp"]
                < report["runs"][0]["training"]["epsilon"]
            )


@pytest.mark.long
@pytest.mark.parametrize(
    "optimizer", ["{name: sgd, lr: 0.1, momentum: 0.9}", "{name: adam, lr: 0.01}"]
)
def test_replicas_stay_one_over_500_steps(steps: Path, tmp_path: Path, optimizer: str):
    seen = Seen()
    twin = run_twin(
        steps,
        "rounds=500",
        f"optimizer={optimizer}",
        output=tmp_path / "runs",
        ranks=RANKS,
        observer=seen,
    )
    assert twin.codes == [0] * RANKS, twin.err
    assert all(len(seen.replicas[site]) == 501 for site in SITES)
    assert all(len({seen.replicas[site][n].tobytes() for site in SITES}) == 1 for n in range(501))
    assert np.array_equal(
        np.array(seen.totals["bbb"]), np.sum([seen.integers[site] for site in SITES], axis=0)
    )


# -- but for the noise it is SGD -------------------------------------------------------------------


def central(
    task: Path, start: NDArray[np.float32], rounds: int, clip: float, lr: float, momentum: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """SGD in one process over the records of all sites, each gradient clipped by itself, in
    float64 and by hand; all replicas and all norms.

    The gradient of cross-entropy by the outputs of a linear layer is softmax minus the target.
    """
    trains = [user_module(task).data(site)[0].tensors for site in SITES]
    x = np.concatenate([t[0].numpy() for t in trains]).astype(np.float64)
    targets = np.eye(2)[np.concatenate([t[1].numpy() for t in trains])]
    w, velocity = start.astype(np.float64), np.zeros(12)
    path, norms = [w], []
    for _ in range(rounds):
        outputs = np.exp(x @ w[:10].reshape(2, 5).T + w[10:])
        errors = outputs / outputs.sum(axis=1, keepdims=True) - targets
        gradients = np.concatenate(
            [(errors[:, :, None] * x[:, None, :]).reshape(len(x), 10), errors], axis=1
        )
        norms.append(np.linalg.norm(gradients, axis=1))
        clipped = gradients * np.minimum(1.0, clip / norms[-1])[:, None]
        velocity = momentum * velocity + clipped.sum(axis=0) / len(x)
        w = w - lr * velocity
        path.append(w)
    return np.array(path), np.array(norms)


@pytest.mark.usefixtures("trainers_as_threads")
def test_without_noise_it_is_sgd_over_all_records_in_one_place(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        DiscreteGaussian, "draw", lambda self, count: np.zeros(count, dtype=np.int64)
    )
    seen = Seen()
    settings = (
        "rounds=20",
        "sampling_rate=1.0",
        "privacy.max_grad_norm=0.5",
        "optimizer={name: sgd, lr: 0.5, momentum: 0.5}",
    )
    twin = run_twin(
        steps,
        *settings,
        "secure_aggregation.value_bits=28",
        output=tmp_path / "runs",
        ranks=RANKS,
        observer=seen,
    )
    assert twin.codes == [0] * RANKS, twin.err
    path, norms = central(
        tmp_path / "task.py", seen.replicas["aa"][0], 20, clip=0.5, lr=0.5, momentum=0.5
    )
    assert 0.1 < (norms > 0.5).mean() < 0.95, "clipping matters, and not to all"
    assert np.abs(path[-1] - path[0]).max() > 0.2
    assert np.abs(np.array(seen.replicas["aa"]) - path).max() < 1e-5


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_step_is_divided_by_the_expected_batch_of_all_sites(steps: Path, tmp_path: Path):
    """Rates of their own, and never the batch that was drawn: that is private."""
    seen = Seen()
    rates = "sampling_rate={aa: 0.1, bbb: 0.2, cccc: 0.35}"
    twin = run_twin(steps, "rounds=4", rates, output=tmp_path / "runs", ranks=RANKS, observer=seen)
    assert twin.codes == [0] * RANKS, twin.err
    step = seen.algorithms["aa"].grid.step
    for before, after, total in zip(
        seen.replicas["aa"], seen.replicas["aa"][1:], seen.totals["aa"], strict=False
    ):
        assert after - before == pytest.approx(
            -0.2 * total * step / (10 + 20 + 35), rel=1e-4, abs=1e-6
        )


# -- what must not pass unnoticed ------------------------------------------------------------------


def assert_stopped(twin: Twin, sentence: str) -> None:
    assert twin.codes == [1] * RANKS, twin.err
    assert sentence in twin.err
    assert twin.err.count("privfl:") == 1
    assert "round 2/" not in twin.out


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_trainer_that_draws_two_batches_for_one_charged_step(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    once, seen = LocalTraining.sum_gradients, Seen()
    monkeypatch.setattr(
        LocalTraining,
        "sum_gradients",
        lambda self, replica: once(self, replica) + once(self, replica),
    )
    twin = run_twin(steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS, observer=seen)
    assert_stopped(
        twin, "2 batches and 0 shares of noise were drawn for 1 charged steps; nothing is sent"
    )
    assert not seen.integers, "nothing was even rounded"


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_trainer_that_sends_an_old_batch_again(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    once, kept = LocalTraining.sum_gradients, {}

    def again(self: LocalTraining, replica: NDArray[np.float32]) -> NDArray[np.float64]:
        if self not in kept:
            kept[self] = once(self, replica)
        return kept[self]

    monkeypatch.setattr(LocalTraining, "sum_gradients", again)
    twin = run_twin(steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS)
    assert_stopped(
        twin, "1 batches and 1 shares of noise were drawn for 2 charged steps; nothing is sent"
    )


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_share_that_was_not_drawn(steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        Shares, "add", lambda self, total: np.rint(total / self._grid.step).astype(np.int64)
    )
    twin = run_twin(steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS)
    assert_stopped(
        twin, "2 batches and 0 shares of noise were drawn for 2 charged steps; nothing is sent"
    )


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_sum_that_would_be_sent_twice(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    summand = algorithms._GradientSum.summand
    monkeypatch.setattr(
        algorithms._GradientSum,
        "summand",
        lambda self, ranges: (summand(self, ranges), summand(self, ranges))[1],
    )
    twin = run_twin(steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS)
    assert_stopped(twin, "a sum of gradients was to be sent twice")
    assert "round 1/" not in twin.out


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_step_that_was_not_charged(steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forget(self: RunLedger, round_: int) -> None:
        self._steps["training"] += 1

    monkeypatch.setattr(RunLedger, "charge_round", forget)
    seen = Seen()
    twin = run_twin(
        steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS, wrap=seen.wrap, observer=seen
    )
    assert_stopped(twin, "round 1 was not charged to the training records; nothing was sent")
    assert not any(seen.contributions(rank) for rank in (1, 2, 3))


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_sum_that_is_not_finite(steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LocalTraining, "follow", lambda self, gradient: self.flat())
    once = LocalTraining.sum_gradients
    monkeypatch.setattr(
        LocalTraining, "sum_gradients", lambda self, replica: once(self, replica) * math.nan
    )
    twin = run_twin(steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS)
    assert_stopped(
        twin, "sum of gradients contains NaN or infinite values; nothing of this round is sent"
    )


@pytest.mark.usefixtures("trainers_as_threads")
@pytest.mark.parametrize(
    "told", [True, False], ids=["and are compared", "and the coordinator hides it"]
)
def test_replicas_that_drift_apart_end_the_run(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
):
    """One last bit at one site: a sum of gradients at different models is no gradient, and
    nothing more is said about any record.
    """
    move = ActiveRun._move_to

    def drift(self: Any, state: Any, replica: NDArray[np.float32]) -> Any:
        if self._setup.site == "bbb":
            replica = replica.copy()
            replica[3] = np.nextafter(replica[3], np.float32(np.inf))
        return move(self, state, replica)

    report = agent._Agent._report

    def hide(self: Any, body: Any) -> None:
        report(self, messages.Applied(tag="alike") if isinstance(body, messages.Applied) else body)

    monkeypatch.setattr(ActiveRun, "_move_to", drift)
    if not told:
        monkeypatch.setattr(agent._Agent, "_report", hide)
    seen = Seen()
    twin = run_twin(steps, "rounds=3", output=tmp_path / "runs", ranks=RANKS, observer=seen)
    assert twin.codes != [0] * RANKS
    assert "round 2/" not in twin.out
    assert (
        "replicas differ after round 1" if told else "not the sum of what the sites sent"
    ) in twin.err
    assert len(twin.err.splitlines()) == 1
    assert len(seen.totals["aa"]) == 1, "no sum of the second round was decrypted"

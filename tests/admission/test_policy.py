"""The site's law: what a policy refuses before a record is read, and the sentence that says what
would pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from privfl.accounting import PoissonGaussian, RenyiFilter
from privfl.admission.admit import admit
from privfl.admission.plan import RunPlan
from privfl.config import Experiment, load_experiment, load_site
from privfl.errors import PrivflError
from privfl.ledger import Ledger

RUN = "ab" * 16


@pytest.fixture
def policy(small: Path, tmp_path: Path) -> Any:
    """From the keys of a site file and settings of the experiment to what site aa would spend."""

    def admitted(keys: dict[str, Any], *settings: str) -> RunPlan:
        (tmp_path / "aa.yaml").write_text(yaml.safe_dump(keys))
        return admit("aa", load_experiment(small, settings), load_site(tmp_path, "aa"))

    return admitted


LEDGER = {"ledger": "aa.ledger", "budget": {"epsilon": 2.0, "delta": 1e-5}}
TARGET = ("privacy={target_epsilon: 1.0, delta: 1.0e-5, max_grad_norm: 1.0}",)


@pytest.mark.parametrize(
    ("keys", "settings", "sentence"),
    [
        (
            {"least_sites": 3},
            (),
            r"least_sites in its site file\): it has 2 sites, at least 3 would pass",
        ),
        (
            {"least_collusion": 1},
            (),
            r"least_collusion in its site file\): with 2 sites, 1 that pool .* at least 3 sites "
            r"would pass",
        ),
        (
            {"least_noise_multiplier": 2.0, "exact_metrics": ["accuracy"]},
            (),
            r"its noise multiplier is 1\.5; at least 2 would pass, as with a target_epsilon of at "
            r"most 0\.\d+",
        ),
        (
            {"metrics": []},
            (),
            r"\(metrics in its site file\): accuracy would leave the site; allow it there",
        ),
        (
            {"metrics": ["auc"]},
            ("evaluation={metrics: {accuracy: 'task.py:accuracy'}, target_epsilon: 1}",),
            r"\(metrics in its site file\): accuracy would leave the site",
        ),
        (
            LEDGER,
            (),
            r"accuracy would leave the site without noise .*; allow it there, or set "
            r"evaluation.records: "
            r"private",
        ),
        (
            LEDGER | {"exact_metrics": ["accuracy"]},
            ("insecure_test_seed=1",),
            "insecure_test_seed is set, with which nothing is private; remove it",
        ),
        ({"require": ["pinned_keys"], "exact_metrics": ["accuracy"]}, (), ""),
        (
            {"require": ["encryption"]},
            ("insecure_test_seed=1", "evaluation={}"),
            "insecure_test_seed is set, with which nothing is private",
        ),
    ],
)
def test_refusals_say_what_would_pass(
    policy: Any, keys: dict[str, Any], settings: tuple[str, ...], sentence: str
):
    if not sentence:
        policy(keys)  # of keys, prepare_site speaks
        return
    with pytest.raises(PrivflError, match=sentence) as caught:
        policy(keys, *settings)
    assert "\n" not in str(caught.value)


def test_what_the_refusals_name_passes(policy: Any):
    with pytest.raises(PrivflError) as caught:
        policy({"least_noise_multiplier": 2.0, "exact_metrics": ["accuracy"]})
    assert (
        policy(
            {"least_noise_multiplier": 2.0, "exact_metrics": ["accuracy"]},
            "privacy.noise_multiplier=2",
        ).training.noise_multiplier
        == 2.0
    )
    target = str(caught.value).rsplit(" ", 1)[1]
    accepted = policy(
        {"least_noise_multiplier": 2.0, "exact_metrics": ["accuracy"]},
        f"privacy={{target_epsilon: {target}, delta: 1.0e-5, max_grad_norm: 1.0}}",
    )
    assert 2.0 <= accepted.training.noise_multiplier < 2.001
    assert policy(LEDGER | {"exact_metrics": ["accuracy"]}, *TARGET).kept
    assert policy(LEDGER, *TARGET, "evaluation.records=private").metrics is not None


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"ledger": "x"}, "has ledger but no budget"),
        ({"budget": {"epsilon": 1, "delta": 1e-5}}, "has budget but no ledger"),
        (
            {"ledger": "x", "budget": {"epsilon": 0, "delta": 1e-5}},
            "budget.epsilon must be greater than 0",
        ),
        ({"ledger": "x", "budget": {"epsilon": 1}}, "key 'budget.delta' is missing"),
        ({"ledger": {"fil": "x"}}, "unknown key 'ledger.fil'; did you mean 'file'"),
        (
            {"least_noise_multi": 1},
            "unknown key 'least_noise_multi'; did you mean 'least_noise_multiplier'",
        ),
        ({"require": ["noise"]}, "require.0 must be 'encryption', 'masks' or 'pinned_keys'"),
        ({"attempts": 0}, "attempts must be greater than or equal to 1"),
        ({"least_collusion": -1}, "least_collusion must be greater than or equal to 0"),
    ],
)
def test_broken_policies(tmp_path: Path, keys: dict[str, Any], sentence: str):
    (tmp_path / "aa.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(PrivflError) as caught:
        load_site(tmp_path, "aa")
    assert sentence in str(caught.value)


def test_a_ledger_lies_beside_the_site_file(tmp_path: Path):
    (tmp_path / "aa.yaml").write_text(
        "ledger: ledgers/aa.ledger\nbudget: {epsilon: 1, delta: 1.0e-5}\n"
    )
    assert load_site(tmp_path, "aa").ledger.file == str(tmp_path / "ledgers" / "aa.ledger")
    (tmp_path / "aa.yaml").write_text(
        "ledger: {file: aa.ledger, network_file_system: true}\nbudget: {epsilon: 1, delta: "
        "1.0e-5}\n"
    )
    assert load_site(tmp_path, "aa").ledger.network_file_system


# -- budgets ---------------------------------------------------------------------------------------


def spend(path: Path, plan: RunPlan, steps: int) -> None:
    """What a run of so many steps writes."""
    with Ledger.write(path, "aa", plan.filters) as ledger:
        ledger.charge("training", plan.training.times(steps), RUN, 1)


KEPT = LEDGER | {"exact_metrics": ["accuracy"]}


def test_the_target_is_met_in_the_filter_where_a_ledger_is_kept(policy: Any):
    alone, kept = policy({}, *TARGET), policy(KEPT, *TARGET)
    assert (alone.accountant, kept.accountant) == ("rdp", "filter")
    assert 0.99 < alone.planned_epsilon <= 1.0
    assert 0.99 < kept.planned_epsilon <= 1.0
    assert kept.training.noise_multiplier > alone.training.noise_multiplier, (
        "adaptivity has a price"
    )
    # A run without a ledger is charged against its own plan, and that is enough for exactly all of
    # its steps.
    limit = alone.filters["training"]
    assert limit.admits_plan(limit.cost(alone.training))
    assert not limit.admits_plan(limit.cost(alone.training.times(alone.training.steps + 1)))


def test_exactly_as_many_rounds_fit_as_the_refusal_says(policy: Any, tmp_path: Path):
    keys = KEPT | {"budget": {"epsilon": 5.0, "delta": 1e-5}}
    plan = policy(keys, "rounds=50", "privacy.noise_multiplier=2.0")
    spend(tmp_path / "aa.ledger", plan, plan.training.steps)
    with pytest.raises(PrivflError) as caught:
        policy(keys, "rounds=2000", "privacy.noise_multiplier=2.0")
    words = str(caught.value).split()
    fit = int(words[words.index("spent:") + 1])
    assert 0 < fit < 2000
    assert policy(keys, f"rounds={fit}", "privacy.noise_multiplier=2.0").kept
    with pytest.raises(PrivflError, match=f"{fit} of the {fit + 1} rounds"):
        policy(keys, f"rounds={fit + 1}", "privacy.noise_multiplier=2.0")
    # And the other ways out that it names.
    noise = words[words.index("privacy.noise_multiplier") + 1]
    assert policy(keys, "rounds=2000", f"privacy.noise_multiplier={noise}").kept
    with pytest.raises(PrivflError, match="would fit"):
        policy(keys, "rounds=2000", f"privacy.noise_multiplier={float(noise) - 2e-4}")
    target = words[words.index("privacy.target_epsilon") + 1]
    assert policy(
        keys,
        "rounds=2000",
        f"privacy={{target_epsilon: {target}, delta: 1.0e-5, max_grad_norm: 1.0}}",
    ).kept


def test_a_budget_cannot_be_changed(policy: Any, tmp_path: Path):
    spend(tmp_path / "aa.ledger", policy(KEPT, *TARGET), 3)
    with pytest.raises(
        PrivflError,
        match=(
            r"begun with the budget epsilon 2 at delta 1e-05, the file of site aa says epsilon "
            r"20"
        ),
    ):
        policy(KEPT | {"budget": {"epsilon": 20.0, "delta": 1e-5}}, *TARGET)


def test_the_folder_of_a_ledger_must_be_there(policy: Any, tmp_path: Path):
    with pytest.raises(
        PrivflError,
        match=rf"the folder {tmp_path}/away for the ledger of site aa does not exist; make it",
    ):
        policy(KEPT | {"ledger": "away/aa.ledger"}, *TARGET)


def test_another_sites_ledger_is_refused(policy: Any, tmp_path: Path):
    plan = policy(KEPT, *TARGET)
    with Ledger.write(tmp_path / "aa.ledger", "bbb", plan.filters):
        pass
    with pytest.raises(PrivflError, match=r"belongs to site bbb, not to aa"):
        policy(KEPT, *TARGET)


def test_metrics_have_a_budget_of_their_own(policy: Any, tmp_path: Path):
    settings = (*TARGET, "evaluation={metrics: {accuracy: 'task.py:accuracy'}, every: 1}")
    plan = policy(LEDGER, *settings)
    assert plan.metrics.steps == 2
    assert 0.99 < plan.epsilon("evaluation", [plan.metrics]) <= 1.0
    with Ledger.write(tmp_path / "aa.ledger", "aa", plan.filters) as ledger:
        most = plan.filters["evaluation"].times(
            ledger.spent("evaluation"), plan.filters["evaluation"].cost(plan.metrics.once())
        )
        ledger.charge("evaluation", plan.metrics.times(most - 1), RUN, 1)
    with pytest.raises(
        PrivflError,
        match=r"for its evaluation records, .* 1 of the 2 releases of metrics .* would fit",
    ):
        policy(LEDGER, *settings)


def test_by_default_private_metrics_leave_once(small: Path):
    private = (
        "evaluation={metrics: {accuracy: 'task.py:accuracy'}, target_epsilon: 1}",
        "rounds=7",
    )
    assert load_experiment(small, private).metric_releases == 1
    assert load_experiment(small, ("rounds=7",)).metric_releases == 7
    assert load_experiment(small, (*private, "evaluation.every=3")).metric_releases == 3


def test_private_metrics_need_an_epsilon(small: Path):
    with pytest.raises(PrivflError, match=r"evaluation.target_epsilon is missing"):
        load_experiment(small, ("evaluation.records=private",))
    with pytest.raises(PrivflError, match=r"metrics of public records get no noise"):
        load_experiment(small, ("evaluation.target_epsilon=1",))
    experiment: Experiment = load_experiment(small, ("evaluation.records=private", *TARGET))
    assert experiment.metrics_target == 1.0


def test_unreachable_targets(policy: Any):
    with pytest.raises(
        PrivflError,
        match=r"evaluation.target_epsilon 1e-07 cannot be reached at delta 1e-05 with 1 steps",
    ):
        policy(
            {},
            *TARGET,
            "evaluation={metrics: {accuracy: 'task.py:accuracy'}, target_epsilon: 1.0e-7}",
        )


def test_the_filter_of_a_new_ledger_is_planned_for_the_budget(policy: Any):
    plan = policy(KEPT, *TARGET)
    expected = RenyiFilter.planned(2.0, 1e-5, plan.training.once())
    steps = PoissonGaussian(sampling_rate=0.1, noise_multiplier=plan.training.noise_multiplier)
    assert plan.filters["training"].planned_order == expected.planned_order
    assert (
        plan.filters["training"].times(expected.nothing(), expected.cost(steps))
        > plan.training.steps
    )

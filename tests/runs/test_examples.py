"""The starter and the examples run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import yaml

from privfl.config import SiteFile
from tests.conftest import ROOT, run_cli, run_twin, train

HEART = ROOT / "examples" / "heart_disease"


@pytest.mark.usefixtures("trainers_as_threads")
def test_what_the_starter_holds(tmp_path: Path):
    """That it runs is in test_readme.py, where the documents' commands do."""
    made = run_cli("init", tmp_path / "mine")
    assert made.code == 0, made.err
    names = {
        str(p.relative_to(tmp_path / "mine")) for p in (tmp_path / "mine").rglob("*") if p.is_file()
    }
    assert names == {
        "experiment.yaml",
        "digits.py",
        *(f"sites/{s}.yaml" for s in ("north", "east", "south", "west")),
    }
    again = run_cli("init", tmp_path / "mine")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists already; nothing was written" in again.err
    # Every key of the experiment is there with a comment, and the command that init names works.
    text = (tmp_path / "mine" / "experiment.yaml").read_text()
    assert all(
        "#" in line or not line.strip() or line.rstrip().endswith(":") for line in text.splitlines()
    )
    shown = "try it:  mpiexec -n 5 privfl train {0}/experiment.yaml"
    assert made.out.splitlines()[-1] == shown.format(tmp_path / "mine")


def test_site_file_options_work_once_uncommented(tmp_path: Path):
    run_cli("init", tmp_path)
    path = tmp_path / "sites" / "north.yaml"
    values = yaml.safe_load(
        "\n".join(line[2:] for line in path.read_text().splitlines() if re.match(r"# \w+: ", line))
    )
    assert set(values) == set(SiteFile.model_fields)


@pytest.mark.parametrize(
    "path",
    [HEART / "heart_disease.py", ROOT / "privfl" / "demo" / "digits.py"],
    ids=lambda p: p.name,
)
def test_examples_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= 72


def test_each_site_of_the_demo_lacks_three_digits():
    from privfl.demo import digits

    for site in digits.SITES:
        train_set, held_out = digits.data(site)
        assert len(set(train_set.tensors[1].tolist())) <= 7
        assert len(set(held_out.tensors[1].tolist())) == 10


@pytest.mark.usefixtures("trainers_as_threads")
@pytest.mark.parametrize("mode", ["fedavg", "secure"])
def test_heart_disease(
    heart_disease: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setenv("HEART_DISEASE_DIR", str(heart_disease))
    job = run_twin(
        HEART / f"{mode}.yaml", "loss=heart_disease.py:weighted_loss", output=tmp_path, ranks=5
    )
    assert job.codes == [0] * 5, job.err
    summary = json.loads((job.folder / "summary.json").read_text())
    assert {"accuracy", "balanced_accuracy", "auc", "accuracy_mean_over_sites"} <= set(
        summary["metrics"]
    )
    assert all(0.99 < site["epsilon"] <= 1.0 for site in summary["sites"].values())
    assert summary["metrics"]["auc"] > 0.8
    assert not any(site["outside"] for site in summary["sites"].values()), (
        "the default scaling reads no records"
    )


@pytest.mark.usefixtures("trainers_as_threads")
def test_flambys_preparation_is_said_to_be_outside_the_guarantee(
    heart_disease: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HEART_DISEASE_DIR", str(heart_disease))
    job = run_twin(
        HEART / "secure.yaml", "data_options.scaling=flamby", "rounds=1", output=tmp_path, ranks=5
    )
    assert job.codes == [0] * 5, job.err
    sentence = "scaling flamby standardises by the site's records, without noise"
    assert (
        f"WARNING: outside the guarantee at cleveland, hungarian, switzerland, va: {sentence}"
        in " ".join(job.out.split())
    )
    for file in ("summary.json", "report.json", "report.html"):
        assert sentence in (job.folder / file).read_text().replace("&#39;", "'"), file


@pytest.mark.usefixtures("trainers_as_threads")
def test_heart_disease_without_data_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HEART_DISEASE_DIR", str(tmp_path))
    job = run_twin(HEART / "fedavg.yaml", output=tmp_path, ranks=5)
    assert job.codes == [2] * 5
    assert "data (heart_disease.py:data) raised ValueError in line" in job.err
    assert job.err.count("privfl: ") == 1
    (log,) = tmp_path.rglob(f"{re.search('site ([a-z]+): data', job.err)[1]}/site.log")
    assert "set data_options.folder or HEART_DISEASE_DIR" in log.read_text()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mode", "scaling", "bar"),
    [
        ("fedavg", "public", 0.82),
        ("fedavg", "flamby", 0.69),
        ("secure", "public", 0.83),
        ("secure", "flamby", 0.71),
    ],
)
def test_heart_disease_reaches_its_bar(
    heart_disease: Path, tmp_path: Path, mode: str, scaling: str, bar: float
):
    """Mean over the four hospitals' test accuracies at epsilon 1, mean of five independent runs."""
    values = []
    for _ in range(5):
        job = train(
            5,
            HEART / f"{mode}.yaml",
            "--output",
            tmp_path,
            "--set",
            f"data_options.scaling={scaling}",
            env={"HEART_DISEASE_DIR": str(heart_disease)},
        )
        assert job.code == 0, job.err
        values.append(
            json.loads((job.folder / "summary.json").read_text())["metrics"][
                "accuracy_mean_over_sites"
            ]
        )
    assert mean(values) >= bar, values


@pytest.mark.long
@pytest.mark.timeout(600)
def test_accuracy_at_a_small_epsilon(heart_disease: Path, tmp_path: Path):
    """At epsilon 0.1 a single run scatters by 0.05, so the mean of twenty may lie three of its
    own deviations below the bar.
    """
    figures, picture = tmp_path / "figures.json", tmp_path / "accuracy.svg"
    command = [
        sys.executable,
        "-m",
        "benchmarks.accuracy",
        "--epsilons",
        "0.1",
        "--json",
        str(figures),
        "--figure",
        str(picture),
    ]
    environment = {**os.environ, "HEART_DISEASE_DIR": str(heart_disease)}
    subprocess.run(command, check=True, cwd=ROOT, timeout=500, env=environment)
    rows = {(row["scaling"], row["mode"]): row for row in json.loads(figures.read_text())}
    for scaling, bar in (("public", 0.77), ("flamby", 0.69)):
        row = rows[scaling, "fedsgd"]
        assert row["mean"] + 3 * row["std"] / row["runs"] ** 0.5 >= bar, row
        # By 0.09 and 0.06 over a hundred runs; the difference over twenty is known to 0.02.
        assert row["mean"] > rows[scaling, "fedavg"]["mean"], (
            "this is what distributed noise is for"
        )
    assert "distributed noise (fedsgd)" in picture.read_text()


@pytest.mark.long
def test_the_cost_of_a_step_is_measured(tmp_path: Path):
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_cost",
        "--most",
        "10000",
        "--steps",
        "8",
        "--repeats",
        "1",
        "--json",
        str(figures),
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=280)
    rows = json.loads(figures.read_text())
    assert [row["packing"] for row in rows] == ["two values in a word", "one value in a word"]
    for row in rows:
        assert 0 < row["bare"] < row["privfl"]
        assert all(row[part] > 0 for part in ("noise", "masks", "encryption", "decryption"))


@pytest.mark.long
def test_the_benchmark_measures(tmp_path: Path):
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.round_cost",
        "--rounds",
        "6",
        "--repeats",
        "1",
        "--json",
        str(figures),
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=200)
    result = json.loads(figures.read_text())
    assert 0 < result["bare_seconds"] < result["bound_seconds"]
    assert result["privfl_seconds"] > 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_federation_beats_every_site_alone(tmp_path: Path):
    """At the same budget (the same noise for as many steps) the best site alone ends at least
    0.15 below the federation.
    """
    import numpy as np
    import torch

    from privfl.config import demo_path, load_experiment
    from privfl.demo import digits
    from privfl.dp.training import LocalTraining
    from privfl.noise.randomness import SystemRandomness
    from privfl.trainer.main import recipe_of

    job = train(5, "--output", tmp_path)
    summary = json.loads((job.folder / "summary.json").read_text())
    together = summary["metrics"]["accuracy"]
    assert together >= 0.88
    experiment = load_experiment(demo_path())
    held_out = [digits.data(site)[1].tensors for site in digits.SITES]
    alone = {}
    for site in digits.SITES:
        recipe = recipe_of(experiment, site, summary["sites"][site]["noise_multiplier"])
        trainer = LocalTraining(
            digits.linear(),
            digits.loss,
            digits.data(site)[0],
            recipe,
            SystemRandomness(),
            torch.device("cpu"),
        )
        replica = trainer.flat()
        for _ in range(experiment.rounds):
            replica = replica + trainer.train_round(replica)
        trainer.load(replica)
        hits = [digits.accuracy(trainer.model(x), y) for x, y in held_out]
        alone[site] = float(np.sum([int(h) for h, _ in hits]) / np.sum([n for _, n in hits]))
    assert max(alone.values()) <= together - 0.15, alone

"""`privfl budget` and `privfl plan`, as users type them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import budget
from privfl.accounting import PoissonGaussian, RenyiFilter
from privfl.ledger import Ledger
from privfl.reporting.schema import Report
from tests.conftest import call_cli, run_cli, run_twin

# -- commands --------------------------------------------------------------------------------------


@pytest.mark.long
def test_large_ledgers_are_read_in_seconds(tmp_path: Path):
    """The bars of benchmarks.budget, loose by a factor of two, because the machine may be busy."""
    budget.make_ledgers(tmp_path)
    assert (
        budget.process_seconds("budget", "show", tmp_path, repeats=3)
        < 2 * budget.BARS["show_seconds"]
    )
    page = ("--output", tmp_path / "page.html")
    assert (
        budget.process_seconds("budget", "report", tmp_path, *page, repeats=3)
        < 2 * budget.BARS["report_seconds"]
    )


@pytest.mark.usefixtures("trainers_as_threads")
def test_export_and_its_schema(small: Path, tmp_path: Path):
    twin = run_twin(small, output=tmp_path / "runs", ranks=3)
    schema = json.loads(call_cli("budget", "export", "--schema").out)
    assert schema["properties"]["sites"]["items"]["$ref"].endswith("/SiteReport")
    exported = call_cli("budget", "export", twin.folder)
    found = Report.model_validate_json(exported.out)
    assert [site.site for site in found.sites] == ["aa", "bbb"]
    assert found.sound
    table = call_cli("budget", "export", twin.folder, "--format", "csv").out.splitlines()
    assert len(table) == 1 + 2 * 2
    assert table[0].startswith("site,ledger,time,run,round,records,mechanism")
    assert [line.split(",")[-1] for line in table[1:]] == ["3"] * 4
    resolved = yaml.safe_load((twin.folder / "experiment.yaml").read_text())
    assert resolved["output"] == str(tmp_path / "runs"), "what the command line says goes over it"
    page = call_cli("budget", "report", twin.folder, "--output", tmp_path / "page.html")
    assert page.code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_the_schema_describes_every_property():
    schema = json.loads(run_cli("budget", "export", "--schema").out)
    models = [schema, *schema["$defs"].values()]
    properties = {
        f"{model['title']}.{name}": fields
        for model in models
        for name, fields in model["properties"].items()
    }
    assert len(properties) > 70
    assert [
        name
        for name, fields in properties.items()
        if not fields.get("description", "").endswith(".")
    ] == []
    assert [model["title"] for model in models if "description" not in model] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "nothing"), "there is no ledger nothing"),
        (("show", "."), "there is no ledger (*.ledger) in ."),
        (("verify", "text.ledger"), "text.ledger is damaged: file is not a database"),
        (("report", "text.ledger"), "text.ledger is damaged: file is not a database"),
        (
            ("verify", "good.ledger", "text.ledger"),
            "text.ledger is no log of rounds or heads of privfl",
        ),
        (("export",), "name the ledgers to export"),
        (("show",), "Missing argument 'LEDGERS...'"),
    ],
)
def test_wrong_calls(tmp_path: Path, arguments: tuple[str, ...], sentence: str):
    if arguments != ("show", "."):
        (tmp_path / "text.ledger").write_text(
            "not a ledger, but a text that is long enough to look like something" * 20
        )
        event = PoissonGaussian(sampling_rate=0.1, noise_multiplier=2.0)
        with Ledger.write(
            tmp_path / "good.ledger", "aa", {"training": RenyiFilter.planned(1.0, 1e-5, event)}
        ):
            pass
    job = run_cli("budget", *arguments, cwd=tmp_path)
    assert job.code == 2
    assert sentence in job.err
    assert job.err.count("\n") == 1


# -- plan ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("trainers_as_threads")
def test_the_plan_says_what_the_run_will_cost(small: Path, tmp_path: Path, sites: Path):
    job = call_cli("plan", small, "--sites", sites, "--json", "--set", "rounds=3")
    assert job.code == 0, job.err
    plan = json.loads(job.out)["sites"]["aa"]
    assert (plan["steps"], plan["noise_multiplier"], plan["sampling_rate"]) == (9, 1.5, 0.1)
    assert plan["epsilon"]["pld"] <= plan["epsilon"]["rdp"] <= plan["epsilon"]["filter"]
    assert plan["budget"]["training"]["fits"] == 3
    twin = run_twin(small, "rounds=3", output=tmp_path / "runs", ranks=3, sites=sites)
    assert twin.codes == [0, 0, 0], twin.err
    assert json.loads((twin.folder / "summary.json").read_text())["sites"]["aa"][
        "epsilon"
    ] == pytest.approx(plan["epsilon"]["filter"])
    assert plan["curve"][-1] == pytest.approx(plan["epsilon"]["filter"])
    again = json.loads(
        call_cli("plan", small, "--sites", sites, "--json", "--set", "rounds=3").out
    )["sites"]["aa"]["budget"]["training"]
    assert again["spent"] == pytest.approx(plan["budget"]["training"]["after"])
    assert again["more_such_runs"] == plan["budget"]["training"]["more_such_runs"] - 1
    refused = call_cli("plan", small, "--sites", sites, "--set", "rounds=100000")
    assert refused.code == 2
    assert "of the 100000 rounds of this experiment would fit" in refused.err
    assert "of 100000" in refused.out, "the table is there all the same"


@pytest.mark.parametrize("command", ["plan", "train"])
def test_site_files_beside_the_experiment_bind_unless_they_are_left_out(small: Path, command: str):
    folder = small.parent / "sites"
    folder.mkdir(exist_ok=True)
    for site in ("aa", "bbb"):
        (folder / f"{site}.yaml").write_text("least_sites: 9\n")
    both = call_cli(command, small, "--sites", folder, "--no-sites")
    assert (both.code, both.err.count("leave one out")) == (2, 1)
    if command == "plan":
        refused = call_cli("plan", small)
        assert refused.code == 2
        assert "least_sites" in refused.err
        assert call_cli("plan", small, "--no-sites").code == 0
        assert (
            call_cli("plan", small, "--no-sites").out
            == call_cli("plan", small, "--sites", _none(folder)).out
        )


def test_an_epsilon_that_protects_nobody_is_said_to(small: Path):
    weak = ("--set", "privacy.noise_multiplier=null", "--set", "privacy.target_epsilon=1.0e+308")
    plan = call_cli("plan", small, *weak)
    assert plan.code == 0, plan.err
    assert plan.out.count("bounds nothing that a person would notice") == 2
    found = json.loads(call_cli("plan", small, *weak, "--json").out)["sites"]
    assert {site["noise_multiplier"] for site in found.values()} == {0.01}
    assert "would notice" not in call_cli("plan", small).out


def _none(folder: Path) -> Path:
    """A folder with site files that say nothing."""
    empty = folder.parent / "empty"
    empty.mkdir()
    for site in ("aa", "bbb"):
        (empty / f"{site}.yaml").write_text("")
    return empty


def test_the_plan_needs_no_torch_and_no_experiment():
    code = """
import sys
from privfl.cli import main
try:
    main(["plan", "--json"])
except SystemExit:
    sys.exit("torch" in sys.modules or "mpi4py" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    plan = json.loads(done.stdout)
    assert set(plan["sites"]) == {"north", "east", "south", "west"}
    assert 1.99 < plan["sites"]["north"]["epsilon"]["rdp"] <= 2.0

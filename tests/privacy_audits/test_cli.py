"""`privfl audit` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from privacy_audits.registry import AUDITS
from privacy_audits.result import Results
from privfl.reporting.html import to_html
from tests.conftest import call_cli, run_cli
from tests.privacy_audits.test_result import result
from tests.reporting.pages import report, site_report


def test_the_list_names_every_audit():
    job = call_cli("audit", "list")
    assert job.code == 0
    lines = job.out.splitlines()
    assert len(lines) == len(AUDITS)
    for audit, line in zip(AUDITS, lines, strict=True):
        assert line.startswith(audit.name)
        assert line.endswith(audit.asks)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "canarys"), "there is no audit 'canarys'; did you mean 'canaries'?"),
        (("run", "--json", "/nowhere/a.json"), "cannot write /nowhere/a.json"),
        (("sabotage", "--defect", "noise-halfed"), "did you mean 'noise-halved'?"),
        (("report", "/nowhere/a.json"), "cannot read /nowhere/a.json"),
        (
            ("run", "inversion", "--experiment", "mine.yaml"),
            "privfl audit run canaries --experiment mine.yaml",
        ),
        (("run", "canaries", "--experiment", "/nowhere.yaml"), "cannot read the experiment file"),
        (("run", "canaries", "--set", "rounds=2"), "name it with --experiment"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], sentence: str):
    job = call_cli("audit", *arguments)
    assert job.code == 2
    assert job.err.startswith("privfl: ")
    assert job.err.count("\n") == 1
    assert sentence in job.err


def test_the_schema_is_published():
    job = call_cli("audit", "run", "--schema")
    assert json.loads(job.out) == Results.model_json_schema(mode="serialization")


def test_the_page(tmp_path: Path):
    path, page = tmp_path / "audits.json", tmp_path / "audits.html"
    good = result()
    path.write_text(Results(results=(good,)).model_dump_json())
    assert call_cli("audit", "report", path, "--output", page).code == 0
    text = page.read_text()
    assert "No claim was refuted" in text
    assert good.claim.statement in text
    for loads in ("<script", "<link", "http", "url("):
        assert loads not in text
    bad = result(p_value=0.0, attack="looks & finds <b>")
    path.write_text(Results(results=(good, bad)).model_dump_json())
    call_cli("audit", "report", path, "--output", page)
    text = page.read_text()
    assert "1 of 2 claims is refuted" in text
    assert "looks &amp; finds &lt;b&gt;" in text


def test_the_page_in_a_run_folder_is_linked_to_from_the_budget_report(tmp_path: Path):
    path = tmp_path / "audits.json"
    path.write_text(Results(results=(result(),)).model_dump_json())
    job = call_cli("audit", "report", path, "--run", tmp_path)
    assert job.code == 2
    assert f"{tmp_path} is not the folder of a finished run" in job.err
    budget = report(site_report())
    (tmp_path / "report.json").write_text(budget.model_dump_json())
    assert call_cli("audit", "report", path, "--run", tmp_path).code == 0
    assert "No claim was refuted" in (tmp_path / "audit-report.html").read_text()
    assert 'href="audit-report.html"' in (tmp_path / "report.html").read_text()
    assert "audit-report" not in to_html(budget)


@pytest.mark.parametrize("text", ["", "{}", '{"results": [{"name": "x"}]}', "[]"])
def test_another_file_is_no_page(text: str, tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text(text)
    job = call_cli("audit", "report", path)
    assert job.code == 2
    assert f"{path} holds no results of `privfl audit run --json`" in job.err


def test_the_library_works_without_the_audits():
    """The command comes in by an entry point, and is found by the installed program."""
    job = run_cli("--help")
    assert job.code == 0
    assert "audit" in job.out

"""The report as a page: complete, closed in itself, readable without colours, and looked at in a
browser on screen and paper.
"""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise

import pytest

from privfl.reporting.html import MECHANISMS, to_html
from privfl.reporting.numbers import up
from tests.reporting.pages import HOSTILE, VARIANTS, every_page, report, site_report


def tree(page: str) -> ET.Element:
    """The page, read as XML, which forgives nothing."""
    assert page.lstrip().startswith("<!DOCTYPE html>")
    return ET.fromstring(page)


def text_of(page: str) -> str:
    body = tree(page).find("body")
    assert body is not None
    return re.sub(r"\s+", " ", " ".join(body.itertext()))


def sentences(page: str) -> str:
    """The text as it is read: no gap where only an element ends."""
    body = tree(page).find("body")
    assert body is not None
    return re.sub(r"\s+", " ", "".join(body.itertext()))


# -- the page as text ------------------------------------------------------------------------------


@every_page
def test_it_loads_nothing_and_runs_nothing(pages: dict[str, str], name: str):
    page = pages[name]
    root = tree(page)
    for element in root.iter():
        assert element.tag not in (
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "img",
            "image",
            "form",
            "base",
            "video",
            "audio",
        )
        for attribute, value in element.attrib.items():
            assert not attribute.lower().startswith("on"), attribute
            if attribute in ("href", "src"):
                assert value.startswith("#"), value
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", value)), (
                value
            )
    styles = "".join(style.text or "" for style in root.iter("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "http" not in page.replace("http-equiv", "")
    policy = next(
        meta for meta in root.iter("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ).get("content", "")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert root.get("lang") == "en"


@every_page
def test_ids_are_unique_and_all_references_lead_somewhere(pages: dict[str, str], name: str):
    root = tree(pages[name])
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        wanted = element.get("aria-labelledby", "").split() + re.findall(
            r"url\(#([^)]*)", " ".join(element.attrib.values())
        )
        if element.get("href"):
            wanted.append(element.get("href", "")[1:])
        assert set(wanted) <= set(ids)


@every_page
def test_headings_and_tables_can_be_heard(pages: dict[str, str], name: str):
    root = tree(pages[name])
    levels = [
        int(element.tag[1]) for element in root.iter() if re.fullmatch(r"h[1-6]", element.tag)
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert [len(list(root.iter(tag))) for tag in ("header", "main", "footer")] == [1, 1, 1]
    for table in root.iter("table"):
        captions = table.findall("caption")
        assert len(captions) == 1
        assert "".join(captions[0].itertext()).strip()
        assert all(head.get("scope") in ("col", "row") for head in table.iter("th"))
        columns = len(table.findall("thead/tr/th"))
        for row in table.findall("tbody/tr"):
            assert row[0].get("scope") == "row"
            assert len(row) == columns
    regions = [element for element in root.iter("div") if element.get("role") == "region"]
    assert len(regions) == len(list(root.iter("table")))
    assert all(
        region.get("tabindex") == "0" and region.get("aria-labelledby") for region in regions
    )


@every_page
def test_every_plot_has_its_numbers_in_words(pages: dict[str, str], name: str):
    for svg in tree(pages[name]).iter("svg"):
        assert svg.get("role") == "img"
        title, description = svg.findtext("title"), svg.findtext("desc")
        assert title
        assert description
        assert "budget" in description
        assert "metadata" not in {element.tag for element in svg.iter()}


def test_a_plot_says_the_first_number_the_last_and_the_budget(pages: dict[str, str]):
    words = [svg.findtext("desc") or "" for svg in tree(pages["failed"]).iter("svg")]
    assert words[0] == (
        "Epsilon is 0.5 after charge 1 and 1.972 after charge 20, the last. The budget is 3. Runs "
        "begin at charge: 1, 11."
    )
    assert "After run 2 it is 1.972. The budget is 3." in words[1]


def test_hostile_names_are_shown_and_do_nothing(pages: dict[str, str]):
    page = pages["hostile"]
    assert "<script" not in page
    assert "\u202e" not in page
    assert "\x00" not in page
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd")
    assert text_of(page).count(shown) >= 10
    assert tree(page).findtext("head/title") == shown
    page.encode("utf-8")


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("curve", "format"):
                yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    else:
        yield name, value


@pytest.mark.parametrize("name", ["usual", "not kept", "failed", "infinite"])
def test_all_that_is_in_the_report_is_on_the_page(pages: dict[str, str], name: str):
    text = text_of(pages[name])
    found = VARIANTS[name].model_dump()
    words = {
        "training": "training records",
        "evaluation": "evaluation records",
        "rdp": "RDP",
        "filter": "filter",
    } | MECHANISMS
    for one in found["sites"]:
        for run in one["runs"][:-1]:
            del run["adversaries"]  # of the newest run only
        for adversary in one["runs"][-1]["adversaries"]:
            if adversary["epsilon"] == "infinite":
                del adversary["because"]  # which would not hold
    for field, value in _numbers(found):
        if value is None or isinstance(value, bool):
            continue
        if field in ("epsilon", "spent", "rdp", "pld", "filter"):
            assert up(value) in text, (field, value)
        elif isinstance(value, float):
            assert f"{value:.10g}" in text, (field, value)
        elif isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value):
            assert value[:10] + " " + value[11:19] in text, (field, value)
        else:
            assert words.get(str(value), str(value)).lower() in text.lower(), (field, value)


def test_the_summary_is_a_sentence(pages: dict[str, str]):
    wanted = (
        "Site zurich has spent epsilon 1.972 of the 3 that its budget allows (delta 1e-05), over 2 "
        "runs."
    )
    assert wanted in sentences(pages["usual"])
    assert "Site zurich has spent epsilon 1.972 (delta 1e-05), over 2 runs." in sentences(
        pages["not kept"]
    )
    assert "Site zurich has spent an infinite epsilon of the 3" in sentences(pages["infinite"])


@every_page
def test_no_ledger_is_kept_is_said_where_it_is_so(pages: dict[str, str], name: str):
    text = text_of(pages[name]).lower()
    assert text.count("no ledger is kept across runs") == 2 * sum(
        not site.kept for site in VARIANTS[name].sites
    )


@every_page
def test_a_failed_check_is_loud_and_others_are_not(pages: dict[str, str], name: str):
    text = text_of(pages[name])
    assert ("NOT VERIFIED" in text) == ("FAILED" in text) == (not VARIANTS[name].sound)
    assert ("Could not be checked" in text) == any(
        not site.checks or any(check.ok is None for check in site.checks)
        for site in VARIANTS[name].sites
    )


@every_page
def test_what_nothing_protects_is_loud(pages: dict[str, str], name: str):
    text = text_of(pages[name])
    assert ("NOT PRIVATE" in text) == (name == "infinite")
    assert ("INFINITE EPSILON" in text) == (name == "infinite")


def test_metrics_without_noise_are_named(pages: dict[str, str]):
    assert "run 1 released accuracy, recall." in text_of(pages["usual"])


def test_a_dash_comes_with_its_reason(pages: dict[str, str]):
    table = next(
        t
        for t in tree(pages["failed"]).iter("table")
        if "Who could" in "".join(t.find("caption").itertext())
    )  # type: ignore[union-attr]
    cells = ["".join(cell.itertext()).strip() for cell in table.findall("tbody/tr")[0]]
    assert cells == ["the coordinator alone", "masked updates", "—", "encryption: it has no key"]


def test_a_page_about_one_run_says_that_the_site_keeps_a_ledger():
    """Rank 0 writes such a page: it knows that a site keeps a ledger, and not what is in it."""
    alone = site_report().model_copy(update={"budget": None})
    assert {account.accountant for account in alone.accounts} == {"filter"}
    text = to_html(report(alone))
    assert "which this page does not show" in text
    assert "in its ledger" in text
    assert "which this page does not show" not in to_html(report(site_report()))


def test_a_page_made_from_a_ledger_without_a_budget_says_so():
    accounts = [
        account.model_copy(update={"accountant": "rdp"}) for account in site_report().accounts
    ]
    text = to_html(report(site_report(accounts=accounts).model_copy(update={"budget": None})))
    assert "Its ledger has no budget: nothing limits what may be spent of these records." in text
    assert "in its ledger" not in text
    assert "which this page does not show" not in text


# -- the cost of a page ----------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_sites_take_little_time(tmp_path):
    found = report(*(site_report(f"site-{i}", points=400, runs=8, members=10) for i in range(10)))
    (tmp_path / "report.json").write_text(found.model_dump_json())
    script = """
import sys, time
from privfl.reporting.schema import Report
report = Report.model_validate_json(open(sys.argv[1]).read())
began = time.process_time()
from privfl.reporting.html import to_html
assert "matplotlib" not in sys.modules and "jinja2" not in sys.modules
to_html(report)
assert "matplotlib.pyplot" not in sys.modules
print(time.process_time() - began)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "report.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 5.0  # 1.3 s on an idle machine


def test_the_same_report_gives_the_same_page():
    assert to_html(VARIANTS["usual"]) == to_html(VARIANTS["usual"])

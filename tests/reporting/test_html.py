"""The report as a page: complete, closed in itself, readable without colours, and looked at in a browser on screen and paper."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfl.reporting.budget import (
    FORMAT,
    Account,
    Adversary,
    Book,
    Budget,
    Charge,
    Check,
    Cost,
    Epsilon,
    Person,
    Point,
    Report,
    Run,
)
from privfl.reporting.html import MECHANISMS, share, times, to_html, within
from privfl.reporting.plots import after_runs, plain, up
from tests.reporting import browser

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}$x_2$\u202e\x00"
FINE = [Check(what="chain", ok=True, detail="the hashes of all 71 rows fit"), Check(what="heads", ok=True, detail="9 heads fit")]
BROKEN = [FINE[0], Check(what="heads", ok=False, detail="rows were cut off")]
UNSEEN = [FINE[0], Check(what="heads", ok=None, detail="no head was given")]
LONG = "universitaetsklinikum-am-anderen-ende-des-langen-tales-abteilung-fuer-herz-und-gefaesse"


def cost(epsilon: Epsilon = 1.23456, *, kept: bool = True, kind: str = "poisson_gaussian", persons: bool = True) -> Cost:
    person = Person(records=3, epsilon=4.00011, delta=2e-5) if persons else None
    return Cost(
        mechanism=kind,
        sampling_rate=0.125,
        noise_multiplier=1.75,
        steps=47,
        delta=1e-5,
        accountant="filter" if kept else "rdp",
        epsilon=epsilon,
        rdp=1.19994 if epsilon != "infinite" else epsilon,
        pld=1.05551 if epsilon != "infinite" else None,
        filter=epsilon if kept else None,
        person=person,
    )


def book(
    site: str = "zurich", *, runs: int | list[Run] = 2, kept: bool = True, points: int = 20, members: int = 3, **changes: object
) -> Book:
    """A book with so many points on its curve, in which run i is 'f00i...'."""
    text = str(changes.pop("text", "heart.py:model"))
    spent = changes.pop("spent", 1.9718810197)
    private = bool(changes.pop("private", True))
    if isinstance(runs, list):
        runs, changes["runs"] = 1, runs
    names = [f"f{i:03d}" + "ab" * 14 for i in range(1, runs + 1)]
    stamps = [f"2026-03-{1 + i % 28:02d}T10:{i % 60:02d}:07Z" for i in range(points)]
    run_at = [names[i * runs // points] for i in range(points)]
    infinite = spent == "infinite"
    values: list[Epsilon] = ["infinite" if infinite else 0.5 + (float(spent) - 0.5) * i / (points - 1) for i in range(points)]

    def account(name: str) -> Account:
        charges = [
            Charge(
                run=run,
                rounds="1-5, 7",
                first=stamps[0],
                last=stamps[-1],
                kind="poisson_gaussian" if name == "training" else "metric_release",
                sampling_rate=0.125,
                noise_multiplier=1.75,
                most_noise=1.75,
                mechanisms=1,
                steps=47,
                refunded=3,
            )
            for run in names
        ]
        curve = [
            Point(
                charge=i + 1, time=stamps[i], run=run_at[i], round=i + 1, epsilon=value if name == "training" else 0.1 + i / 100
            )
            for i, value in enumerate(values)
        ]
        total = spent if name == "training" else curve[-1].epsilon
        person = Person(records=3, epsilon=9.87654, delta=3 * 1e-5)
        return Account(
            account=name,
            accountant="filter" if kept else "rdp",
            delta=1e-5,
            spent=total,
            person=person,
            charges=charges,
            curve=curve,
        )

    def run(name: str) -> Run:
        found = [Adversary(who="the coordinator alone", sees="masked updates", epsilon=None, because="encryption: it has no key")]
        found += [
            Adversary(who=f"{k} other sites together", sees=text, epsilon="infinite" if infinite else 1.23456, because="noise")
            for k in range(1, members)
        ]
        return Run(
            run=name,
            begun="2026-03-01T10:00:00Z",
            model=text,
            data=text,
            members=[site, *(f"site-{i}" for i in range(1, members))],
            rounds_planned=23,
            rounds_charged=17,
            trust="keys of the other sites not pinned: single trust domain",
            private=private,
            exact_metrics=["accuracy", "recall"] if name == names[0] else [],
            training=cost("infinite" if infinite else 1.23456, kept=kept),
            evaluation=cost(0.34567, kept=kept, kind="metric_release"),
            adversaries=found if members > 1 else [],
        )

    fields = {
        "site": site,
        "source": f"/srv/{site}/budget.ledger",
        "kept": kept,
        "ledger": "0123456789abcdef" * 2,
        "rows": 71,
        "head": "fedcba9876543210" * 4,
        "budget": Budget(epsilon=3.0, delta=1e-5) if kept else None,
        "checks": FINE,
        "accounts": [account("training"), account("evaluation")],
        "runs": [run(name) for name in names],
    }
    return Book.model_validate(fields | changes)


def report(*books: Book, title: str = "Privacy budget") -> Report:
    return Report(
        format=FORMAT,
        made="2026-11-25T20:59:36Z",
        version="0.1.0",
        title=title,
        unit="one record",
        adjacency="zero-out of one record (numerically add/remove)",
        sampling="Poisson: every record enters a step independently of all others",
        books=list(books),
    )


VARIANTS = {
    "usual": report(book("basel", checks=UNSEEN), book("zurich")),
    "not kept": report(book(kept=False, checks=[], ledger=None, rows=None, head=None)),
    "failed": report(book(checks=BROKEN)),
    "infinite": report(book(spent="infinite", private=False)),
    "alone": report(book(members=1, runs=1)),
    "hostile": report(book(HOSTILE, text=HOSTILE, source=HOSTILE), title=HOSTILE),
    "long names": report(book(LONG, text=LONG * 2, members=10)),
    "many runs": report(book(runs=100, points=400)),
    "nothing": report(book(runs=[], accounts=[]), book("bern", accounts=[])),
    "empty": report(),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: to_html(found) for name, found in VARIANTS.items()}


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


every_page = pytest.mark.parametrize("name", VARIANTS)


# -- the page as text ---------------------------------------------------------------------------------------------


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
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", value)), value
    styles = "".join(style.text or "" for style in root.iter("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "http" not in page.replace("http-equiv", "")
    policy = next(meta for meta in root.iter("meta") if meta.get("http-equiv") == "Content-Security-Policy").get("content", "")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert root.get("lang") == "en"


@every_page
def test_ids_are_unique_and_all_references_lead_somewhere(pages: dict[str, str], name: str):
    root = tree(pages[name])
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        wanted = element.get("aria-labelledby", "").split() + re.findall(r"url\(#([^)]*)", " ".join(element.attrib.values()))
        if element.get("href"):
            wanted.append(element.get("href", "")[1:])
        assert set(wanted) <= set(ids)


@every_page
def test_headings_and_tables_can_be_heard(pages: dict[str, str], name: str):
    root = tree(pages[name])
    levels = [int(element.tag[1]) for element in root.iter() if re.fullmatch(r"h[1-6]", element.tag)]
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
    assert all(region.get("tabindex") == "0" and region.get("aria-labelledby") for region in regions)


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
        "Epsilon is 0.5 after charge 1 and 1.972 after charge 20, the last. The budget is 3. Runs begin at charge: 1, 11."
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
    words = {"training": "training records", "evaluation": "evaluation records", "rdp": "RDP", "filter": "filter"} | MECHANISMS
    for book in found["books"]:
        for run in book["runs"][:-1]:
            del run["adversaries"]  # of the newest run only
        for adversary in book["runs"][-1]["adversaries"]:
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
    wanted = "Site zurich has spent epsilon 1.972 of the 3 that its budget allows (delta 1e-05), over 2 runs."
    assert wanted in sentences(pages["usual"])
    assert "Site zurich has spent epsilon 1.972 (delta 1e-05), over 2 runs." in sentences(pages["not kept"])
    assert "Site zurich has spent an infinite epsilon of the 3" in sentences(pages["infinite"])


@every_page
def test_no_book_is_kept_is_said_where_it_is_so(pages: dict[str, str], name: str):
    text = text_of(pages[name]).lower()
    assert text.count("no book is kept across runs") == 2 * sum(not book.kept for book in VARIANTS[name].books)


@every_page
def test_a_failed_check_is_loud_and_others_are_not(pages: dict[str, str], name: str):
    text = text_of(pages[name])
    assert ("NOT VERIFIED" in text) == ("FAILED" in text) == (not VARIANTS[name].sound)
    assert ("Could not be checked" in text) == any(
        not book.checks or any(check.ok is None for check in book.checks) for book in VARIANTS[name].books
    )


@every_page
def test_what_nothing_protects_is_loud(pages: dict[str, str], name: str):
    text = text_of(pages[name])
    assert ("NOT PRIVATE" in text) == (name == "infinite")
    assert ("INFINITE EPSILON" in text) == (name == "infinite")


def test_metrics_without_noise_are_named(pages: dict[str, str]):
    assert "run 1 released accuracy, recall." in text_of(pages["usual"])


def test_a_dash_comes_with_its_reason(pages: dict[str, str]):
    table = next(t for t in tree(pages["failed"]).iter("table") if "Who could" in "".join(t.find("caption").itertext()))  # type: ignore[union-attr]
    cells = ["".join(cell.itertext()).strip() for cell in table.findall("tbody/tr")[0]]
    assert cells == ["the coordinator alone", "masked updates", "—", "encryption: it has no key"]


# -- numbers ------------------------------------------------------------------------------------------------------


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_an_epsilon_is_never_rounded_down(value: float):
    shown = float(up(value))
    assert value <= shown <= value * 1.0011


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.97101, "1.972"),
        (0.1, "0.1"),
        (3.0, "3"),
        (0.0, "0"),
        (9.9991, "10"),
        (12345.6, "12350"),
        (2e-7, "2e-07"),
        (1234567.0, "1.235e+09"),
    ],
)
def test_epsilons_have_four_digits(value: float, shown: str):
    assert up(value) == shown.replace("1.235e+09", "1235000")


def test_what_is_no_number_is_said():
    assert up("infinite") == up(math.inf) == "infinite"
    assert up(math.nan) == plain(math.nan) == "unknown"
    assert times("infinite") == "no bound"
    assert share("infinite", 3.0) == 100.0


def test_rounding_up_does_not_overdraw_a_budget():
    assert within(1.23456, 1.2345678) == "1.2345678"
    assert within(1.23461, 1.2345678) == "1.235"
    assert within(1.2, 3.0) == "1.2"
    assert share(2.99999, 3.0) == 100.0
    assert share(1.0, 3.0) == 33.4


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 3.0, 7.7, 13.0])
def test_the_odds_are_an_upper_bound(epsilon: float):
    assert math.exp(epsilon) <= float(times(epsilon).replace(",", "")) <= math.exp(epsilon) * 1.011


def test_where_a_curve_is_thinned_out_a_run_ends_at_the_next_point():
    account = book(runs=2, points=4).accounts[0]
    numbers = {charge.run: i for i, charge in enumerate(account.charges, 1)}
    assert [epsilon for _, epsilon in after_runs(account, numbers)] == [account.curve[1].epsilon, account.curve[3].epsilon]
    wide = account.model_copy(update={"curve": [p.model_copy(update={"charge": 5 * p.charge}) for p in account.curve]})
    assert [epsilon for _, epsilon in after_runs(wide, numbers)] == [account.curve[2].epsilon, account.curve[3].epsilon]


# -- the cost of a page -------------------------------------------------------------------------------------------


def test_ten_sites_take_little_time(tmp_path):
    found = report(*(book(f"site-{i}", points=400, runs=8, members=10) for i in range(10)))
    (tmp_path / "report.json").write_text(found.model_dump_json())
    script = """
import sys, time
from privfl.reporting.budget import Report
report = Report.model_validate_json(open(sys.argv[1]).read())
began = time.process_time()
from privfl.reporting.html import to_html
assert "matplotlib" not in sys.modules and "jinja2" not in sys.modules
to_html(report)
assert "matplotlib.pyplot" not in sys.modules
print(time.process_time() - began)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "report.json")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 5.0  # 1.3 s on an idle machine


def test_the_same_report_gives_the_same_page():
    assert to_html(VARIANTS["usual"]) == to_html(VARIANTS["usual"])


# -- in a browser -------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="no chromium: apt-get install chromium")
# What is wider than its box, or reaches beyond the page; nothing may.
_SPILLED = """
(() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const e of document.body.querySelectorAll('*')) {
    if (e.ownerSVGElement || e.tagName === 'svg' || e.getAttribute('aria-hidden')) continue;
    const box = e.getBoundingClientRect();
    const cut = e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display !== 'inline';
    if (box.right > width + 1 || box.left < -1 || cut || getComputedStyle(e).display === 'none')
      found.push(e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 60));
  }
  return found;
})()
"""
# 210 mm less both margins of 14 mm, at 96 dots an inch.
_A4_WIDTH = 687


@pytest.fixture(scope="module")
def window() -> Iterator[browser.Browser]:
    with browser.Browser() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pages: dict[str, str]):
    folder = tmp_path_factory.mktemp("pages")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


@needs_browser
@every_page
@pytest.mark.parametrize("width", [1280, 400])
def test_on_a_screen_nothing_is_asked_for_and_nothing_is_too_wide(window: browser.Browser, files, name: str, width: int):
    window.open(files / f"{name}.html", width=width)
    assert window.value("document.documentElement.scrollWidth") <= width
    wanted = [event["params"]["request"]["url"] for event in window.events if event.get("method") == "Network.requestWillBeSent"]
    assert wanted == [(files / f"{name}.html").as_uri()]
    said = [event for event in window.events if event.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert said == []
    assert [event for event in window.events if event.get("method") == "Runtime.exceptionThrown"] == []
    assert window.value("document.compatMode") == "CSS1Compat"
    # Only a table in its own region may be wider than the window.
    outside = window.value(
        f"""[...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll') && !e.ownerSVGElement
        && e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName + e.className)"""
    )
    assert outside == []


@needs_browser
@every_page
def test_on_paper_nothing_is_cut(window: browser.Browser, files, name: str):
    window.open(files / f"{name}.html", width=_A4_WIDTH, media="print", dark=True)
    assert window.value(_SPILLED) == []
    assert window.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert set(window.value("[...document.querySelectorAll('tr, figure')].map(e => getComputedStyle(e).breakInside)")) <= {
        "avoid"
    }
    assert set(window.value("[...document.querySelectorAll('thead')].map(e => getComputedStyle(e).display)")) <= {
        "table-header-group"
    }
    assert set(window.value("[...document.querySelectorAll('.scroll')].map(e => getComputedStyle(e).overflow)")) <= {"visible"}
    began = time.monotonic()
    paper = window.pdf()
    assert paper.startswith(b"%PDF")
    assert time.monotonic() - began < 15.0
    # A4 in points, every page.
    assert {(round(float(w)), round(float(h))) for w, h in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", paper)} <= {
        (595, 842)
    }


@needs_browser
def test_letters_can_be_told_from_the_page(window: browser.Browser, files):
    contrast = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parts = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = 21;
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || ['TITLE', 'DESC', 'title', 'desc'].includes(e.tagName)) continue;
    let behind = e;
    while (behind && parts(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const style = getComputedStyle(e), ink = e.ownerSVGElement ? style.fill : style.color;
    const [a, b] = [light(parts(ink)), light(parts(getComputedStyle(behind || document.body).backgroundColor))];
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst;
})()
"""
    for name in ("failed", "not kept", "infinite"):
        for dark in (False, True):
            window.open(files / f"{name}.html", width=1280, dark=dark)
            assert window.value(contrast) >= 4.5


def test_a_page_about_one_run_says_that_the_site_keeps_a_book():
    """Rank 0 writes such a page: it knows that a site keeps a ledger, and not what is in it."""
    alone = book().model_copy(update={"budget": None})
    text = to_html(report(alone))
    assert "which this page does not show" in text
    assert "in its ledger" in text
    assert "which this page does not show" not in to_html(report(book()))

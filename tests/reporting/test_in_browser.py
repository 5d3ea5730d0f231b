"""The page in a real browser: on screens of two widths, and on paper."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.reporting import browser
from tests.reporting.pages import every_page

pytestmark = pytest.mark.slow

needs_browser = pytest.mark.skipif(
    browser.PROGRAM is None, reason="no chromium: apt-get install chromium"
)
# What is wider than its box, or reaches beyond the page; nothing may.
_SPILLED = """
(() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const e of document.body.querySelectorAll('*')) {
    if (e.ownerSVGElement || e.tagName === 'svg' || e.getAttribute('aria-hidden')) continue;
    const box = e.getBoundingClientRect();
    const cut = e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
      && getComputedStyle(e).display !== 'inline';
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
def test_on_a_screen_nothing_is_asked_for_and_nothing_is_too_wide(
    window: browser.Browser, files, name: str, width: int
):
    window.open(files / f"{name}.html", width=width)
    assert window.value("document.documentElement.scrollWidth") <= width
    wanted = [
        event["params"]["request"]["url"]
        for event in window.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert wanted == [(files / f"{name}.html").as_uri()]
    said = [
        event
        for event in window.events
        if event.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")
    ]
    assert said == []
    assert [
        event for event in window.events if event.get("method") == "Runtime.exceptionThrown"
    ] == []
    assert window.value("document.compatMode") == "CSS1Compat"
    # Only a table in its own region may be wider than the window.
    outside = window.value(
        f"""[...document.body.querySelectorAll('*')].filter(e =>
        !e.closest('.scroll') && !e.ownerSVGElement
        && e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName + e.className)"""
    )
    assert outside == []


@needs_browser
@every_page
def test_on_paper_nothing_is_cut(window: browser.Browser, files, name: str):
    window.open(files / f"{name}.html", width=_A4_WIDTH, media="print", dark=True)
    assert window.value(_SPILLED) == []
    assert window.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert set(
        window.value(
            "[...document.querySelectorAll('tr, figure')].map(e => getComputedStyle(e).breakInside)"
        )
    ) <= {"avoid"}
    assert set(
        window.value(
            "[...document.querySelectorAll('thead')].map(e => getComputedStyle(e).display)"
        )
    ) <= {"table-header-group"}
    assert set(
        window.value(
            "[...document.querySelectorAll('.scroll')].map(e => getComputedStyle(e).overflow)"
        )
    ) <= {"visible"}
    began = time.monotonic()
    paper = window.pdf()
    assert paper.startswith(b"%PDF")
    assert time.monotonic() - began < 15.0
    # A4 in points, every page.
    assert {
        (round(float(w)), round(float(h)))
        for w, h in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", paper)
    } <= {(595, 842)}


@needs_browser
def test_letters_can_be_told_from_the_page(window: browser.Browser, files):
    contrast = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parts = c => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = 21;
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    if (['title', 'desc'].includes(e.tagName.toLowerCase())) continue;
    let behind = e;
    while (behind && parts(getComputedStyle(behind).backgroundColor)[3] < 255)
      behind = behind.parentElement;
    const style = getComputedStyle(e), ink = e.ownerSVGElement ? style.fill : style.color;
    const ground = getComputedStyle(behind || document.body).backgroundColor;
    const [a, b] = [light(parts(ink)), light(parts(ground))];
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst;
})()
"""
    for name in ("failed", "not kept", "infinite"):
        for dark in (False, True):
            window.open(files / f"{name}.html", width=1280, dark=dark)
            assert window.value(contrast) >= 4.5

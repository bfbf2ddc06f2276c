# SPDX-License-Identifier: Apache-2.0
"""The page as Chromium opens it: without a word on the console, alone, whole, and readable on every screen."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, Page, find_chromium, running_browser
from tests.report.run_files import SECTIONS, page_of, write_run
from tests.report.test_page import hostile_files

CHROMIUM = find_chromium()
# Continuous integration installs it (`.ci/run`) and says so: there, that it is missing is an error.
IS_REQUIRED = "REQUIRE_CHROMIUM" in os.environ

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not IS_REQUIRED, reason="no Chromium is installed (apt-get install chromium)"
    ),
]

# How far each element reaches beyond the screen, without those in a part that scrolls by itself.
BEYOND = """
[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll, blockquote') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + '.' + e.className)
"""
# Texts within a figure that meet, or that reach beyond it.
MEETING = """
[...document.querySelectorAll('svg.plot')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const beyond = texts.filter(([, r]) => r.left < frame.left - 2 || r.right > frame.right + 2);
  const pairs = texts.flatMap(([a, r], i) => texts.slice(i + 1).filter(([, q]) =>
    Math.min(r.right, q.right) - Math.max(r.left, q.left) > 1 &&
    Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top) > 2).map(([b]) => svg.id + ': ' + a + ' on ' + b));
  return [...pairs, ...beyond.map(([a]) => svg.id + ': ' + a + ' beyond it')];
})
"""
# The colour of the first text of a figure and of the ground it is on.
COLOURS = """
[getComputedStyle(document.querySelector('svg.plot text')).fill,
 getComputedStyle(document.querySelector('section')).backgroundColor]
"""
SCREENS = [
    pytest.param({"width": 1200}, id="desktop"),
    pytest.param({"width": 1200, "dark": True}, id="dark"),
    pytest.param({"width": 360, "height": 740, "scale": 2.0}, id="telephone"),
    pytest.param({"width": 700, "media": "print"}, id="print"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "REQUIRE_CHROMIUM is set, and no Chromium is installed"
    with running_browser(CHROMIUM) as running:
        yield running


@pytest.fixture(scope="module")
def page(browser: Browser) -> Page:
    return browser.new_page()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("browser") / "a run")
    (folder / "report.html").write_text(page_of(folder), encoding="utf-8")
    return folder / "report.html"


@pytest.mark.parametrize("screen", SCREENS)
def test_it_opens_alone_and_whole(page: Page, report: Path, screen: dict) -> None:
    page.look(**screen)
    page.open(report.as_uri())
    assert page.console == []
    assert page.requests == [report.as_uri()]
    sections = page.evaluate("[...document.querySelectorAll('main section')].map(s => [s.id, s.offsetHeight])")
    assert tuple(name for name, _ in sections) == SECTIONS
    assert min(height for _, height in sections) > 40
    assert page.evaluate("document.querySelectorAll('svg.plot').length") == 3
    assert page.evaluate(BEYOND) == []
    assert page.evaluate(MEETING) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"]


def test_figures_follow_the_page_into_the_dark(page: Page, report: Path) -> None:
    seen = {}
    for dark in (False, True):
        page.look(dark=dark)
        page.open(report.as_uri())
        seen[dark] = page.evaluate(COLOURS)
    assert seen == {
        False: ["rgb(22, 25, 29)", "rgb(255, 255, 255)"],
        True: ["rgb(232, 234, 238)", "rgb(24, 28, 34)"],
    }


def test_hostile_texts_do_nothing(page: Page, tmp_path: Path) -> None:
    hostile = {name.replace(".", "__"): content for name, content in hostile_files().items()}
    path = tmp_path / "report.html"
    path.write_text(page_of(write_run(tmp_path / "run", **hostile)), encoding="utf-8")
    page.look(width=360, height=740)
    page.open(path.as_uri())
    assert page.console == []
    assert page.requests == [path.as_uri()]
    assert tuple(page.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)")) == SECTIONS
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_an_empty_folder_opens_too(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of(tmp_path), encoding="utf-8")
    page.look()
    page.open(path.as_uri())
    assert page.console == []
    assert tuple(page.evaluate("[...document.querySelectorAll('main section')].map(s => s.id)")) == SECTIONS


def test_it_prints_on_a_few_pages(page: Page, report: Path) -> None:
    page.look()
    page.open(report.as_uri())
    num_pages = page.pdf().count(b"/Type /Page\n")
    assert 2 <= num_pages <= 8


def test_what_a_page_must_not_do_would_be_seen(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='width: 2000px'><p>wide</p><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.log('a'); no()</script>"
        "<svg class='plot' id='s' width='99' height='20'><text y='9'>one</text><text y='9' x='3'>two</text></svg>"
    )
    page.look()
    page.open(bad.as_uri())
    assert "http://127.0.0.1:9/x.png" in page.requests
    assert any(line.startswith("log: ['a']") for line in page.console)
    assert any(line.startswith("exception: ") for line in page.console)
    assert any(line.startswith("error: Failed to load resource") for line in page.console)
    assert page.evaluate(BEYOND) != []
    assert page.evaluate(MEETING) == ["s: one on two"]

"""The page in Debian's Chromium: sorting, filtering, both panes in step, nothing else loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components.evaluation.pages.suite_report import ReportOptions, build_suite_report

pytestmark = pytest.mark.slow

TRANSFORMS = "[...document.querySelectorAll('.stage')].map((stage) => stage.style.transform)"
PSNR_COLUMN = (
    "[...document.querySelectorAll('table.sortable tbody tr')].filter((row) => !row.hidden)"
    ".map((row) => Number(row.cells[3].dataset.value))"
)
OPEN = "document.querySelector('#worst button.open').click()"
PICTURES = (
    "[...document.querySelectorAll('.stage img')].filter((image) => image.src)"
    ".every((image) => image.complete && image.naturalWidth)"
)


@pytest.fixture(scope="module")
def page(evaluation: Path) -> Path:
    options = ReportOptions(resamples=200, tiles=evaluation.parent / "page-tiles")
    target = evaluation.parent / "page.html"
    target.write_text(build_suite_report(evaluation, evaluation.parent, options).html)
    return target


def visit(browser: ModuleType, page: Path, act: Callable[[Any], Awaitable[None]]) -> None:
    """Open the page, act, and demand silence on the console and no request beyond files."""

    async def run() -> None:
        async with browser.open_browser() as tab:
            await tab.navigate(page)
            await act(tab)
            assert tab.problems == []
            allowed = ("file:///", "blob:", "data:")
            assert [url for url in tab.requests if not url.startswith(allowed)] == []

    asyncio.run(run())


async def click(tab: Any, selector: str) -> None:
    """A real click in the middle of an element."""
    x, y = await tab.evaluate(
        f"(() => {{ const e = document.querySelector({selector!r});"
        "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        await tab.mouse(kind, x, y, button="left", clickCount=1)


def test_a_click_and_the_enter_key_sort_by_number(browser: ModuleType, page: Path) -> None:
    async def act(tab: Any) -> None:
        head = "table.sortable th:nth-child(4)"
        await click(tab, f"{head} button")
        values = await tab.evaluate(PSNR_COLUMN)
        assert len(values) == 16
        assert values == sorted(values)
        state = f"document.querySelector({head!r}).getAttribute('aria-sort')"
        assert await tab.evaluate(state) == "ascending"
        await tab.evaluate(f"document.querySelector('{head} button').focus()")
        await tab.key("Enter")
        assert await tab.evaluate(state) == "descending"
        values = await tab.evaluate(PSNR_COLUMN)
        assert values == sorted(values, reverse=True)

    visit(browser, page, act)


def test_filters_hide_rows_and_say_how_many_are_left(browser: ModuleType, page: Path) -> None:
    async def act(tab: Any) -> None:
        await tab.evaluate(
            "(() => { const input = document.querySelector('.filter-text'); input.value ="
            " 'ITEM3 prompt</b>'; input.dispatchEvent(new Event('input')); })()"
        )
        shown = "document.querySelector('.shown').textContent"
        assert await tab.evaluate(shown) == "2 of 16 rows"
        await tab.evaluate(
            "(() => { const select = document.querySelector('.filter-system'); select.value ="
            " 'mine'; select.dispatchEvent(new Event('change')); })()"
        )
        assert await tab.evaluate(shown) == "1 of 16 rows"
        assert await tab.evaluate(PSNR_COLUMN) == [24]

    visit(browser, page, act)


def test_both_panes_pan_and_zoom_in_step(browser: ModuleType, page: Path) -> None:
    async def act(tab: Any) -> None:
        await tab.evaluate(OPEN)
        await tab.wait_for("document.getElementById('viewer').open")
        seen = []

        async def in_step() -> None:
            a, b = await tab.evaluate(TRANSFORMS)
            assert a == b
            assert a not in seen
            seen.append(a)

        await in_step()
        assert "scale(1)" in seen[0]
        await tab.mouse("mouseWheel", 900, 400, deltaX=0, deltaY=-240)
        await tab.wait_for("document.querySelector('.viewer-zoom').textContent === '200 %'")
        await in_step()
        await tab.mouse("mousePressed", 300, 400, button="left", clickCount=1)
        await tab.mouse("mouseMoved", 260, 380, button="left", buttons=1)
        await tab.mouse("mouseReleased", 260, 380, button="left")
        await in_step()
        await tab.key("ArrowRight")
        await in_step()
        await tab.key("+", text="+")
        await in_step()
        await tab.key("0", text="0")
        await in_step()
        await tab.wait_for(PICTURES)
        names = "[...document.querySelectorAll('.pane-name')].map((name) => name.textContent)"
        assert await tab.evaluate(names) == ["A  base", "B  mine"]

    visit(browser, page, act)


def test_the_point_under_the_pointer_stays_when_zooming(browser: ModuleType, page: Path) -> None:
    async def act(tab: Any) -> None:
        await tab.evaluate(OPEN)
        at = (
            "(() => { const b = document.querySelector('.stage').getBoundingClientRect();"
            "const zoom = b.width / 700; return [(420 - b.x) / zoom, (300 - b.y) / zoom]; })()"
        )
        before = await tab.evaluate(at)
        await tab.mouse("mouseWheel", 420, 300, deltaX=0, deltaY=-240)
        await tab.wait_for("document.querySelector('.viewer-zoom').textContent === '200 %'")
        after = await tab.evaluate(at)
        assert after == pytest.approx(before, abs=0.05)

    visit(browser, page, act)


def test_slider_and_flip_show_one_place_in_both_systems(browser: ModuleType, page: Path) -> None:
    async def act(tab: Any) -> None:
        await tab.evaluate(OPEN)
        await click(tab, "[data-mode=slider]")
        clip = "getComputedStyle(document.querySelector('.pane[data-side=b]')).clipPath"
        assert "50%" in await tab.evaluate(clip)
        await tab.evaluate("document.querySelector('.cut').focus()")
        await tab.key("ArrowRight")
        assert "52%" in await tab.evaluate(clip)
        await click(tab, "[data-mode=flip]")
        seen = "getComputedStyle(document.querySelector('.pane[data-side=b]')).visibility"
        assert await tab.evaluate(seen) == "hidden"
        await tab.evaluate("document.querySelector('.panes').focus()")
        await tab.key(" ", "Space", " ")
        assert await tab.evaluate(seen) == "visible"
        a, b = await tab.evaluate(TRANSFORMS)
        assert a == b

    visit(browser, page, act)


def test_a_row_opens_its_own_picture_and_escape_closes(browser: ModuleType, page: Path) -> None:
    async def act(tab: Any) -> None:
        await click(tab, "#images button.open[data-item=item6][data-system=mine]")
        await tab.wait_for("document.getElementById('viewer').open")
        title = await tab.evaluate("document.querySelector('.viewer-title').textContent")
        assert title == "item6  (7 of 8)"
        assert await tab.evaluate("document.querySelector('.viewer-b').value") == "mine"
        await tab.key("n", text="n")
        title = await tab.evaluate("document.querySelector('.viewer-title').textContent")
        assert title == "item7  (8 of 8)"
        await tab.key("Escape")
        await tab.wait_for("!document.getElementById('viewer').open")

    visit(browser, page, act)


def test_the_verdict_and_the_deciding_column_are_seen_at_390_px(
    browser: ModuleType, page: Path
) -> None:
    async def act(tab: Any) -> None:
        await tab.resize(390, 844)
        right = await tab.evaluate(
            "Math.max(...[...document.querySelectorAll('#statistics td.verdict')]"
            ".map((cell) => cell.firstElementChild.getBoundingClientRect().right))"
        )
        assert 0 < right <= 390
        # The first sentence is inside the first screen, and the page itself does not scroll aside.
        assert await tab.evaluate(
            "document.querySelector('p.verdict').getBoundingClientRect().bottom < 844"
        )
        assert await tab.evaluate("document.documentElement.scrollWidth <= 390")

    visit(browser, page, act)

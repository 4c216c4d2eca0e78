"""The page of a sweep in a real browser: figures are drawn, nothing is fetched or run, nothing is wider than a telephone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.sweeps.page import sweep_page
from tests.test_sweep_page import HOLD_OUT, hostile_sweep, many, sweep, trial

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

Visit = Callable[..., Any]
LOG = frozenset({"learning_rate"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a common sweep, of a large one, of a hostile one, of one where all failed, and of one trial."""
    directory = tmp_path_factory.mktemp("pages")
    made = {
        "common": many(30, best_metrics=HOLD_OUT, notes=("The grid is done.",)),
        "large": many(200),
        "hostile": hostile_sweep(),
        "failed": sweep(*(trial(number, None, "failed", a=number) for number in range(3))),
        "one": sweep(trial(0, 2.0, a=1)),
    }
    for name, result in made.items():
        (directory / f"{name}.html").write_text(sweep_page(result, LOG), encoding="utf-8")
    return {name: directory / f"{name}.html" for name in made}


@pytest.fixture
def visit(browser: Any, files: dict[str, Path]) -> Iterator[Visit]:
    """Opens a page; at the end nothing may have been logged, have gone wrong, been fetched, or asked the user anything."""
    contexts, faults = [], []

    def note(requested: str, address: str) -> None:
        if requested != address and not requested.startswith(("data:", "blob:")):
            faults.append(f"request: {requested}")

    def open_page(name: str, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 850}, reduced_motion="reduce", **options)
        contexts.append(context)
        page, address = context.new_page(), files[name].as_uri()
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: note(request.url.split("#")[0], address))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def draw_all(page: Any) -> None:
    """Open every section and scroll each chart into view until it is drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    for place in range(page.locator(".plot").count()):
        page.locator(".plot").nth(place).scroll_into_view_if_needed()
        page.locator(".plot").nth(place).and_(page.locator(".js-plotly-plot")).wait_for()


@pytest.mark.parametrize(("name", "charts"), [("common", 4), ("large", 4), ("hostile", 4), ("failed", 0), ("one", 4)])
@pytest.mark.parametrize("width", [1280, 375])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_window(visit: Visit, name: str, charts: int, width: int) -> None:
    page = visit(name, width=width)
    draw_all(page)
    assert page.locator(".js-plotly-plot").count() == charts
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].map((each) => each.querySelectorAll('svg.main-svg').length > 0)"
    assert page.evaluate(drawn) == [True] * charts
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """
        [...document.querySelectorAll('main *')].filter((each) => {
          const box = each.getBoundingClientRect();
          return box.width && box.right > innerWidth + 1 && !each.closest('.scroll, .plot, pre');
        }).map((each) => each.outerHTML.slice(0, 80))
    """
    assert page.evaluate(outside) == []
    assert page.evaluate("window.__hacked") is None


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", ["common", "hostile"])
def test_no_text_of_a_figure_is_cut_at_its_edge(visit: Visit, name: str, width: int) -> None:
    page = visit(name, width=width)
    draw_all(page)
    cut = """
        [...document.querySelectorAll('.js-plotly-plot')].flatMap((plot) => {
          const frame = plot.getBoundingClientRect();
          return [...plot.querySelectorAll('svg text')].filter((each) => {
            const box = each.getBoundingClientRect();
            return box.width && (box.right > frame.right + 1 || box.left < frame.left - 1);
          }).map((each) => each.textContent);
        })
    """
    assert page.evaluate(cut) == []


def test_the_lines_of_the_trials_are_there(visit: Visit) -> None:
    page = visit("common")
    draw_all(page)
    lines = page.locator(".js-plotly-plot").first.locator(".scatterlayer .js-line")
    widths = lines.evaluate_all("lines => lines.map((each) => each.style.strokeWidth)")
    assert {width: widths.count(width) for width in widths} == {"1.4px": 3, "1.2px": 18, "2px": 5, "4.5px": 1}


def test_the_table_is_sorted_by_the_keyboard_and_searched(visit: Visit) -> None:
    page = visit("common")
    table = page.locator(".table", has=page.locator("input[type=search]"))
    head = table.get_by_role("button", name="learning_rate")
    head.focus()
    page.keyboard.press("Enter")
    rates = table.locator("tbody tr").evaluate_all("rows => rows.map((row) => Number(row.cells[3].dataset.v))")
    assert len(rates) == 30 and rates == sorted(rates)
    table.locator("input[type=search]").fill("no finite loss")
    assert table.locator("tbody tr").count() == 3


def test_the_page_prints_with_its_figures_and_every_row(visit: Visit) -> None:
    page = visit("large")
    draw_all(page)
    page.emulate_media(media="print")
    table = page.locator(".table", has=page.locator("input[type=search]"))
    playwright.expect(table.locator("tbody tr")).to_have_count(200)
    assert page.pdf().count(b"/Type /Page") >= 4


def test_both_themes_have_letters_of_their_own_in_the_figures(visit: Visit) -> None:
    colors = []
    for scheme in ("light", "dark"):
        page = visit("common", color_scheme=scheme)
        draw_all(page)
        colors.append(page.locator(".js-plotly-plot text.gtitle").first.evaluate("each => getComputedStyle(each).fill"))
    assert len({*colors}) == 2

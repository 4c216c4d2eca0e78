"""The report's page in a real browser: nothing is fetched, nothing of the data runs, and every control does what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.engine.page import Chart, Page, Section, html
from tests.test_page import HOSTILE, hostile_page, pleasant_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The hostile page and a pleasant one of 1,000 rows, written."""
    directory = tmp_path_factory.mktemp("pages")
    paths = {}
    for name, page in (("hostile", hostile_page()), ("pleasant", pleasant_page())):
        paths[name] = directory / f"{name}.html"
        paths[name].write_text(html(page), encoding="utf-8")
    return paths


@pytest.fixture
def visit(browser: Any, files: dict[str, Path]) -> Iterator[Visit]:
    """Opens a page in a fresh context. At the end nothing may have gone wrong, been fetched, or asked the user anything."""
    contexts, faults = [], []

    def refuse(dialog: Any) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def note(requested: str, address: str) -> None:
        # data: and blob: are the icon, which is empty, and what plotly makes itself: no network.
        if requested != address and not requested.startswith(("data:", "blob:")):
            faults.append(f"request: {requested}")

    def open_page(name: str, width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        address = files[name].as_uri()
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", refuse)
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


def row_numbers(page: Any) -> list[float]:
    return column(page, 0)


def column(page: Any, place: int) -> list[float]:
    """The values of a column of the rows shown."""
    return page.eval_on_selector_all(".rows tbody tr", f"rows => rows.map((row) => Number(row.cells[{place}].dataset.v))")


def status(page: Any) -> str:
    return str(page.locator(".rows .status").inner_text()).replace("\u2013", "-")


@pytest.mark.parametrize("name", ["pleasant", "hostile"])
def test_every_chart_is_drawn_with_its_traces(visit: Visit, name: str) -> None:
    page = visit(name)
    draw_all(page)
    traces = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map((each) => each.data.length)")
    assert traces == {"pleasant": [1, 2], "hostile": [1, 1]}[name]
    assert page.locator(".js-plotly-plot .main-svg").count() >= 2
    assert page.locator(".modebar .plotlyjsicon, .chart a[href]").count() == 0


def test_a_chart_far_away_is_not_drawn_before_it_is_scrolled_to(visit: Visit) -> None:
    page = visit("pleasant", height=400)
    page.locator("head script").wait_for(state="attached")  # plotly.js, unpacked
    assert page.locator(".js-plotly-plot").count() == 0
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.wait_for_selector(".js-plotly-plot .main-svg")
    assert page.locator(".js-plotly-plot").count() < 3


def test_hostile_rows_run_nothing_and_show_as_text(visit: Visit) -> None:
    page = visit("hostile")
    draw_all(page)
    for place in range(page.locator(".rows tbody tr").count()):
        page.locator(".rows tbody tr").nth(place).hover()
    page.locator(".plot .bars").first.hover(force=True)
    assert page.evaluate("window.__hacked") is None
    inputs = page.locator(".rows tbody tr td.input .x").all_text_contents()
    assert inputs[:4] == list(HOSTILE[:4]) and inputs[12] == HOSTILE[12]
    assert inputs[8] == r"\x1b[31mred\x1b[0m\x00\x07\x9b" and inputs[-1] == "empty"
    assert page.locator("main img, main iframe, main a, main script:not([type='application/json'])").count() == 0


def test_a_row_written_from_right_to_left_is_read_so(visit: Visit) -> None:
    page = visit("hostile")
    direction = "each => getComputedStyle(each).direction"
    inputs = page.locator(".rows tbody tr td.input .x")
    assert inputs.nth(12).evaluate(direction) == "rtl" and inputs.nth(0).evaluate(direction) == "ltr"


@pytest.mark.parametrize("width", [1280, 800, 360])
@pytest.mark.parametrize("name", ["pleasant", "hostile"])
def test_the_page_never_scrolls_sideways(visit: Visit, name: str, width: int) -> None:
    page = visit(name, width=width, height=740)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """
        [...document.querySelectorAll('main *')].filter((each) => {
          const box = each.getBoundingClientRect();
          return box.width && box.right > innerWidth + 1 && !each.closest('.scroll, .canvas, .plot, pre');
        }).map((each) => each.outerHTML.slice(0, 80))
    """
    assert page.evaluate(outside) == []
    boxes = "[...document.querySelectorAll('.rows .scroll, .rows td, .rows th')]"
    too_wide = f"{boxes}.filter((each) => each.scrollWidth > each.clientWidth + 1).length"
    assert page.evaluate(too_wide) == 0


def test_rows_come_in_pages(visit: Visit) -> None:
    page = visit("pleasant")
    first = row_numbers(page)
    assert first == [7 * number + 3 for number in range(25)] and status(page) == "Rows 1-25 of 1,000"
    pager = page.locator(".rows .pager")
    assert pager.locator("span").inner_text() == "Page 1 of 40"
    assert pager.locator("button").first.get_attribute("aria-disabled") == "true"
    pager.locator("button").last.click()
    assert row_numbers(page)[0] == 7 * 25 + 3 and status(page) == "Rows 26-50 of 1,000"
    pager.locator("button").first.focus()
    page.keyboard.press("Enter")
    assert row_numbers(page) == first


@pytest.mark.parametrize("place", [0, 2, 3, 4], ids=["row", "base score", "tuned score", "difference"])
def test_rows_are_sorted_by_the_keyboard_up_down_and_back(visit: Visit, place: int) -> None:
    page = visit("pleasant")
    before = row_numbers(page)
    head = page.locator(".rows thead th").nth(place)
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    up = column(page, place)
    assert head.get_attribute("aria-sort") == "ascending" and up == sorted(up)
    page.keyboard.press("Space")
    down = column(page, place)
    assert head.get_attribute("aria-sort") == "descending" and down == sorted(down, reverse=True)
    assert down[0] > up[0] and page.locator(".rows th[aria-sort='descending']").count() == 1
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none" and row_numbers(page) == before


def test_rows_are_searched_in_all_columns_whatever_the_case(visit: Visit) -> None:
    page = visit("hostile")
    search = page.locator(".rows").get_by_label("Search")
    search.fill("ONERROR=")
    found = page.locator(".rows tbody tr").all_inner_texts()
    assert 1 <= len(found) < len(HOSTILE) and all("onerror=" in each.lower() or "=rorreno" in each.lower() for each in found)
    assert re.fullmatch(r"Rows 1-\d of \d \(of 18\)", status(page))
    search.fill("no row has this")
    assert page.locator(".rows tbody tr").count() == 0 and status(page) == "No row matches (of 18)"
    search.fill("")
    assert page.locator(".rows tbody tr").count() == 18


def test_a_search_reads_a_reply_without_the_words_it_misses(visit: Visit) -> None:
    page = visit("pleasant")
    reply = page.evaluate(
        """() => {
          const cell = [...document.querySelectorAll('.rows td.tuned')].find((each) => each.querySelector('del'));
          const copy = cell.cloneNode(true);
          copy.querySelectorAll('del').forEach((each) => each.remove());
          return copy.textContent;
        }"""
    )
    page.locator(".rows").get_by_label("Search").fill(reply.upper())
    assert status(page) == "Rows 1-1 of 1 (of 1,000)"


def test_rows_are_filtered_by_who_is_better(visit: Visit) -> None:
    page = visit("pleasant")
    counts = {}
    for name in ("better", "worse", "equal"):
        choice = page.locator(f".rows input[value={name}]")
        choice.check(force=True)
        differences = column(page, 4)
        assert differences and all({"better": each > 0, "worse": each < 0, "equal": each == 0}[name] for each in differences)
        counts[name] = int(page.locator(f".rows input[value={name}] + span b").inner_text())
        assert status(page).endswith(f" of {counts[name]} (of 1,000)")
    assert sum(counts.values()) == 1000
    page.keyboard.press("ArrowRight")  # from the last choice to the first
    assert status(page) == "Rows 1-25 of 1,000"


def test_marks_can_be_taken_away(visit: Visit) -> None:
    page = visit("pleasant")
    missing = page.locator(".rows tbody del").first
    assert missing.is_visible()
    page.get_by_label("Mark differences").uncheck()
    assert not missing.is_visible()
    assert page.locator(".rows tbody ins").first.evaluate("each => getComputedStyle(each).textDecorationLine") == "none"


def test_another_table_is_sorted_as_numbers_and_searched(visit: Visit) -> None:
    page = visit("pleasant")
    ledger = page.locator(".table:not(.rows)").last
    length = ledger.locator("th[scope=col]").nth(2)
    length.locator("button").click()
    length.locator("button").click()
    assert ledger.locator("tbody tr").first.locator("td").nth(2).inner_text() == "2,837"
    ledger.get_by_label("Search").fill("row 14")
    assert ledger.locator("tbody tr").count() == 11  # 14 and 140 to 149


def test_long_texts_are_folded_until_they_are_asked_for(visit: Visit) -> None:
    page = visit("hostile")
    button = page.locator(".rows .more").first
    text = button.locator("xpath=preceding-sibling::div")
    folded = text.bounding_box()["height"]
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true" and button.inner_text() == "Show less"
    assert text.bounding_box()["height"] > 2 * folded


@pytest.mark.parametrize(("system", "other"), [("light", "dark"), ("dark", "light")])
def test_the_theme_follows_the_system_until_the_button_and_charts_follow_the_theme(visit: Visit, system: str, other: str) -> None:
    page = visit("pleasant", color_scheme=system)
    draw_all(page)
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('.js-plotly-plot')._fullLayout.font.color"
    papers = {"light": "rgb(250, 249, 246)", "dark": "rgb(20, 21, 23)"}
    inks = {"light": "#33312e", "dark": "#d9d6d0"}
    assert page.evaluate(paper) == papers[system] and page.evaluate(ink) == inks[system]
    page.get_by_role("button", name=f"{other.capitalize()} theme").click()
    assert page.evaluate(paper) == papers[other] and page.evaluate(ink) == inks[other]
    page.reload()
    assert page.evaluate(paper) == papers[other]
    page.get_by_role("button", name=f"{system.capitalize()} theme").click()
    assert page.evaluate(paper) == papers[system]


def test_the_theme_changes_where_storage_is_refused(visit: Visit) -> None:
    page = visit("pleasant", color_scheme="light")
    page.evaluate("Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('no', 'SecurityError'); }})")
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 21, 23)"


def test_a_browser_that_cannot_unpack_the_charts_says_so(browser: Any, files: dict[str, Path]) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(files["pleasant"].as_uri())
    page.wait_for_selector(".instead strong")
    assert "cannot unpack the charts" in page.locator(".instead").first.inner_text()
    assert "A histogram around 0.2." in page.locator(".instead").first.inner_text()
    assert page.locator(".rows tbody tr").count() == 25
    page.close()


def test_a_chart_that_cannot_be_drawn_says_so_and_the_others_are_drawn(browser: Any, tmp_path: Path) -> None:
    # A line between the layers of a subplot whose axes are another's overlay: plotly.js 4.1 throws.
    layout = {
        "shapes": [{"type": "line", "layer": "between", "xref": "x", "yref": "y2", "x0": 0, "x1": 1, "y0": 1, "y1": 1}],
        "yaxis2": {"overlaying": "y"},
    }
    broken = Chart({"data": [{"y": [1, 2]}, {"y": [1, 2], "yaxis": "y2"}], "layout": layout}, "", "What it would show.")
    sound = Chart({"data": [{"y": [1, 2]}], "layout": {}}, "", "")
    path = tmp_path / "page.html"
    path.write_text(html(Page("Run", "So it is.", sections=(Section("Charts", (broken, sound)),))))
    page = browser.new_page()
    page.goto(path.as_uri())
    page.locator(".plot").nth(1).and_(page.locator(".js-plotly-plot")).wait_for()
    told = page.locator(".plot").nth(0).inner_text()
    assert "This chart could not be drawn" in told and "What it would show." in told
    page.get_by_role("button", name="Dark theme").click()
    assert page.locator(".instead strong").count() == 1
    page.close()


def test_without_scripts_everything_said_can_be_read(visit: Visit) -> None:
    page = visit("pleasant", java_script_enabled=False)
    assert page.locator("h1").inner_text().startswith("The tuned model is better")
    assert page.get_by_text("0.241 → 0.431").is_visible()
    assert page.locator(".rows tbody tr").count() == 1000
    assert page.get_by_text("A histogram around 0.2.").is_visible()
    assert page.locator("button:visible, input:visible").count() == 0


def test_print_shows_everything_black_on_white_and_the_screen_comes_back(visit: Visit) -> None:
    page = visit("pleasant", color_scheme="dark", width=794)
    page.locator("head script").wait_for(state="attached")  # plotly.js, unpacked
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_selector(".js-plotly-plot >> nth=1")
    assert page.locator(".rows tbody tr").count() == 1000 and page.locator("details:not([open])").count() == 0
    assert page.locator("button:not(th button):visible, input:visible, nav:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor") == (
        "rgb(0, 0, 0)rgb(255, 255, 255)"
    )
    fonts = (
        "[...document.querySelectorAll('.js-plotly-plot')].map((each) => [each._fullLayout.font.color, each._fullLayout.width])"
    )
    assert page.evaluate(fonts) == [["#33312e", 660], ["#33312e", 660]]
    assert page.evaluate("document.documentElement.scrollWidth") == 794
    page.emulate_media(media="screen", color_scheme="dark")
    playwright.expect(page.locator(".rows tbody tr")).to_have_count(25)
    assert page.locator("details:not([open])").count() == 1
    assert {each[0] for each in page.evaluate(fonts)} == {"#d9d6d0"}


def test_a_link_of_the_index_opens_a_collapsed_section(visit: Visit) -> None:
    page = visit("pleasant")
    assert not page.locator(".drawing svg").is_visible()
    page.get_by_role("link", name="How it was computed").click()
    page.locator(".drawing .canvas").wait_for(state="visible")
    before = page.locator(".canvas svg").bounding_box()["width"]
    page.get_by_role("button", name="Larger").click()
    assert page.locator(".canvas svg").bounding_box()["width"] == pytest.approx(1.4 * before, abs=1)
    page.locator(".canvas").press("0")
    assert page.locator(".canvas svg").bounding_box()["width"] == pytest.approx(before, abs=1)


def test_code_is_copied(visit: Visit) -> None:
    page = visit("pleasant", permissions=["clipboard-read", "clipboard-write"])
    page.locator(".copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == (
        "python run.py train \\\n  --model smollm2 \\\n  --data support.json"
    )

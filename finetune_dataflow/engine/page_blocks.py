"""The parts of a page as HTML. Every text is untrusted and escaped; controls that could hide or turn text stand as escapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from finetune_dataflow.engine.colors import plain_text
from finetune_dataflow.engine.page_model import (
    Block,
    Cell,
    Chart,
    Code,
    Drawing,
    Facts,
    Kind,
    Page,
    Prose,
    Row,
    RowTable,
    Section,
    Table,
    Value,
)
from finetune_dataflow.engine.word_marks import MOST_WORDS, word_marks

ROW_TABLE_PAGE, TABLE_PAGE = 25, 100  # rows shown at once
LONG_CHARACTERS, LONG_LINES = 900, 14  # a longer text is folded
CHART_HEIGHT = 380
SCORE_DIGITS = 3
MINUS, DASH = "\u2212", "\u2013"
_TONE_WORDS = {"better": "Better", "worse": "Worse", "unclear": "Unclear"}
_TONE_SHAPES = {"better": "M12 20V5M5 12l7-7 7 7", "worse": "M12 4v15M5 12l7 7 7-7", "unclear": "M4 14c3-6 6-5 8-2s5 4 8-2"}
_LINK = re.compile(r"<(?=\s*/?\s*a\b)", re.IGNORECASE)


def text_html(text: str) -> str:
    """A text as HTML that shows it to the letter."""
    return escape(plain_text(text))


def json_text(value: object) -> str:
    """Compact ASCII JSON that cannot end the script element it stands in."""
    from plotly.utils import PlotlyJSONEncoder

    text = json.dumps(value, cls=PlotlyJSONEncoder, sort_keys=True, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def verdict_html(page: Page) -> str:
    """The verdict, with its tone as a word and a shape."""
    word = _TONE_WORDS.get(page.tone)
    shape = f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{_TONE_SHAPES[page.tone]}"/></svg>' if word else ""
    badge = f'<p class="badge">{shape}{word}</p>' if word else ""
    headline = f'<h1 dir="auto">{text_html(page.headline)}</h1>'
    return f'<section class="verdict {page.tone}" aria-label="Verdict">{badge}{headline}</section>'


def facts_html(pairs: Sequence[tuple[str, str]]) -> str:
    """Labels with their values, as tiles."""
    tiles = "".join(
        f'<div><dt dir="auto">{text_html(label)}</dt><dd dir="auto">{text_html(value)}</dd></div>' for label, value in pairs
    )
    return f'<dl class="facts">{tiles}</dl>' if pairs else ""


def section_html(number: int, section: Section) -> str:
    """A section with its heading and its blocks."""
    title = f'<h2 dir="auto">{text_html(section.title)}</h2>'
    intro = f'<p class="intro" dir="auto">{text_html(section.intro)}</p>' if section.intro else ""
    inside = "\n".join((intro, *(_block(f"{number}-{place}", block) for place, block in enumerate(section.blocks, 1))))
    inside = f"<details><summary>{title}</summary>\n{inside}\n</details>" if section.collapsed else f"{title}\n{inside}"
    return f'<section class="part" id="section-{number}">{inside}\n</section>'


def _block(name: str, block: Block) -> str:
    """The HTML of a block; `name` is unique on the page."""
    match block:
        case Chart():
            return _chart(block)
        case Table():
            return _table(block)
        case RowTable():
            return _row_table(name, block)
        case Drawing():
            return _drawing(block)
        case Facts():
            return facts_html(block.pairs)
        case Prose():
            return "".join(
                f'<p class="prose" dir="auto">{text_html(each.strip())}</p>' for each in re.split(r"\n\s*\n", block.text)
            )
        case Code():
            return (
                f'<figure class="code">{_caption(block.caption)}<button type="button" class="copy js-only">Copy</button>'
                f'<pre tabindex="0"><code>{text_html(block.text)}</code></pre></figure>'
            )


def _caption(text: str) -> str:
    return f'<figcaption dir="auto">{text_html(text)}</figcaption>' if text else ""


def _chart(chart: Chart) -> str:
    figure: Mapping[str, Any] = chart.figure if isinstance(chart.figure, Mapping) else chart.figure.to_plotly_json()
    layout = {"height": CHART_HEIGHT, **figure.get("layout", {})}
    spec = _safe({"data": figure.get("data", []), "layout": layout})
    alt = text_html(chart.alt)
    return (
        f'<figure class="chart"><div class="plot" role="group" aria-label="{alt}" style="min-height:{int(layout["height"])}px">'
        f'<p class="instead" dir="auto">{alt}</p></div>'
        f'<script type="application/json">{json_text(spec)}</script>{_caption(chart.caption)}</figure>'
    )


def _safe(value: object) -> object:
    """A figure with its texts made plain; a link, which plotly would draw, stands as its source."""
    if isinstance(value, str):
        return _LINK.sub("&lt;", plain_text(value))
    if isinstance(value, Mapping):
        return {key: _safe(each) for key, each in value.items()}
    return [_safe(each) for each in value] if isinstance(value, list | tuple) else value


def _drawing(drawing: Drawing) -> str:
    buttons = "".join(
        f'<button type="button" data-zoom="{zoom}" aria-label="{label}">{sign}</button>'
        for zoom, label, sign in (("out", "Smaller", MINUS), ("in", "Larger", "+"), ("fit", "Fit to the width", "Fit"))
    )
    return (
        f'<figure class="drawing"><div class="zoom js-only">{buttons}</div>'
        f'<div class="canvas" role="img" aria-label="{text_html(drawing.alt)}" tabindex="0">'
        f"{plain_text(drawing.svg[max(drawing.svg.find('<svg'), 0) :])}</div>{_caption(drawing.caption)}</figure>"
    )


def _column_kinds(table: Table) -> list[Kind]:
    """The kind of each column, as given or by its values."""
    if table.kinds:
        return list(table.kinds)
    return [
        "number"
        if any(_number(each) is not None for each in values) and not any(isinstance(each, str) for each in values)
        else "text"
        for values in zip(*table.rows, strict=True)
    ] or ["text"] * len(table.columns)


def _table(table: Table) -> str:
    kinds = _column_kinds(table)
    heads = [(column, kind in ("number", "diff"), table.sortable) for column, kind in zip(table.columns, kinds, strict=True)]
    lines = []
    for row in table.rows:
        cells = "".join(_cell(value, kind, first=not place) for place, (value, kind) in enumerate(zip(row, kinds, strict=True)))
        lines.append(f"<tr>{cells}</tr>")
    search = _SEARCH if table.searchable else ""
    return _with_controls("table", TABLE_PAGE, search, _caption_of_table(table.caption), _heads(heads), lines)


def _number(value: Value) -> float | None:
    """What a cell is sorted by; None where that is no number."""
    number = value.value if isinstance(value, Cell) else value
    return None if number is None or isinstance(number, str) or math.isnan(number) else number


def _cell(value: Value, kind: Kind, first: bool) -> str:
    number, tone = _number(value), value.tone if isinstance(value, Cell) else "none"
    shown = (
        text_html(value.text if isinstance(value, Cell) else value) if isinstance(value, Cell | str) else _digits(number, kind)
    )
    word = "" if tone == "none" else f" <small>{tone}</small>"
    if kind in ("number", "diff"):
        return f'<td class="num {tone}" data-v="{_key(number)}">{shown}{word}</td>'
    if kind == "code":
        return f'<td class="{tone}"><code>{shown}</code>{word}</td>'
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    return f'<{tag}{scope} class="{tone}">{_folded(shown)}{word}</{tag}>'


def _key(number: float | None) -> str:
    """A number as the script reads it, nothing for none."""
    return "" if number is None else str(number if isinstance(number, int) else f"{number:.9g}").replace("inf", "Infinity")


def _digits(number: float | None, kind: Kind) -> str:
    """A whole number in full with its thousands parted, another with four digits; a dash for none."""
    if number is None:
        return DASH
    sign = "+" if kind == "diff" and number else ""
    if math.isinf(number):
        return f"{MINUS if number < 0 else sign}\u221e"
    whole = float(number).is_integer() or abs(number) >= 1e4
    form = f"{sign},.0f" if whole and abs(number) < 1e15 else f"{sign}.4g"
    return format(number, form).replace("-", MINUS)


def _row_table(name: str, table: RowTable) -> str:
    heads = [
        ("Row", True, True), ("Input", False, False), (f"{table.base} {table.score}", True, True),
        (f"{table.tuned} {table.score}", True, True), ("Difference", True, True), ("Reference", False, False),
        (f"{table.base} reply", False, False), (f"{table.tuned} reply", False, False),
    ]  # fmt: skip
    states = [_state(row[5], row[6], table.higher_is_better) for row in table.rows]
    lines = [_row(table, Row(*row), state) for row, state in zip(table.rows, states, strict=True)]
    choices = [
        ("all", "All", len(states)),
        *((each, each.capitalize(), states.count(each)) for each in ("better", "worse", "equal")),
    ]
    radios = "".join(
        f'<label><input type="radio" name="show-{name}" value="{value}"{" checked" * (value == "all")}>'
        f"<span>{label} <b>{count:,}</b></span></label>"
        for value, label, count in choices
    )
    compared = f"{text_html(table.tuned)} against {text_html(table.base)}"
    controls = (
        f'<fieldset class="choices"><legend>{compared}</legend>{radios}</fieldset>{_SEARCH}'
        '<label class="marking"><input type="checkbox" checked> Mark differences</label>'
    )
    legend = (
        f'{text_html(table.caption)} <span class="legend">Replies against the reference: <ins>words it does not have</ins>, '
        "<del>words of it that are missing</del>.</span>"
    )
    return _with_controls("table rows", ROW_TABLE_PAGE, controls, f"<caption>{legend}</caption>", _heads(heads), lines)


def _state(base: float | None, tuned: float | None, higher_is_better: bool) -> str:
    """What the filter calls a row: better, worse, equal, or none without two scores."""
    difference = _difference(base, tuned)
    if difference is None:
        return "none"
    return "equal" if not difference else "better" if (difference > 0) == higher_is_better else "worse"


def _difference(base: float | None, tuned: float | None) -> float | None:
    if base is None or tuned is None or not math.isfinite(tuned - base):
        return None
    return round(tuned - base, SCORE_DIGITS)


def _row(table: RowTable, row: Row, state: str) -> str:
    cells = [f'<tr class="{state}"><td class="num row" data-label="Row" data-v="{row.number}">{row.number}</td>']
    cells.append(_text_cell("input", "Input", _folded(text_html(row.input))))
    for label, value, sign, word in (
        (f"{table.base} {table.score}", row.base_score, "", ""),
        (f"{table.tuned} {table.score}", row.tuned_score, "", ""),
        ("Difference", _difference(row.base_score, row.tuned_score), "+", "" if state == "none" else f" <small>{state}</small>"),
    ):
        number = _number(value)
        shown = DASH if number is None else f"{number:{sign if number else ''}.{SCORE_DIGITS}f}".replace("-", MINUS)
        cells.append(f'<td class="num score" data-label="{text_html(label)}" data-v="{_key(number)}">{shown}{word}</td>')
    cells.append(_text_cell("reference", "Reference", _folded(text_html(row.reference))))
    cells.append(_text_cell("base", f"{table.base} reply", _marked(row.reference, row.base)))
    cells.append(_text_cell("tuned", f"{table.tuned} reply", _marked(row.reference, row.tuned)))
    return "".join(cells) + "</tr>"


def _text_cell(kind: str, label: str, inside: str) -> str:
    return f'<td class="{kind}" data-label="{text_html(label)}">{inside}</td>'


def _marked(reference: str, reply: str) -> str:
    """A reply with what differs from the reference in <ins> and <del>."""
    marks = word_marks(reference, reply)
    if marks is None:
        return _folded(text_html(reply)) + f'<p class="hint">Not marked: more than {MOST_WORDS:,} words.</p>'
    if reference and marks == [("extra", reply)]:
        return _folded(text_html(reply)) + '<p class="hint">Differs throughout.</p>'
    tags = {"same": "{}", "extra": "<ins>{}</ins>", "missing": "<del>{}</del>"}
    return _folded("".join(tags[kind].format(text_html(text)) for kind, text in marks), empty=not reply)


def _folded(shown: str, empty: bool | None = None) -> str:
    """A text, its HTML given, in a box of its own direction; a long one is for the script to fold."""
    nothing = '<span class="empty">empty</span>' if (not shown if empty is None else empty) else ""
    if len(shown) <= LONG_CHARACTERS and shown.count("\n") < LONG_LINES:
        return f'<div class="x" dir="auto">{nothing}{shown}</div>'
    return (
        f'<div class="x long" dir="auto">{nothing}{shown}</div>'
        '<button type="button" class="more js-only" aria-expanded="false">Show all</button>'
    )


def _caption_of_table(text: str) -> str:
    return f'<caption dir="auto">{text_html(text)}</caption>' if text else ""


def _heads(columns: Sequence[tuple[str, bool, bool]]) -> str:
    """The head of a table of columns: each name, whether it is one of numbers, and whether it sorts."""
    return "".join(
        f'<th scope="col"{" class=num" * numeric}{" data-sort" * sortable}>{text_html(name)}</th>'
        for name, numeric, sortable in columns
    )


_SEARCH = (
    '<label class="search"><span>Search</span><input type="search" placeholder="in all columns" autocomplete="off" '
    'spellcheck="false"></label>'
)


def _with_controls(kind: str, size: int, controls: str, caption: str, heads: str, lines: Sequence[str]) -> str:
    """A table with what the script needs to search, sort, filter and page it."""
    tools = f'<div class="tools js-only">{controls}</div>' if controls else ""
    pager = (
        '<div class="pager js-only"><button type="button" data-step="-1">Previous</button><span></span>'
        '<button type="button" data-step="1">Next</button></div>'
    )
    body = "\n".join(lines)
    return (
        f'<div class="{kind}" data-size="{size}">{tools}<p class="status js-only" role="status"></p>'
        f'<div class="scroll"><table>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        f"{pager if len(lines) > size else ''}</div>"
    )

"""A report as one HTML file that needs nothing else: no network, no server, no script but its own two.

Every text is untrusted: it is shown as text, whatever is in it. The page's Content-Security-Policy lets two scripts run,
known by their SHA-256, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from importlib.resources import files
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from finetune_dataflow.engine.colors import plain_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

Tone = Literal["better", "worse", "unclear", "none"]
Kind = Literal["text", "number", "code", "diff"]
Mark: TypeAlias = tuple[Literal["same", "extra", "missing"], str]
Value: TypeAlias = "str | float | Cell | None"

ROW_TABLE_PAGE, TABLE_PAGE = 25, 100  # rows shown at once
LONG_CHARACTERS, LONG_LINES = 900, 14  # a longer text is folded
CHART_HEIGHT = 380
MOST_WORDS = 3000  # in a text whose differences are marked: the table of two such takes 18 MB
LEAST_SHARED = 0.4  # of the words of both: with fewer, a reply differs throughout
LONE_AMONG = 3
SCORE_DIGITS = 3
MINUS, DASH = "\u2212", "\u2013"

_TONE_WORDS = {"better": "Better", "worse": "Worse", "unclear": "Unclear"}
_TONE_SHAPES = {"better": "M12 20V5M5 12l7-7 7 7", "worse": "M12 4v15M5 12l7 7 7-7", "unclear": "M4 14c3-6 6-5 8-2s5 4 8-2"}
# Chinese and Japanese have no spaces: each character counts as a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s,.;:!?\"()\[\]{}<>、。\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\S"
)
_LINK = re.compile(r"<(?=\s*/?\s*a\b)", re.IGNORECASE)
_CLEAR = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}


@dataclass(frozen=True)
class Cell:
    """A table's cell whose text is not its value: sorted by `value`, and coloured and called better or worse by `tone`."""

    text: str
    value: float | None = None
    tone: Tone = "none"

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown tone."""
        _known("tone", self.tone, get_args(Tone))


@dataclass(frozen=True)
class Chart:
    """A plotly figure (or its dict), drawn when it is scrolled to. `alt` says in words what it shows."""

    figure: go.Figure | Mapping[str, object]
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns. A column's kind, where none is given, is number if all its values are, else text.

    number and diff are right-aligned and sorted as numbers, a diff bears its sign; code is monospaced. Floats show four
    digits; what is no number shows as a dash and sorts last. From 100 rows on there are pages.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    caption: str = ""
    kinds: Sequence[Kind] = ()
    sortable: bool = True
    searchable: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a row or kinds of another length than the columns, or an unknown kind."""
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns")
        if self.kinds and len(self.kinds) != len(self.columns):
            raise ValueError(f"{len(self.kinds)} kinds for {len(self.columns)} columns")
        for kind in self.kinds:
            _known("kind", kind, get_args(Kind))


@dataclass(frozen=True)
class Facts:
    """Labels with their values, as small tiles."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Prose:
    """Paragraphs, parted by blank lines."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands or a file, monospaced, with a button that copies it."""

    text: str
    caption: str = ""


@dataclass(frozen=True)
class Drawing:
    """An SVG text of our own making, which is embedded as it is, in a box that scrolls and zooms. `alt` says what it shows."""

    svg: str
    caption: str
    alt: str


class Row(NamedTuple):
    """A row of the hold-out: its number, its texts, and the scores of two replies (None where there is none)."""

    number: int
    input: str
    reference: str
    base: str
    tuned: str
    base_score: float | None
    tuned_score: float | None


@dataclass(frozen=True)
class RowTable:
    """Rows of the hold-out with the replies of two models, each marked word by word against the reference.

    Searched, sorted and filtered by which reply scored better; scores equal to three digits are equal. `base` and `tuned`
    name the models, `score` their score, which is better when higher unless `higher_is_better` is false. A plain tuple
    will do for a `Row`.
    """

    rows: Sequence[Row | tuple[int, str, str, str, str, float | None, float | None]]
    caption: str = ""
    base: str = "Base"
    tuned: str = "Tuned"
    score: str = "score"
    higher_is_better: bool = True


Block: TypeAlias = Chart | Table | Facts | Prose | Code | Drawing | RowTable


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its index. A collapsed one shows its title until it is opened or printed."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""
    collapsed: bool = False


@dataclass(frozen=True)
class Page:
    """What a page says: a verdict of one sentence with its tone, warnings, facts, and sections."""

    title: str
    headline: str
    tone: Tone = "none"
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    footer: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown tone."""
        _known("tone", self.tone, get_args(Tone))


LIGHT_LAYOUT: Mapping[str, object] = {
    **_CLEAR,
    "font": {"color": "#33312e"},
    "xaxis": {"gridcolor": "#e4e1da", "linecolor": "#bdb8ae", "zerolinecolor": "#bdb8ae"},
    "yaxis": {"gridcolor": "#e4e1da", "linecolor": "#bdb8ae", "zerolinecolor": "#bdb8ae"},
}
DARK_LAYOUT: Mapping[str, object] = {
    **_CLEAR,
    "font": {"color": "#d9d6d0"},
    "xaxis": {"gridcolor": "#34363b", "linecolor": "#55585f", "zerolinecolor": "#55585f"},
    "yaxis": {"gridcolor": "#34363b", "linecolor": "#55585f", "zerolinecolor": "#55585f"},
}


def html(page: Page, light_layout: Mapping[str, object] = LIGHT_LAYOUT, dark_layout: Mapping[str, object] = DARK_LAYOUT) -> str:
    """The page as the text of one HTML file; the same page gives the same text, which UTF-8 can always encode.

    The layouts are put over each chart's own where the theme is light (or printed) or dark: plotly's attributes, nested or
    dotted; what they say of `xaxis` and `yaxis` goes for every axis of the letter.
    """
    sections = [_section(number, section) for number, section in enumerate(page.sections, 1)]
    drawn = any(isinstance(block, Chart) for section in page.sections for block in section.blocks)
    packed, library_hash = _plotly() if drawn else ("", "")
    themes = _json({"light": light_layout, "dark": dark_layout})
    script = _asset("page.js")
    scripts = " ".join(f"'sha256-{each}'" for each in (_sha256(script), library_hash) if each)
    policy = f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "base-uri 'none'; form-action 'none'"
    index = "".join(
        f'<li><a href="#section-{number}">{_text(each.title)}</a></li>' for number, each in enumerate(page.sections, 1)
    )
    notes = "".join(f"<li dir=auto>{_text(each)}</li>" for each in page.notes)
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            f'<link rel="icon" href="data:,">\n<title>{_text(page.title)}</title>',
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>",
            '<a class="skip" href="#content">Skip to the content</a>',
            f'<header class="top"><p class="title"><bdi>{_text(page.title)}</bdi></p>',
            '<button type="button" class="theme js-only">Dark</button></header>',
            f'<nav aria-label="Contents"><ol>{index}</ol></nav>' if index else "<nav hidden></nav>",
            '<main id="content">',
            _verdict(page),
            f'<aside class="notes" aria-label="Warnings"><ul>{notes}</ul></aside>' if notes else "",
            _facts(page.facts),
            *sections,
            f"<footer dir=auto>{_text(page.footer)}</footer>" if page.footer else "",
            "</main>",
            f'<script type="application/json" id="themes">{themes}</script>',
            f'<script type="text/plain" id="plotly">{packed}</script>' if packed else "",
            f"<script>{script}</script>\n</body>\n</html>\n",
        )
    )


def word_marks(reference: str, reply: str) -> list[Mark] | None:
    """A reply in pieces, compared with its reference word by word: a longest common subsequence; spaces are not compared.

    The "same" and "extra" pieces together are the reply; "missing" ones are words of the reference, where they would
    stand. A common word alone among three or more changed ones on both sides counts as changed, and a reply that shares
    fewer than 40 % of the words is one "extra" piece. None where a text has more than 3,000 words.
    """
    there, here = list(_WORD.finditer(reference)), list(_WORD.finditer(reply))
    if max(len(there), len(here)) > MOST_WORDS:
        return None
    common = _common([each[0] for each in there], [each[0] for each in here])
    around = list(pairwise([(-1, -1), *common, (len(there), len(here))]))
    wide = [max(after[0] - before[0], after[1] - before[1]) > LONE_AMONG for before, after in around]
    if 2 * len(common) < LEAST_SHARED * (len(there) + len(here)):
        return [("extra", reply)] if reply else []
    kept = [pair for place, pair in enumerate(common) if not (wide[place] and wide[place + 1])]
    marks: list[Mark] = []
    for (old, new), (next_old, next_new) in pairwise([(-1, -1), *kept, (len(there), len(here))]):
        start, end = here[new].end() if new >= 0 else 0, here[next_new].start() if next_new < len(here) else len(reply)
        marks.append(("same", here[new][0] if new >= 0 else ""))
        missed = there[old + 1 : next_old]
        missing: Mark = ("missing", reference[missed[0].start() : missed[-1].end()] if missed else "")
        attached = bool(missed) and old >= 0 and there[old].end() == missed[0].start()
        extra = reply[start:end].strip()
        before, after = reply[start:end].split(extra, 1) if extra else (reply[start:end], "")
        marks += [missing, ("same", before)] if attached else [("same", before), missing]
        marks += [("extra", extra), ("same", after)]
    return [
        (kind, "".join(text for _, text in group))
        for kind, group in groupby((each for each in marks if each[1]), key=lambda each: each[0])
    ]


def _common(there: Sequence[str], here: Sequence[str]) -> list[tuple[int, int]]:
    """The places of a longest common subsequence of two lists of words, in both."""
    numbers: dict[str, int] = {}
    old, new = (np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int32) for words in (there, here))
    lengths = np.zeros((len(old) + 1, len(new) + 1), np.int16)
    for row, word in enumerate(old, 1):
        extended = np.maximum(lengths[row - 1, 1:], lengths[row - 1, :-1] + (new == word))
        np.maximum.accumulate(extended, out=lengths[row, 1:])
    pairs, row, column = [], len(old), len(new)
    while row and column:
        if old[row - 1] == new[column - 1]:
            row, column = row - 1, column - 1
            pairs.append((row, column))
        elif lengths[row - 1, column] >= lengths[row, column - 1]:
            row -= 1
        else:
            column -= 1
    return pairs[::-1]


def _known(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _text(text: str) -> str:
    return escape(plain_text(text))


def _json(value: object) -> str:
    """Compact ASCII JSON that cannot end the script element it stands in."""
    from plotly.utils import PlotlyJSONEncoder

    text = json.dumps(value, cls=PlotlyJSONEncoder, sort_keys=True, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@lru_cache
def _asset(name: str) -> str:
    return (files("finetune_dataflow.engine") / "page_assets" / name).read_text(encoding="utf-8")


@lru_cache
def _plotly() -> tuple[str, str]:
    """plotly.js, deflated and in base64, and the SHA-256 of its source."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return base64.b64encode(zlib.compress(source.encode(), 9)).decode(), _sha256(source)


def _verdict(page: Page) -> str:
    word = _TONE_WORDS.get(page.tone)
    shape = f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{_TONE_SHAPES[page.tone]}"/></svg>' if word else ""
    badge = f'<p class="badge">{shape}{word}</p>' if word else ""
    return (
        f'<section class="verdict {page.tone}" aria-label="Verdict">{badge}<h1 dir="auto">{_text(page.headline)}</h1></section>'
    )


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    tiles = "".join(f'<div><dt dir="auto">{_text(label)}</dt><dd dir="auto">{_text(value)}</dd></div>' for label, value in pairs)
    return f'<dl class="facts">{tiles}</dl>' if pairs else ""


def _section(number: int, section: Section) -> str:
    title = f'<h2 dir="auto">{_text(section.title)}</h2>'
    intro = f'<p class="intro" dir="auto">{_text(section.intro)}</p>' if section.intro else ""
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
            return _facts(block.pairs)
        case Prose():
            return "".join(f'<p class="prose" dir="auto">{_text(each.strip())}</p>' for each in re.split(r"\n\s*\n", block.text))
        case Code():
            return (
                f'<figure class="code">{_caption(block.caption)}<button type="button" class="copy js-only">Copy</button>'
                f'<pre tabindex="0"><code>{_text(block.text)}</code></pre></figure>'
            )


def _caption(text: str) -> str:
    return f'<figcaption dir="auto">{_text(text)}</figcaption>' if text else ""


def _chart(chart: Chart) -> str:
    figure: Mapping[str, Any] = chart.figure if isinstance(chart.figure, Mapping) else chart.figure.to_plotly_json()
    layout = {"height": CHART_HEIGHT, **figure.get("layout", {})}
    spec = _safe({"data": figure.get("data", []), "layout": layout})
    alt = _text(chart.alt)
    return (
        f'<figure class="chart"><div class="plot" role="group" aria-label="{alt}" style="min-height:{int(layout["height"])}px">'
        f'<p class="instead" dir="auto">{alt}</p></div>'
        f'<script type="application/json">{_json(spec)}</script>{_caption(chart.caption)}</figure>'
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
        f'<div class="canvas" role="img" aria-label="{_text(drawing.alt)}" tabindex="0">'
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
    shown = _text(value.text if isinstance(value, Cell) else value) if isinstance(value, Cell | str) else _digits(number, kind)
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
    controls = (
        f'<fieldset class="choices"><legend>{_text(table.tuned)} against {_text(table.base)}</legend>{radios}</fieldset>{_SEARCH}'
        '<label class="marking"><input type="checkbox" checked> Mark differences</label>'
    )
    legend = (
        f'{_text(table.caption)} <span class="legend">Replies against the reference: <ins>words it does not have</ins>, '
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
    cells.append(_text_cell("input", "Input", _folded(_text(row.input))))
    for label, value, sign, word in (
        (f"{table.base} {table.score}", row.base_score, "", ""),
        (f"{table.tuned} {table.score}", row.tuned_score, "", ""),
        ("Difference", _difference(row.base_score, row.tuned_score), "+", "" if state == "none" else f" <small>{state}</small>"),
    ):
        number = _number(value)
        shown = DASH if number is None else f"{number:{sign if number else ''}.{SCORE_DIGITS}f}".replace("-", MINUS)
        cells.append(f'<td class="num score" data-label="{_text(label)}" data-v="{_key(number)}">{shown}{word}</td>')
    cells.append(_text_cell("reference", "Reference", _folded(_text(row.reference))))
    cells.append(_text_cell("base", f"{table.base} reply", _marked(row.reference, row.base)))
    cells.append(_text_cell("tuned", f"{table.tuned} reply", _marked(row.reference, row.tuned)))
    return "".join(cells) + "</tr>"


def _text_cell(kind: str, label: str, inside: str) -> str:
    return f'<td class="{kind}" data-label="{_text(label)}">{inside}</td>'


def _marked(reference: str, reply: str) -> str:
    """A reply with what differs from the reference in <ins> and <del>."""
    marks = word_marks(reference, reply)
    if marks is None:
        return _folded(_text(reply)) + f'<p class="hint">Not marked: more than {MOST_WORDS:,} words.</p>'
    if reference and marks == [("extra", reply)]:
        return _folded(_text(reply)) + '<p class="hint">Differs throughout.</p>'
    tags = {"same": "{}", "extra": "<ins>{}</ins>", "missing": "<del>{}</del>"}
    return _folded("".join(tags[kind].format(_text(text)) for kind, text in marks), empty=not reply)


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
    return f'<caption dir="auto">{_text(text)}</caption>' if text else ""


def _heads(columns: Sequence[tuple[str, bool, bool]]) -> str:
    """The head of a table of columns: each name, whether it is one of numbers, and whether it sorts."""
    return "".join(
        f'<th scope="col"{" class=num" * numeric}{" data-sort" * sortable}>{_text(name)}</th>'
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

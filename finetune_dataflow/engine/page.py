"""A report as one HTML file that needs nothing else: no network, no server, no script but its own two.

Every text is untrusted: it is shown as text, whatever is in it. The page's Content-Security-Policy lets two scripts run,
known by their SHA-256, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files

from finetune_dataflow.engine.page_blocks import facts_html, json_text, section_html, text_html, verdict_html
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
    Tone,
    Value,
)
from finetune_dataflow.engine.word_marks import word_marks

__all__ = [
    "Block", "Cell", "Chart", "Code", "Drawing", "Facts", "Kind", "Page", "Prose", "Row", "RowTable", "Section", "Table", "Tone",
    "Value", "html", "word_marks",
]  # fmt: skip

_CLEAR = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
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
    sections = [section_html(number, section) for number, section in enumerate(page.sections, 1)]
    drawn = any(isinstance(block, Chart) for section in page.sections for block in section.blocks)
    packed, library_hash = _plotly() if drawn else ("", "")
    themes = json_text({"light": light_layout, "dark": dark_layout})
    script = _asset("page.js")
    scripts = " ".join(f"'sha256-{each}'" for each in (_sha256(script), library_hash) if each)
    policy = f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "base-uri 'none'; form-action 'none'"
    index = "".join(
        f'<li><a href="#section-{number}">{text_html(each.title)}</a></li>' for number, each in enumerate(page.sections, 1)
    )
    notes = "".join(f"<li dir=auto>{text_html(each)}</li>" for each in page.notes)
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            f'<link rel="icon" href="data:,">\n<title>{text_html(page.title)}</title>',
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>",
            '<a class="skip" href="#content">Skip to the content</a>',
            f'<header class="top"><p class="title"><bdi>{text_html(page.title)}</bdi></p>',
            '<button type="button" class="theme js-only">Dark</button></header>',
            f'<nav aria-label="Contents"><ol>{index}</ol></nav>' if index else "<nav hidden></nav>",
            '<main id="content">',
            verdict_html(page),
            f'<aside class="notes" aria-label="Warnings"><ul>{notes}</ul></aside>' if notes else "",
            facts_html(page.facts),
            *sections,
            f"<footer dir=auto>{text_html(page.footer)}</footer>" if page.footer else "",
            "</main>",
            f'<script type="application/json" id="themes">{themes}</script>',
            f'<script type="text/plain" id="plotly">{packed}</script>' if packed else "",
            f"<script>{script}</script>\n</body>\n</html>\n",
        )
    )


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

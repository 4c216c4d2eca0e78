"""The look of the figures: colours that hold on white and on dark, a quiet template, and texts that only ever show as text.

Figures have no background of their own, take their font from the page, and keep every colour that depends on a theme in
their template, so that a page switches them by `Plotly.relayout(element, themed_layout(dark))`.
"""

from __future__ import annotations

import html
import json
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from finetune_dataflow.engine.colors import plain_text

# After Okabe and Ito (2008), each made lighter or darker until it stands out from white and from near-black by 3:1 (WCAG 2).
BLUE, VERMILION, GREEN, PURPLE, OCHRE, GREY = "#1f83c4", "#d55e00", "#009e73", "#b5649c", "#a87c00", "#7c838d"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
OCHRE_BAND = "rgba(168,124,0,0.25)"
PALE = "rgba(124,131,141,0.28)"  # an area beside one that matters
HATCHED = {"shape": "/", "size": 7, "solidity": 0.2, "fillmode": "overlay", "fgcolor": "#ffffff", "fgopacity": 0.6}

MOST_POINTS = 2000  # drawn of a curve
LINE_WIDTH = 50  # characters of a heading or a note that a telephone is wide
_LINE_HEIGHT, _TITLE_LINE, _TITLE_HEIGHT = 16, 21, 36  # pixels
_HEADING, _GAP, _AXIS = 24, 12, 34  # pixels: above a panel, between two, between two that have an x axis each

# What to show a figure with: it follows the width of the page, and its buttons stay out of the way.
CONFIG: Mapping[str, object] = {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


_LEGEND = {"x": 0, "xref": "container", "xanchor": "left", "yref": "container", "yanchor": "top", "traceorder": "normal"}
_ON_COLOR = "#0b0e12"  # text on any colour of the palette: 4.5:1 and more


@dataclass(frozen=True)
class _Shades:
    text: str
    quiet: str
    line: str
    grid: str
    label: str
    label_text: str


# For a page whose background is not known: greys that stand out from white and from near-black by more than 4:1.
_EITHER = _Shades("#737b86", "#737b86", "rgba(124,131,141,0.55)", "rgba(124,131,141,0.22)", "#ffffff", "#24292f")
_LIGHT = _Shades("#24292f", "#57606a", "#afb8c1", "#e7eaee", "#ffffff", "#24292f")
_DARK = _Shades("#e6e9ed", "#a4adb8", "#565e69", "#2c323a", "#262c34", "#e6e9ed")


def template(dark: bool | None = None) -> go.layout.Template:
    """The house template on white, on dark, or (None) on a background that is not known. It is nobody's default."""
    shades = {None: _EITHER, False: _LIGHT, True: _DARK}[dark]
    axis = {
        "automargin": True,
        "color": shades.quiet,
        "gridcolor": shades.grid,
        "linecolor": shades.line,
        "showline": False,
        "tickcolor": shades.line,
        "tickfont": {"size": 12},
        "title": {"font": {"size": 12}, "standoff": 8},
        "zeroline": False,
        "zerolinecolor": shades.quiet,
        "zerolinewidth": 1,
    }
    layout = {
        "colorway": list(PALETTE),
        "dragmode": "zoom",
        "font": {"family": "inherit", "size": 13, "color": shades.text},
        "hoverlabel": {
            "align": "left",
            "bgcolor": shades.label,
            "bordercolor": shades.line,
            "font": {"family": "inherit", "size": 12, "color": shades.label_text},
            "namelength": -1,
        },
        "legend": {"bgcolor": "rgba(0,0,0,0)", "font": {"size": 12, "color": shades.text}, "orientation": "h"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": shades.line, "activecolor": shades.text},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {"font": {"size": 16, "color": shades.text}, "subtitle": {"font": {"size": 12, "color": shades.quiet}}},
        "xaxis": axis,
        "yaxis": axis,
        "annotationdefaults": {"font": {"size": 12, "color": shades.quiet}, "showarrow": False},
        "shapedefaults": {"line": {"color": shades.quiet, "width": 1}},
    }
    return go.layout.Template(layout=layout, data={"bar": [{"insidetextfont": {"color": shades.text}}]})


def themed_layout(dark: bool) -> dict[str, Any]:
    """What to give `Plotly.relayout` so that any of the figures suits a light or a dark page."""
    return {"template": template(dark).to_plotly_json()}


def theme(figure: go.Figure, dark: bool | None) -> go.Figure:
    """The figure for a light page, a dark one, or (None) one that may be either. The figure that is given stays as it is."""
    return go.Figure(figure).update_layout(template=template(dark))


def framed(traces: Sequence[Any], title: str, notes: Iterable[str], height: int, **layout: Any) -> go.Figure:
    """A figure with its heading, one note after another beneath it, then the legend, then `height` pixels for the plot."""
    lines, titles = heading_lines(" ".join(notes)), heading_lines(title, 36)
    top = _TITLE_HEIGHT + _TITLE_LINE * (len(titles) - 1) + _LINE_HEIGHT * len(lines)
    names = [trace.name for trace in traces if trace.showlegend is not False]
    legend = 24 + 19 * _legend_rows(names) if names else 8
    bottom = _below(layout.get("xaxis", {}))
    whole = height + top + legend + bottom
    head = {
        "text": "<br>".join(map(figure_text, titles)),
        "subtitle": {"text": "<br>".join(map(figure_text, lines)) + ("<br> " if len(lines) == 1 else "")},
        "x": 0,
        "xref": "container",
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"l": 12, "t": 10},
    }
    return go.Figure(traces).update_layout(
        template=template(),
        title=head,
        height=whole,
        margin={"l": 12, "r": 20, "t": top + legend, "b": bottom},
        showlegend=bool(names),
        legend={**_LEGEND, "y": 1 - top / whole},
        **layout,
    )


def _legend_rows(names: Sequence[str]) -> int:
    """The lines of a legend on a telephone; each entry is as wide as the widest."""
    return math.ceil(len(names) / max(1, 300 // (40 + 6 * max(map(len, names)))))


def _below(x_axis: Mapping[str, Any]) -> int:
    """The pixels that an x axis needs for its figures and its title."""
    if not x_axis.get("visible", True) or not x_axis.get("showticklabels", True):
        return 12
    return 50 if "title" in x_axis else 30


def blank(title: str, note: str) -> go.Figure:
    """A figure of nothing, which says why."""
    figure = framed([], title, [], 120, xaxis={"visible": False}, yaxis={"visible": False})
    lines = "<br>".join(map(figure_text, heading_lines(note)))
    return figure.add_annotation(text=lines, x=0.5, y=0.5, xref="paper", yref="paper")


def heading_lines(text: str, width: int = LINE_WIDTH) -> list[str]:
    """A text in lines that a telephone shows whole."""
    return textwrap.wrap(plain_text(text), width)


def figure_text(text: str) -> str:
    r"""`text` as a figure shows it to the letter: what plotly or MathJax would obey is escaped, controls stand as `\x1b`.

    Plotly reads some HTML in every text; it knows &lt; but not &quot;. Where a page has MathJax, dollars are mathematics;
    in a template, %{…} is a value.
    """
    return html.escape(plain_text(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def excerpt(text: str, limit: int) -> str:
    """The start of `text` as `figure_text`, in lines that a telephone shows whole; at most about `limit` bytes of JSON."""
    words = " ".join(plain_text(text[: 2 * limit]).split())
    kept, size = 0, 0
    for char in words:
        escaped = figure_text(char)
        size += len(json.dumps(escaped)) - 2 + 5 * escaped.count("/")  # which plotly writes as an escape
        if size > limit:
            break
        kept += 1
    cut = words[:kept] + ("…" if kept < len(words) or len(text) > 2 * limit else "")
    width = 22 if any(unicodedata.east_asian_width(char) in "WF" for char in cut) else 44
    return "<br>".join(map(figure_text, textwrap.wrap(cut, width))) or "(empty)"


def short_name(name: str, limit: int = 32) -> str:
    """A name cut in its middle, because names of runs differ at their ends."""
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"


def counted(number: int, noun: str) -> str:
    """A count with its noun: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def rounded(values: ArrayLike, digits: int = 6) -> list[float | int | None]:
    """Numbers for JSON, to so many significant digits; None where one is not finite."""
    return [float(f"{each:.{digits}g}") if math.isfinite(each) else None for each in np.asarray(values, np.float64).tolist()]


def thinned(values: NDArray[np.float64], limit: int = MOST_POINTS) -> NDArray[np.int64]:
    """The places of at most `limit` values that keep a curve's look: the lowest and the highest of every stretch."""
    if len(values) <= limit:
        return np.arange(len(values))
    places = {0, len(values) - 1}
    for stretch in stretches(len(values), max(limit // 2 - 1, 1)):
        places |= {stretch.start + int(values[stretch].argmin()), stretch.start + int(values[stretch].argmax())}
    return np.array(sorted(places), np.int64)


def stretches(length: int, number: int) -> list[slice]:
    """`length` values one after another in `number` stretches of nearly one size."""
    borders = np.linspace(0, length, number + 1).astype(int).tolist()
    return [slice(start, end) for start, end in pairwise(borders)]


def shared_panels(panels: Sequence[tuple[str, int]]) -> tuple[int, dict[str, Any]]:
    """Panels one above another on one x axis: (heading, pixels) of each. The height of all, and y axes, x axis, headings."""
    height, axes, annotations = _stacked(panels, _GAP)
    return height, {**axes, "xaxis": {"anchor": _axis("y", len(panels))}, "annotations": annotations}


def row_panels(panels: Sequence[tuple[str, Sequence[str]]], row_height: int, spans: Sequence[tuple[float, float]]) -> Any:
    """Panels of labelled rows, each with an x axis of its own over one of `spans`: the height, and the layout of the axes."""
    stack = [(heading, row_height * len(labels)) for heading, labels in panels]
    height, layout, annotations = _stacked(stack, _AXIS)
    for number, ((_, labels), (low, high)) in enumerate(zip(panels, spans, strict=True), start=1):
        room = 0.1 * (high - low) or max(0.1 * abs(high), 0.05)
        layout[_axis("yaxis", number)] |= {
            "range": [-0.6, len(labels) - 0.4],
            "tickvals": list(range(len(labels))),
            "ticktext": [wrapped_label(label) for label in reversed(labels)],
            "ticklabelstandoff": 6,
            "showgrid": False,
            "fixedrange": True,
        }
        x_axis = {"anchor": _axis("y", number), "range": rounded([low - room, high + room]), "nticks": 6}
        layout[_axis("xaxis", number)] = x_axis
    return height, {**layout, "annotations": annotations}


def whiskers(
    intervals: Sequence[tuple[float, float, float]], places: Sequence[float], number: int, color: str, symbol: str, sign: str = ""
) -> go.Scatter:
    """Means with their intervals (mean, low, high) at some places of panel `number`, each with its value above."""
    means, lows, highs = (np.array(each) for each in zip(*intervals, strict=True))
    ends = {"array": rounded(highs - means), "arrayminus": rounded(means - lows)}
    return go.Scatter(
        x=rounded(means),
        y=rounded(places),
        xaxis=_axis("x", number),
        yaxis=_axis("y", number),
        mode="markers+text",
        text=[_signed(mean, sign) for mean in means],
        textposition="top center",
        cliponaxis=False,
        marker={"color": color, "symbol": symbol, "size": 11, "line": {"width": 2, "color": color}},
        error_x={**ends, "color": color, "thickness": 2, "width": 0},
        customdata=[[_signed(low, sign), _signed(high, sign)] for low, high in zip(lows, highs, strict=True)],
        hovertemplate="%{text} (%{customdata[0]} to %{customdata[1]})<extra>%{fullData.name}</extra>",
    )


def shared_lines(places: Iterable[float], panels: int, dash: str = "dot") -> list[dict[str, Any]]:
    """Thin vertical lines at some places of the shared x axis, beneath the curves of every panel."""
    line = {"type": "line", "y0": 0, "y1": 1, "layer": "below", "line": {"dash": dash}}
    panel_domains = [f"{_axis('y', number)} domain" for number in range(1, panels + 1)]
    return [{**line, "x0": x, "x1": x, "yref": domain} for x in places for domain in panel_domains]


def share_bars(
    name: str,
    labels: Sequence[str],
    shares: Sequence[float],
    counts: Sequence[str],
    color: str,
    pattern: Mapping[str, Any] | None = None,
) -> go.Bar:
    """One part of some bars that each make up a whole; a share that is large enough has its figure in it."""
    return go.Bar(
        x=rounded(shares),
        y=labels,
        orientation="h",
        name=name,
        marker={"color": color, "line": {"width": 0}, "pattern": pattern},
        text=[f"{share:.1%}" if share >= 0.14 else "" for share in shares],
        textposition="inside",
        insidetextanchor="middle",
        insidetextfont=None if color == PALE else {"color": _ON_COLOR},
        textangle=0,
        customdata=counts,
        hovertemplate="%{x:.1%}, %{customdata}<extra>%{fullData.name}</extra>",
    )


def share_axes(bars: int) -> dict[str, Any]:
    """The layout of some bars of shares."""
    return {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"range": [0, 1], "tickformat": ".0%", "dtick": 0.25, "fixedrange": True, "showgrid": False},
        "yaxis": {
            "type": "category",
            "autorange": "reversed",
            "fixedrange": True,
            "showticklabels": bars > 1,
            "ticklabelstandoff": 6,
        },
    }


def count_bars(name: str, bars: Sequence[tuple[str, int]], first: int, color: str, pattern: Mapping[str, Any] | None) -> go.Bar:
    """Counts as bars downwards from the place `first`, the figure after each."""
    return go.Bar(
        x=[count for _, count in bars],
        y=[first - place for place in range(len(bars))],
        orientation="h",
        name=name,
        marker={"color": color, "line": {"width": 0}, "pattern": pattern},
        width=0.62,
        text=[f"{count:,}" for _, count in bars],
        textposition="outside",
        cliponaxis=False,
        customdata=[figure_text(label) for label, _ in bars],
        hovertemplate="%{customdata}: %{x:,}<extra>%{fullData.name}</extra>",
    )


def wrapped_label(label: str) -> str:
    """A label of a row in lines of at most 18 characters."""
    return "<br>".join(map(figure_text, heading_lines(label, 18)))


def _stacked(panels: Sequence[tuple[str, int]], gap: int) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """The height of a stack of panels, the y axis of each, and the annotations that are their headings."""
    above = [_HEADING if heading else 4 for heading, _ in panels]
    height = sum(above) + sum(pixels for _, pixels in panels) + gap * (len(panels) - 1)
    axes: dict[str, Any] = {}
    annotations, used = [], 0
    for number, ((heading, pixels), room) in enumerate(zip(panels, above, strict=True), start=1):
        top, bottom = (1 - (used + part) / height for part in (room, room + pixels))
        axes[_axis("yaxis", number)] = {"domain": [max(bottom, 0.0), top], "nticks": 6, "anchor": _axis("x", number)}
        place = {"x": 0, "xref": "paper", "xanchor": "left", "y": top, "yref": "paper", "yanchor": "bottom", "yshift": 3}
        annotations.append({"text": figure_text(heading), "align": "left", **place})
        used += room + pixels + gap
    return height, axes, annotations


def _signed(number: float, sign: str) -> str:
    return f"{number:{sign}.3f}".replace("-", "\u2212")


def _axis(name: str, number: int) -> str:
    return name if number == 1 else f"{name}{number}"

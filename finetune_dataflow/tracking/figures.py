"""Our plotly figures as plain SVG, for a page that does not run plotly.

What `engine.figures` draws with is drawn: curves, bands, marks, whiskers, bars, headings, legends, ticks. Positions are exact;
what shows only under a pointer is left out, and with it every text of the data.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_dataflow.tracking.shapes import (
    CHARACTER,
    COLOR,
    GRID,
    LINE,
    QUIET,
    TEXT,
    Point,
    box,
    dashes,
    line,
    lines_of,
    mark,
    path,
    stepped,
    text,
    unbroken,
)

WIDTH = 680
MOST_TICKS = 60


@dataclass(frozen=True)
class _Axis:
    """Where values stand: `low` at the pixel `start`, `high` at `end`. Categories stand at 0, 1, …"""

    low: float
    high: float
    start: float
    end: float
    categories: tuple[str, ...] = ()

    def at(self, value: Any) -> float:
        """The pixel of a value."""
        number = self.categories.index(value) if self.categories else float(value)
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)

    def along(self, share: float) -> float:
        """The pixel at a share of the axis."""
        return self.start + share * (self.end - self.start)


def figure_svg(figure: Any, width: int = WIDTH) -> str:
    """A figure as the text of one `svg` element on white, `width` pixels wide and as high as the figure says."""
    height = int(figure.layout.height or 400)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif"'
    parts = _Drawing(figure, width, height).parts()
    return "".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', box(0, 0, width, height, "#ffffff"), *parts, "</svg>"])


class _Drawing:
    """A figure on its way to SVG."""

    def __init__(self, figure: Any, width: int, height: int) -> None:
        self.layout, self.traces, self.width, self.height = figure.layout, list(figure.data), width, height
        margin = figure.layout.margin
        self.top, self.bottom = float(margin.t or 40), height - float(margin.b or 40)
        self.panels = sorted(
            {(each.xaxis or "x", each.yaxis or "y") for each in self.traces}, key=lambda pair: (len(pair[1]), pair)
        )
        labels = [said for _, y in self.panels for _, said in self._ticks("y", y)]
        longest = max((len(each) for label in labels for each in lines_of(label)), default=0)
        titled = any(self._title("y", y) for _, y in self.panels)
        self.left, self.right = 22 + CHARACTER * longest + (18 if titled else 0), width - 26.0
        self.x = {x: self._axis("x", x, self.left, self.right) for x, _ in self.panels}
        self.y = {y: self._axis("y", y, self.bottom, self.top) for _, y in self.panels}

    def parts(self) -> Iterator[str]:
        """The elements, from the back to the front."""
        yield from self._heading()
        for x, y in self.panels:
            yield from self._grid(x, y)
        for shape in self.layout.shapes or ():
            yield from self._shape(shape)
        stacked: dict[Any, float] = {}
        before = None
        for trace in self.traces:
            x_axis, y_axis = self.x[trace.xaxis or "x"], self.y[trace.yaxis or "y"]
            if trace.type == "bar":
                yield from _bars(trace, x_axis, y_axis, stacked if self.layout.barmode == "stack" else {}, self.layout.bargap)
            elif trace.type == "scatter":
                yield from _scatter(trace, before, x_axis, y_axis)
                before = trace
        for note in self.layout.annotations or ():
            yield from self._annotation(note)
        yield from self._legend()

    def _said(self, letter: str, name: str) -> Any:
        """What the layout says of an axis."""
        return self.layout[f"{letter}axis{name[1:]}"]

    def _title(self, letter: str, name: str) -> str:
        return str(self._said(letter, name).title.text or "")

    def _values(self, letter: str, name: str) -> list[Any]:
        """What stands on an axis; of bars also what they start from."""
        found: list[Any] = []
        for trace in self.traces:
            if (trace[f"{letter}axis"] or letter) == name and trace[letter] is not None:
                found += [each for each in trace[letter] if each is not None]
                if trace.type == "bar" and (trace.orientation == "h") == (letter == "x"):
                    found.append(0.0)
        return found

    def _ends(self, letter: str, name: str) -> tuple[float, float, tuple[str, ...]]:
        """The ends of an axis, and its categories."""
        said, values = self._said(letter, name), self._values(letter, name)
        if said.type == "category":
            categories = tuple(dict.fromkeys(map(str, values)))
            low, high = -0.5, len(categories) - 0.5
            return (high, low, categories) if said.autorange == "reversed" else (low, high, categories)
        if said.range is not None:
            return float(said.range[0]), float(said.range[1]), ()
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        room = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
        return (0.0 if said.rangemode == "tozero" and low >= 0 else low - room), high + room, ()

    def _axis(self, letter: str, name: str, start: float, end: float) -> _Axis:
        low, high, categories = self._ends(letter, name)
        first, last = self._said(letter, name).domain or (0.0, 1.0)
        return _Axis(low, high, start + first * (end - start), start + last * (end - start), categories)

    def _ticks(self, letter: str, name: str) -> list[tuple[Any, str]]:
        """Where the ticks of an axis stand, and what they say."""
        said, (first, last, categories) = self._said(letter, name), self._ends(letter, name)
        if said.visible is False or said.showticklabels is False:
            return []
        if categories:
            return [(each, each) for each in categories]
        if said.tickvals is not None:
            texts = said.ticktext or [_number(each, said.tickformat) for each in said.tickvals]
            return [(float(value), shown) for value, shown in zip(said.tickvals, texts, strict=False)]
        low, high = sorted((first, last))
        step = said.dtick or _step(high - low, said.nticks or 6)
        places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return [(place * step, _number(place * step, said.tickformat)) for place in places[:MOST_TICKS]]

    def _grid(self, x: str, y: str) -> Iterator[str]:
        """A panel's grid, with what stands beside it and, where the x axis belongs to it, below."""
        across, up, x_axis, y_axis = self._said("x", x), self._said("y", y), self.x[x], self.y[y]
        for value, said in self._ticks("y", y):
            place = y_axis.at(value)
            if up.showgrid is not False:
                yield line((self.left, place), (self.right, place), GRID)
            yield from text((self.left - 8, place + 4), lines_of(said), "end", QUIET, centred=True)
        below = (across.anchor or "y") == y
        for value, said in self._ticks("x", x):
            place = x_axis.at(value)
            if across.showgrid is not False:
                yield line((place, y_axis.start), (place, y_axis.end), GRID)
            if below:
                yield from text((place, y_axis.start + 17), lines_of(said), "middle", QUIET)
        if across.zeroline and x_axis.low < 0 < x_axis.high:
            yield line((x_axis.at(0), y_axis.start), (x_axis.at(0), y_axis.end), QUIET)
        if below and self._title("x", x):
            middle = (self.left + self.right) / 2, y_axis.start + 38
            yield from text(middle, lines_of(self._title("x", x)), "middle", QUIET)
        if self._title("y", y):
            turned = "".join(text((0, 0), [" ".join(lines_of(self._title("y", y)))], "middle", QUIET))
            yield f'<g transform="translate(14 {y_axis.along(0.5):.1f}) rotate(-90)">{turned}</g>'

    def _heading(self) -> Iterator[str]:
        title = self.layout.title
        lines = lines_of(title.text or "")
        yield from text((12, 26), lines, size=16, height=21)
        notes = [each for each in lines_of(title.subtitle.text or "") if each.strip()]
        yield from text((12, 26 + 21 * (len(lines) - 1) + 18), notes, color=QUIET)

    def _legend(self) -> Iterator[str]:
        """The names of what is drawn, from left to right in as many lines as they need."""
        if self.layout.showlegend is False:
            return
        x, y = 14.0, (1 - float(1 if self.layout.legend.y is None else self.layout.legend.y)) * self.height + 14
        for trace in (each for each in self.traces if each.name and each.showlegend is not False):
            said, color = " ".join(lines_of(trace.name)), _color(trace)
            if x > 14 and x + 30 + CHARACTER * len(said) > self.width:
                x, y = 14.0, y + 19
            if trace.type == "bar":
                yield box(x, y - 9, 12, 12, color)
            elif "lines" in (trace.mode or ""):
                yield line((x - 2, y - 3), (x + 14, y - 3), color, trace.line.width or 2, trace.line.dash)
            else:
                yield mark(x + 6, y - 3, 10, color, str(trace.marker.symbol or "circle"))
            yield from text((x + 20, y + 1), [said])
            x += 40 + CHARACTER * len(said)

    def _shape(self, shape: Any) -> Iterator[str]:
        """A straight line between two points, or across panels."""
        ends = []
        for letter, axes in (("x", self.x), ("y", self.y)):
            name, _, domain = str(shape[f"{letter}ref"] or letter).partition(" ")
            if shape.type != "line" or name not in axes:
                return
            ends.append([(axes[name].along if domain else axes[name].at)(shape[f"{letter}{end}"]) for end in "01"])
        (x0, x1), (y0, y1) = ends
        yield line((x0, y0), (x1, y1), shape.line.color or QUIET, shape.line.width or 1, shape.line.dash)

    def _annotation(self, note: Any) -> Iterator[str]:
        """A text at a place of the whole plot, which is how panels are headed."""
        lines = lines_of(note.text or "")
        x = 12.0 if note.xanchor == "left" else self.left + float(note.x or 0) * (self.right - self.left)
        y = self.bottom + float(note.y or 0) * (self.top - self.bottom) - float(note.yshift or 0) - 2
        anchor = "start" if note.xanchor == "left" else "middle"
        yield from text((x, y - LINE * (len(lines) - 1)), lines, anchor, QUIET)


def _scatter(trace: Any, before: Any, x: _Axis, y: _Axis) -> Iterator[str]:
    """A curve, a band down to the curve before it, marks with their whiskers and texts."""
    color, mode, places = _color(trace), trace.mode or "lines", _places(trace, x, y)
    if trace.fill == "tonexty" and before is not None:
        around = [*filter(None, places), *filter(None, _places(before, x, y)[::-1])]
        yield f'<path d="{path(around)}z" fill="{html.escape(str(trace.fillcolor or GRID))}"/>'
    if "lines" in mode and trace.line.width != 0:
        drawn = " ".join(path(stepped(part, trace.line.shape)) for part in unbroken(places))
        look = f'stroke="{html.escape(color)}" stroke-width="{trace.line.width or 2}"{dashes(trace.line.dash)}'
        yield f'<path d="{drawn}" fill="none" {look}/>'
    if trace.error_x.array is not None:
        ends = zip(trace.x, trace.error_x.arrayminus, trace.error_x.array, places, strict=True)
        for value, less, more, point in ends:
            if point is not None and less is not None and more is not None:
                yield line((x.at(value - less), point[1]), (x.at(value + more), point[1]), color, trace.error_x.thickness or 2)
    for point, size, said in zip(
        places, _each(trace.marker.size, len(places), 6), _each(trace.text, len(places), ""), strict=True
    ):
        if point is not None and "markers" in mode:
            yield mark(*point, float(size or 6), color, str(trace.marker.symbol or "circle"))
        if point is not None and "text" in mode:
            yield from text((point[0], point[1] - 9), [" ".join(lines_of(said))], "middle")


def _places(trace: Any, x: _Axis, y: _Axis) -> list[Point | None]:
    """Where the points of a curve stand; None for a gap."""
    return [None if None in (a, b) else (x.at(a), y.at(b)) for a, b in zip(trace.x, trace.y, strict=True)]


def _bars(trace: Any, x: _Axis, y: _Axis, stacked: dict[Any, float], gap: float | None) -> Iterator[str]:
    """Bars to the right or upwards, each with its text in it or behind it; `stacked`: where the next one at a place starts."""
    lying = trace.orientation == "h"
    along, across = (x, y) if lying else (y, x)
    lengths, places = (trace.x, trace.y) if lying else (trace.y, trace.x)
    widths, texts = _each(trace.width, len(places), 1 - (0.2 if gap is None else gap)), _each(trace.text, len(places), "")
    for place, length, wide, said in zip(places, lengths, widths, texts, strict=True):
        if None in (place, length):
            continue
        start = stacked.get(place, 0.0)
        stacked[place] = start + length
        low, high = sorted((along.at(start), along.at(start + length)))
        thick = abs((across.end - across.start) / (across.high - across.low)) * float(wide)
        side = across.at(place) - thick / 2
        yield box(low, side, high - low, thick, _color(trace)) if lying else box(side, low, thick, high - low, _color(trace))
        if said and lying:
            inside = trace.textposition == "inside"
            where = ((low + high) / 2 if inside else high + 5, across.at(place) + 4)
            yield from text(where, [" ".join(lines_of(said))], "middle" if inside else "start", TEXT)


def _color(trace: Any) -> str:
    """The colour of a trace, as it says, or the first of the palette."""
    return str(trace.marker.color or (trace.line.color if trace.type == "scatter" else None) or COLOR)


def _each(value: Any, count: int, default: Any) -> list[Any]:
    """One value a place, whether one is given for all, for each, or none."""
    if value is None or isinstance(value, str | int | float):
        return [default if value is None else value] * count
    return list(value)


def _step(span: float, most: int) -> float:
    """The least of 1, 2 or 5 times a power of ten that divides a span into at most so many parts."""
    raw = span / most or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _number(value: float, form: str | None) -> str:
    """A tick as its axis wants it."""
    said = format(round(value) if form.endswith("d") else value, form) if form else f"{value:.6g}"
    return said.replace("-", "\u2212")

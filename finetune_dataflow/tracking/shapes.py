"""The elements that pictures are made of, as SVG text. Every text is escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

TEXT, QUIET, GRID, COLOR = "#24292f", "#57606a", "#e7eaee", "#1f83c4"
CHARACTER = 7.2  # pixels of one of 12 px, rather too many
LINE = 16  # pixels
DASHES = {"dot": "1.5 3", "dash": "7 5", "dashdot": "7 3 1.5 3"}

Point = tuple[float, float]


def line(start: Point, end: Point, color: str, width: float = 1, dash: str | None = None) -> str:
    """A straight line."""
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="{html.escape(color)}" stroke-width="{width}"{dashes(dash)}/>'


def dashes(dash: str | None) -> str:
    """The attribute that breaks a line up, after a space; nothing for a whole one."""
    return f' stroke-dasharray="{DASHES[dash]}"' if dash in DASHES else ""


def box(x: float, y: float, width: float, height: float, color: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{html.escape(color)}"/>'


def mark(x: float, y: float, size: float, color: str, symbol: str) -> str:
    """A mark of one of plotly's shapes, about `size` pixels wide; a circle where the shape is not known."""
    half, hollow, paint = size / 2, symbol.endswith("-open"), html.escape(color)
    look = f'fill="{"#ffffff" if hollow else paint}" stroke="{paint}" stroke-width="{2 if hollow else 0}"'
    kind = symbol.removesuffix("-open")
    if kind in ("square", "diamond"):
        turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind == "diamond" else ""
        side = 0.8 * size if turn else size
        return f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}" {look}{turn}/>'
    if kind in ("triangle-up", "triangle-down"):
        up = 1 if kind == "triangle-up" else -1
        return f'<path d="M{x:.1f} {y - up * half:.1f}l{half:.1f} {up * size:.1f}h{-size:.1f}z" {look}/>'
    if kind == "star":
        corners = ((half * (1 if n % 2 == 0 else 0.4), math.radians(36 * n - 90)) for n in range(10))
        outline = path((x + far * math.cos(angle), y + far * math.sin(angle)) for far, angle in corners)
        return f'<path d="{outline}z" {look}/>'
    if kind in ("cross", "x"):
        arms = (0, 90) if kind == "cross" else (45, 135)
        turned = "".join(f'<path d="M{-half:.1f} 0h{size:.1f}" transform="rotate({angle})"/>' for angle in arms)
        return f'<g transform="translate({x:.1f} {y:.1f})" stroke="{paint}" stroke-width="2.5">{turned}</g>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{half:.1f}" {look}/>'


def text(
    start: Point,
    lines: Sequence[str],
    anchor: str = "start",
    color: str = TEXT,
    *,
    size: int = 12,
    height: int = LINE,
    centred: bool = False,
) -> Iterator[str]:
    """Lines one below another, the first at `start`, or with `centred` all of them around it."""
    x, y = start[0], start[1] - (height * (len(lines) - 1) / 2 if centred else 0)
    look = f'text-anchor="{anchor}" fill="{color}" font-size="{size}"'
    for place, each in enumerate(lines):
        if each:
            yield f'<text x="{x:.1f}" y="{y + height * place:.1f}" {look}>{html.escape(each)}</text>'


def lines_of(given: object) -> list[str]:
    """A text of a figure's, which is HTML of a kind, as the plain lines that it shows."""
    return [html.unescape(each) for each in re.split(r"<br ?/?>", str(given))]


def path(points: Iterable[Point]) -> str:
    """Points with straight lines between them, as an SVG path has it."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def unbroken(places: Sequence[Point | None]) -> Iterator[list[Point]]:
    """The stretches of a curve without a gap."""
    part: list[Point] = []
    for each in [*places, None]:
        if each is not None:
            part.append(each)
        elif part:
            yield part
            part = []


def stepped(points: Sequence[Point], shape: str | None) -> list[Point]:
    """The points, with the corners of a curve in steps: first across ("hv"), or first up ("vh")."""
    if shape not in ("hv", "vh"):
        return list(points)
    found = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        found += [(x1, y0) if shape == "hv" else (x0, y1), (x1, y1)]
    return found

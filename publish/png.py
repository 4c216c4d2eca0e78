"""A drawing of Graphviz's as PNG, painted by Pillow.

Graphviz compiled to WebAssembly writes no PNG (its build has neither Cairo nor GD), and a browser, which could, is no part of
a fixed environment. An SVG of Graphviz's is polygons, Bezier curves, ellipses and lines of text, no more; Pillow draws these,
with a font that it brings along, so that the picture does not depend on what fonts a machine has.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from PIL import ImageDraw

Point = tuple[float, float]

SAMPLES = 3  # drawn so many times as large, then made smaller: smooth edges
COLORS = 64
CURVE_STEPS = 10
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # Pillow's: left, middle, right of the baseline
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def png(svg: str) -> bytes:
    """The picture, a point of the drawing a pixel. Raises UserError where Pillow is missing, ValueError for other SVGs."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise UserError("Pillow, which paints the picture of the graph, is not installed. Run make env.") from error
    root = ElementTree.fromstring(svg)
    width, height = (round(float(each)) for each in root.attrib["viewBox"].split()[2:])
    image = Image.new("RGB", (width * SAMPLES, height * SAMPLES), "white")
    graph = next(each for each in root if _kind(each) == "g")
    painter = _Painter(ImageDraw.Draw(image), _shift(graph.attrib["transform"]))
    for element in graph.iter():
        painter.draw(element)
    written = io.BytesIO()
    image.reduce(SAMPLES).quantize(COLORS).save(written, "PNG", optimize=True)
    return written.getvalue()


class _Painter:
    """Draws the elements of one SVG."""

    def __init__(self, canvas: ImageDraw.ImageDraw, shift: Point) -> None:
        self.canvas, self.shift = canvas, shift

    def draw(self, element: ElementTree.Element) -> None:
        kind = _kind(element)
        if kind in ("polygon", "polyline"):
            points = _points(element.attrib["points"])
            self._shape(element, points)
        elif kind == "path":
            self._shape(element, _curve(element.attrib["d"]))
        elif kind == "ellipse":
            self._shape(element, _ellipse(*(float(element.attrib[each]) for each in ("cx", "cy", "rx", "ry"))))
        elif kind == "text":
            self._text(element)
        elif kind not in ("g", "a", "title"):
            raise ValueError(f"an SVG of Graphviz's has no <{kind}>")

    def _shape(self, element: ElementTree.Element, points: Sequence[Point]) -> None:
        placed = [self._placed(each) for each in points]
        if (fill := element.get("fill", "none")) not in ("none", "transparent"):
            self.canvas.polygon(placed, fill=fill)
        if (stroke := element.get("stroke", "none")) in ("none", "transparent"):
            return
        width = max(1, round(float(element.get("stroke-width", "1")) * SAMPLES))
        dashes = [float(each) * SAMPLES for each in _NUMBER.findall(element.get("stroke-dasharray", ""))]
        for line in _dashed(placed, dashes) if dashes else [placed]:
            self.canvas.line(line, fill=stroke, width=width, joint="curve")

    def _text(self, element: ElementTree.Element) -> None:
        from PIL import ImageFont

        x, y, size = (float(element.attrib[each]) for each in ("x", "y", "font-size"))
        font = ImageFont.load_default(size * SAMPLES)
        anchor = _ANCHORS[element.get("text-anchor", "start")]
        self.canvas.text(self._placed((x, y)), element.text or "", fill=element.get("fill", "black"), font=font, anchor=anchor)

    def _placed(self, point: Point) -> Point:
        return (point[0] + self.shift[0]) * SAMPLES, (point[1] + self.shift[1]) * SAMPLES


def _kind(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _shift(transform: str) -> Point:
    found = re.fullmatch(r"scale\(1 1\) rotate\(0\) translate\((\S+) (\S+)\)", transform)
    if found is None:
        raise ValueError(f"a graph is moved, not {transform!r}")
    return float(found[1]), float(found[2])


def _points(text: str) -> list[Point]:
    numbers = [float(each) for each in _NUMBER.findall(text)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _curve(path: str) -> list[Point]:
    """The points of "M p C p p p p p p ...": a start, then cubic Bezier curves of three points each."""
    if re.sub(r"[-\d., ]", "", path) not in ("MC", "MCZ", "MCz"):
        raise ValueError(f"a curve is one start and cubic pieces, not {path!r}")
    start, *others = _points(path)
    drawn = [start]
    for first, second, end in zip(others[::3], others[1::3], others[2::3], strict=True):
        corners = (drawn[-1], first, second, end)
        drawn += [_bezier(corners, step / CURVE_STEPS) for step in range(1, CURVE_STEPS + 1)]
    return drawn


def _bezier(corners: Sequence[Point], share: float) -> Point:
    weights = [math.comb(3, n) * share**n * (1 - share) ** (3 - n) for n in range(4)]
    x, y = (sum(weight * corner[axis] for weight, corner in zip(weights, corners, strict=True)) for axis in (0, 1))
    return x, y


def _ellipse(x: float, y: float, wide: float, high: float) -> list[Point]:
    turns = [2 * math.pi * step / (8 * CURVE_STEPS) for step in range(8 * CURVE_STEPS + 1)]
    return [(x + wide * math.cos(turn), y + high * math.sin(turn)) for turn in turns]


def _dashed(points: Sequence[Point], dashes: Sequence[float]) -> list[list[Point]]:
    """The pieces of a line that are drawn: a dash, a gap, in turn."""
    pieces: list[list[Point]] = [[points[0]]]
    drawn, left = True, dashes[0]
    for start, end in pairwise(points):
        length, gone = math.dist(start, end), 0.0
        while length - gone > left:
            gone += left
            here = (start[0] + (end[0] - start[0]) * gone / length, start[1] + (end[1] - start[1]) * gone / length)
            if drawn:
                pieces[-1].append(here)
            else:
                pieces.append([here])
            drawn = not drawn
            left = dashes[0] if drawn else dashes[-1]
        left -= length - gone
        if drawn:
            pieces[-1].append(end)
    return [each for each in pieces if len(each) > 1]

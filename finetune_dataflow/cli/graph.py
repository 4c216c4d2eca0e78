"""`run.py graph`: the dataflow as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from finetune_dataflow import engine
from finetune_dataflow.cli.options import build_driver
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import STARTS


def dot_source(start: str, modules: Sequence[ModuleType] = ()) -> str:
    """The graph that `start` names in Graphviz's DOT language, the same on every call."""
    from finetune_dataflow.report import graph_source

    return graph_source(build_driver(start, modules))


def draw(arguments: Sequence[str]) -> int:
    """Write the SVG of one graph: `--start base|presaved --out FILE`."""
    words = dict(zip(arguments[::2], arguments[1::2], strict=False))
    start, out = words.pop("--start", "base"), words.pop("--out", None)
    if words or len(arguments) % 2 or out is None or start not in STARTS:
        raise UserError("Expected: graph --start base|presaved --out FILE.svg")
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out {out!r} is a directory. Expected the name of an SVG file.")
    engine.files.make_output_directory(path.parent)
    engine.files.write_text(path, engine.drawing.svg(dot_source(start)))
    print(f"Wrote {path}.")
    return 0

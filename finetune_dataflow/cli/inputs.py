"""`run.py inputs`: every input of the two graphs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from finetune_dataflow.cli.options import REQUIRED, Input, build_driver, graph_inputs, type_name
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import STARTS


def all_inputs() -> dict[str, tuple[Input, tuple[str, ...]]]:
    """Every input of either graph, by name, with the starts that have it."""
    by_start = {start: graph_inputs(build_driver(start)) for start in STARTS}
    names = sorted({name for inputs in by_start.values() for name in inputs})
    found = {}
    for name in names:
        having = tuple(start for start in STARTS if name in by_start[start])
        found[name] = (by_start[having[0]][name], having)
    return found


def print_inputs(arguments: Sequence[str]) -> int:
    """Print every input: name, type, default, meaning; with `--markdown` as a table for the documentation."""
    if [*arguments] == ["--markdown"]:
        print(markdown(), end="")
        return 0
    if arguments:
        raise UserError(f"inputs takes no options but --markdown, found {arguments[0]!r}.")
    for each, starts in all_inputs().values():
        default = "required" if each.default is REQUIRED else f"default {each.default!r}"
        only = "" if len(starts) == len(STARTS) else f", start={starts[0]} only"
        print(f"{each.name}  ({type_name(each.type)}, {default}{only})")
        print(textwrap.fill(each.meaning, 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def markdown() -> str:
    """The inputs as a Markdown page."""
    lines = [
        "# Inputs",
        "",
        "Read from the graph by `python run.py inputs --markdown`. Each is a key of `inputs=` in `dr.execute`, a flag of the",
        "command line (`batch_size` is `--batch-size`) and a key of a YAML file for `-c`.",
        "",
        "| input | type | default | start | meaning |",
        "|---|---|---|---|---|",
    ]
    for each, starts in all_inputs().values():
        default = "required" if each.default is REQUIRED else f"`{each.default!r}`"
        lines.append(f"| `{each.name}` | {type_name(each.type)} | {default} | {' '.join(starts)} | {each.meaning} |")
    return "\n".join(lines) + "\n"

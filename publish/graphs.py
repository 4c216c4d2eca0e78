"""Two graphs compared, node for node. It imports nothing of this folder, so that any environment can run it."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

from hamilton import driver

import finetune_dataflow

STARTS = ("base", "presaved")


def graph(module: ModuleType, start: str) -> dict[str, dict[str, Any]]:
    """Every node and input of the graph that a module makes under a config, by name, with all that Hamilton knows of it.

    kind, type, tags (but for Hamilton's own, the module), documentation, what it depends on (with types, and whether it must be
    there), defaults of what it may do without, and the function it comes from as it is written, with its config variant.
    """
    dr = driver.Builder().with_config({"start": start}).with_modules(module).build()
    facts: dict[str, dict[str, Any]] = {}
    for each in dr.list_available_variables():
        node = dr.graph.nodes[each.name]
        facts[each.name] = {
            "kind": "input" if each.is_external_input else "node",
            "type": _type_name(each.type, module),
            "tags": {name: value for name, value in each.tags.items() if name != "module"},
            "documentation": each.documentation,
            "required": sorted(each.required_dependencies),
            "optional": sorted(each.optional_dependencies),
            "defaults": {name: repr(value) for name, value in sorted(each.optional_dependencies_default_values.items())},
            "takes": {name: _type_name(kind, module) for name, (kind, _) in sorted(node.input_types.items())},
            "functions": [function.__code__.co_name for function in each.originating_functions or ()],
        }
    return facts


def differences(module: ModuleType, start: str) -> list[str]:
    """Where a module's graph is not the package's under a config, a line each; none where they are equal."""
    ours, theirs = graph(finetune_dataflow, start), graph(module, start)
    lines = [f"{start}: {name} is in the package alone" for name in sorted(ours.keys() - theirs.keys())]
    lines += [f"{start}: {name} is in the module alone" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        for fact, value in ours[name].items():
            if theirs[name][fact] != value:
                lines.append(f"{start}: the {fact} of {name} is {theirs[name][fact]!r}, in the package {value!r}")
    return lines


def _type_name(kind: Any, module: ModuleType) -> str:
    """A type as text; a class that is defined beside the nodes goes by its bare name, wherever the nodes stand."""
    stages = "|".join(finetune_dataflow.NODES)
    return re.sub(rf"\b(finetune_dataflow\.({stages})|{re.escape(module.__name__)})\.(?=[A-Z])", "", repr(kind))

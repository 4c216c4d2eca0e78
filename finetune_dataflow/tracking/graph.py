"""A graph as the Hamilton UI keeps it: nodes, the functions behind them, and the files that these stand in."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hamilton.graph_types import HamiltonGraph, HamiltonNode

from finetune_dataflow import __version__
from finetune_dataflow.tracking.values import PACKAGE, shown_inputs

GRAPH = "finetune_dataflow"  # the name that the graph's versions have in the UI
VERSION = {"git_hash": __version__, "git_repo": "Error: not recorded", "git_branch": "", "committed": False}

Function = Callable[..., Any]


def template(graph: HamiltonGraph, config: Mapping[str, Any]) -> dict[str, Any]:
    """The graph and its code, as the server takes them. The same graph with the same code has the same hashes."""
    functions = {_name(each): inspect.unwrap(each) for node in graph.nodes for each in node.originating_functions or ()}
    sources = {each.__module__: _source(each) for each in functions.values()}
    nodes = _nodes(graph)
    return {
        "name": GRAPH,
        "template_type": "HAMILTON",
        "config": shown_inputs(config),
        "tags": {},
        "nodes": nodes,
        "code_artifacts": [_artifact(name, function) for name, function in functions.items()],
        "code_log": {"files": [{"path": _file(module), "contents": text} for module, text in sources.items()]},
        "dag_hash": digest(nodes),
        "code_hash": digest(sources),
        "code_version_info_type": "git",  # the one kind that the UI knows; what begins with "Error:" is no link
        "code_version_info": VERSION,
        "code_version_info_schema": 1,
    }


def is_ours(functions: Collection[Function] | None) -> bool:
    """Whether a node's code is this package's."""
    return bool(functions) and all(each.__module__.partition(".")[0] == PACKAGE for each in functions or ())


def dependencies(node: HamiltonNode) -> list[str]:
    """The names of the nodes and inputs that a node takes."""
    return sorted({*node.required_dependencies, *node.optional_dependencies})


def digest(value: object) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _nodes(graph: HamiltonGraph) -> list[dict[str, Any]]:
    kinds = {each.name: {"type_name": str(each.type)} for each in graph.nodes}
    return [
        {
            "name": node.name,
            "output": kinds[node.name],
            "output_type": "python_type",
            "output_schema_version": 1,
            "documentation": node.documentation,
            "tags": node.tags,
            "classifications": ["input" if node.is_external_input else "transform"],
            "code_artifact_pointers": [_name(each) for each in node.originating_functions or ()],
            "dependencies": dependencies(node),
            "dependency_specs": [kinds.get(each, {"type_name": ""}) for each in dependencies(node)],
            "dependency_specs_type": "python_type",
            "dependency_specs_schema_version": 1,
        }
        for node in sorted(graph.nodes, key=lambda each: str(each.name))
    ]


def _name(function: Function) -> str:
    return f"{function.__module__}.{inspect.unwrap(function).__qualname__}"


def _file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _source(function: Function) -> str:
    """The text of the module that a function stands in; nothing where that is no file."""
    module = inspect.getmodule(function)
    try:
        return inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        return ""


def _artifact(name: str, function: Function) -> dict[str, Any]:
    """A function as a part of its file: its first line, counted from 0, and the one after its last."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        lines, first = [], 1
    place = {"start": first - 1, "end": first - 1 + len(lines)}
    return {"name": name, "type": "p_function", "path": _file(function.__module__), "url": "", **place}

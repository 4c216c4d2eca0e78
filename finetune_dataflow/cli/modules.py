"""A user's own nodes: modules named by `--module`, and functions named in a YAML's `replace`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hamilton import ad_hoc_utils

from finetune_dataflow.errors import UserError, nearest


def own_modules(files: Sequence[str], replacements: Mapping[str, Any] | None, allow_code: bool) -> tuple[ModuleType, ...]:
    """The modules whose nodes are added to the graph, or take the place of its nodes.

    A file named on the command line is the user's own word. `replace` in a YAML names code that came with the YAML, and is
    refused unless `allow_code`.
    """
    modules = [_module(Path(file)) for file in files]
    if replacements:
        if not allow_code:
            named = ", ".join(sorted(map(str, replacements)))
            raise UserError(f"The configuration replaces nodes by code of its own ({named}). Allow that with --allow-code.")
        modules.append(ad_hoc_utils.create_temporary_module(*(_replacement(*each) for each in replacements.items())))
    return tuple(modules)


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"--module {str(path)!r}: there is no such file. Expected a Python file whose functions are nodes.")
    name = f"finetune_dataflow_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--module {str(path)!r} is no Python file. Expected one whose functions are nodes.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Hamilton looks a function's module up by its name
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"--module {str(path)!r} cannot be loaded: {error}") from error
    return module


def _replacement(node: str, wanted: Any) -> Callable[..., Any]:
    """The function that `replace` names for a node, with the arguments it fixes taken out of its parameters."""
    if not isinstance(wanted, dict) or not isinstance(wanted.get("method"), str) or not {*wanted} <= {"method", "kwargs"}:
        raise UserError(f"replace.{node}: expected {{method: path.to.module::function, kwargs: {{...}}}}, found {wanted!r}.")
    where, separator, name = wanted["method"].partition("::")
    try:
        target = getattr(importlib.import_module(where), name) if separator else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"replace.{node}: {wanted['method']!r} cannot be had: {error}.") from error
    if not callable(target):
        raise UserError(f"replace.{node}: {wanted['method']!r} is no function. Expected path.to.module::function.")
    fixed = wanted.get("kwargs") or {}
    signature = inspect.signature(target)
    for argument in fixed:
        if argument not in signature.parameters:
            raise UserError(f"replace.{node}: {name} has no parameter {argument!r}.{nearest(argument, signature.parameters)}")

    @functools.wraps(target)
    def replaced(**given: Any) -> Any:
        return target(**fixed, **given)

    left = [each for each in signature.parameters.values() if each.name not in fixed]
    hints = typing.get_type_hints(target)
    replaced.__name__ = replaced.__qualname__ = node
    replaced.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]  # inspect reads it
    replaced.__annotations__ = {each: hints[each] for each in (*(one.name for one in left), "return") if each in hints}
    del replaced.__wrapped__  # or its annotations would be read instead
    return replaced

"""From words on a command line and lines in a YAML file to the graph's inputs, checked and with their types."""

from __future__ import annotations

import datetime
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from hamilton import driver

import finetune_dataflow
from finetune_dataflow.cli.modules import own_modules
from finetune_dataflow.errors import UserError, nearest
from finetune_dataflow.start import STARTS

ALIASES = {
    "adapter": "adapter_path",
    "data": "data_path",
    "lora_parameters.dropout": "lora_dropout",
    "lora_parameters.rank": "lora_rank",
    "lora_parameters.scale": "lora_scale",
    "model": "model_id",
    "out": "output_dir",
    "seed": "random_state",
}
GONE = {"model_id_tokenizer": "Name the model in model_id: its directory holds its tokenizer."}
REQUIRED = inspect.Parameter.empty
EXAMPLE = "example-support-dataset.json"
EXAMPLE_INPUTS = {"input_text_key": "question", "output_text_key": "reply"}


@dataclass(frozen=True)
class Input:
    """One input of the graph, as the node that owns it declares it."""

    name: str
    type: Any
    default: Any
    meaning: str
    node: str


@dataclass(frozen=True)
class Options:
    """A command line, read: the graph's inputs with their types, and which of the two graphs is meant."""

    start: str
    inputs: dict[str, Any]
    modules: tuple[ModuleType, ...] = ()


def build_driver(start: str, modules: Sequence[ModuleType] = ()) -> driver.Driver:
    """The driver of the graph that `start` names, with a user's own modules over ours."""
    builder = driver.Builder().with_config({"start": start}).with_modules(finetune_dataflow, *modules)
    return (builder.allow_module_overrides() if modules else builder).build()


def graph_inputs(dr: driver.Driver) -> dict[str, Input]:
    """Every input of a graph, by name, read from the graph: type and default of the owning node, meaning of its docstring."""
    inputs = {}
    for node in dr.graph.nodes.values():
        if not node.user_defined or node.name == "start":
            continue
        owner = node.depended_on_by[0]
        function = owner.originating_functions[0]
        parameter = inspect.signature(function).parameters[node.name]
        inputs[node.name] = Input(node.name, node.type, parameter.default, _meaning(function, node.name), owner.name)
    return dict(sorted(inputs.items()))


def parse(arguments: Sequence[str], start: str | None = None) -> Options:
    """The options of `train` and `evaluate`. Raises one UserError that names every problem found.

    `start` is what the command itself means; then no option may say otherwise.
    """
    files, allow_code, arguments = _code_options(arguments)
    given, named_start, config = _words(arguments)
    from_file = _yaml_values(Path(config)) if config else {}
    modules = own_modules(files, from_file.pop("replace", None), allow_code)
    named_start = named_start or from_file.get("start")
    from_file.pop("start", None)
    if start is not None and named_start not in (None, start):
        raise UserError(f"This command means --start {start}; found {named_start!r}.")
    start = start or named_start or "base"
    if start not in STARTS:
        raise UserError(f"--start {start!r} is unknown.{nearest(str(start), STARTS)} Expected base or presaved.")
    known = graph_inputs(build_driver(start, modules))
    problems: list[str] = []
    inputs: dict[str, Any] = {}
    # The file first: options on the command line win.
    for origin, values in ((config, from_file), ("command line", given)):
        named: dict[str, Any] = {}
        for spelling, value in values.items():
            name = ALIASES.get(spelling, spelling)
            if name in named:
                problems.append(f"{name} is given twice ({origin}).")
            elif (problem := _unknown(name, spelling, known, start)) is not None:
                problems.append(problem)
            else:
                try:
                    named[name] = coerced(known[name], value)
                except UserError as error:
                    problems.append(str(error))
        inputs |= named
    if not problems and "data_path" not in inputs:
        inputs = _with_example(inputs)
    missing = [each.name for each in known.values() if each.default is REQUIRED and each.name not in inputs]
    if missing and not problems:
        problems.append(
            "Missing: " + "; ".join(f"--{name.replace('_', '-')} ({known[name].meaning.rstrip('.')})" for name in missing) + "."
        )
    if problems:
        raise UserError("\n".join(problems))
    return Options(start, inputs, modules)


def _code_options(arguments: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """The files of `--module`, whether `--allow-code` is given, and all other words."""
    files, others, words = [], [], list(arguments)
    allow_code = "--allow-code" in words
    while words:
        word = words.pop(0)
        if word == "--module":
            if not words:
                raise UserError("--module needs a value.")
            files.append(words.pop(0))
        elif word != "--allow-code":
            others.append(word)
    return files, allow_code, others


def coerced(owner: Input, value: Any) -> Any:
    """`value` as the type of the input, from a word or from YAML; UserError naming option, found and expected."""
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[owner.type]
    try:
        if owner.type is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, bool) or value is None or isinstance(value, list | dict | datetime.date):
            raise ValueError
        if owner.type is int and isinstance(value, float):
            raise ValueError
        return owner.type(value)
    except (ValueError, KeyError) as error:
        raise UserError(f"{owner.name}={value!r}: expected {expected}.") from error


def _words(arguments: Sequence[str]) -> tuple[dict[str, str], str | None, str | None]:
    """The inputs named on the command line as they stand there, the start, and the YAML file."""
    given: dict[str, str] = {}
    start, config = None, None
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            raise UserError(f"{word!r} was not expected. Options are written --name value.")
        name, separator, value = word.partition("=")
        if not separator:
            if not words:
                raise UserError(f"{word} needs a value.")
            value = words.pop(0)
        if name == "--set":
            name, separator, value = value.partition("=")
            if not separator:
                raise UserError(f"--set {name!r}: expected name=value.")
            name = f"--{name}"
        name = re.sub(r"^-+", "", name).replace("-", "_")
        if (name == "start" and start is not None) or (name in {"c", "config"} and config is not None):
            raise UserError(f"{word} is given twice.")
        if name == "start":
            start = value
        elif name in {"c", "config"}:
            config = value
        elif ALIASES.get(name, name) in {ALIASES.get(each, each) for each in given}:
            raise UserError(f"--{name.replace('_', '-')} is given twice.")
        else:
            given[name] = value
    return given, start, config


def _yaml_values(path: Path) -> dict[str, Any]:
    """The inputs in a YAML file; `lora_parameters: {rank: 8}` reads as lora_parameters.rank."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected names with values, found {type(values).__name__}.")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "replace":
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[str(name)] = value
    return flat


def _unknown(name: str, spelling: str, known: Mapping[str, Input], start: str) -> str | None:
    if name in known:
        return None
    if name in GONE:
        return f"{name} is no input any more. {GONE[name]}"
    if name == "adapter_path":
        return (
            'adapter_path is no input under start="base", which makes an adapter in <output_dir>/adapters. '
            "To evaluate an adapter, use --start presaved; to choose where a fit is written, use --out."
        )
    if name in graph_inputs(build_driver("base" if start == "presaved" else "presaved")):
        return f'{name} is no input under start="{start}".'
    return f"Unknown option {spelling!r}.{nearest(spelling, [*known, *ALIASES])} `run.py inputs` lists all."


def _with_example(inputs: dict[str, Any]) -> dict[str, Any]:
    """The example's file and keys, where no data is named; only the command line has this default."""
    example = Path(EXAMPLE)
    if not example.is_file():
        example = Path(finetune_dataflow.__file__).parent.parent / EXAMPLE
    if not example.is_file() or {"input_text_key", "output_text_key", "row_shape"} & {*inputs}:
        return inputs
    return {"data_path": str(example), **EXAMPLE_INPUTS, **inputs}


def _meaning(function: types.FunctionType | typing.Callable[..., Any], name: str) -> str:
    """What the docstring of a node says of one of its inputs, in its section "Inputs:"."""
    section = inspect.getdoc(function).partition("Inputs:\n")[2]  # type: ignore[union-attr]  # every node has one: tested
    found = re.search(rf"^    {name}: (.*(?:\n        .*)*)", section, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""

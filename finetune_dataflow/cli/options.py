"""From words on a command line and keys in YAML files to the graph's inputs, checked and with their types."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hamilton import driver

import finetune_dataflow
from finetune_dataflow.cli import yaml_config
from finetune_dataflow.cli.modules import own_modules
from finetune_dataflow.engine.fit_settings import LoopSettings
from finetune_dataflow.errors import UserError, nearest
from finetune_dataflow.start import STARTS

logger = logging.getLogger(__name__)

ALIASES = {
    "adapter": "adapter_path",
    "completion_feature": "output_text_key",
    "data": "data_path",
    "lora_layers": "num_layers",
    "lora_parameters.dropout": "lora_dropout",
    "lora_parameters.keys": "lora_keys",
    "lora_parameters.rank": "lora_rank",
    "lora_parameters.scale": "lora_scale",
    "model": "model_id",
    "num_tokens": "max_tokens",
    "out": "output_dir",
    "prompt_feature": "input_text_key",
    "seed": "random_state",
    "temp": "temperature",
}
GONE = {"model_id_tokenizer": "Name the model in model_id: its directory holds its tokenizer."}
REQUIRED = inspect.Parameter.empty
EXAMPLE = "example-support-dataset.json"
EXAMPLE_INPUTS = {"input_text_key": "question", "output_text_key": "reply"}

# Of each group one is given; a flag takes the place of its whole group in the file.
RIVALS = (*LoopSettings.SPELLINGS, ("lr_schedule", "learning_schedule"))
NOT_GIVEN = {"epochs": -1, "iters": -1}  # as mlx-tuning-fork writes it
ALPHAS = ("lora_parameters.alpha", "lora_alpha")
SIZES = ("clear_cache_threshold",)


@dataclass(frozen=True)
class Input:
    """One input of the graph, as the node that owns it declares it."""

    name: str
    type: Any
    default: Any
    meaning: str
    node: str


@dataclass(frozen=True)
class Tracking:
    """Whether a run is recorded in a Hamilton UI, where, in which project, and with texts of the data or without."""

    wanted: bool = False
    with_data: bool = False
    url: str | None = None
    project: str | None = None


@dataclass(frozen=True)
class Options:
    """The graph's inputs with their types, which of the two graphs is meant, and the file it was read from, if any."""

    start: str
    inputs: dict[str, Any]
    modules: tuple[ModuleType, ...] = ()
    config: str | None = None
    cached: bool = True
    tracking: Tracking = Tracking()


# These are read before the graph is chosen; they are no inputs of it.
SWITCHES = {
    "train": Input("train", bool, None, "", ""),
    "test": Input("test", bool, None, "", ""),
    "test_batches": Input("test_batches", int, None, "", ""),
}
LORA_PARAMETERS = Input("lora_parameters", dict[str, Any], None, "", "")
ALPHA = Input(ALPHAS[0], float, None, "", "")


def build_driver(start: str, modules: Sequence[ModuleType] = (), adapters: Sequence[Any] = ()) -> driver.Driver:
    """The driver of the graph that `start` names, with a user's own modules over ours."""
    builder = driver.Builder().with_config({"start": start}).with_modules(finetune_dataflow, *modules)
    builder = builder.with_adapters(*adapters) if adapters else builder
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
    """The options of a command that takes at most one configuration; otherwise as `parse_all`."""
    read = parse_all(arguments, start)
    if len(read) > 1:
        named = ", ".join(str(each.config) for each in read)
        raise UserError(f"This command takes one configuration, found {len(read)}: {named}.")
    return read[0]


def parse_all(arguments: Sequence[str], start: str | None = None) -> list[Options]:
    """The options of each configuration named by -c, in that order; flags apply to each. Without any, those of the flags.

    A default gives way to a file, a file to a flag. `start` is what the command itself means; then no option may say
    otherwise. Raises one UserError with a line for every problem of every configuration.
    """
    line = _command_line(arguments)
    modules = own_modules(line.modules, None, line.allow_code)
    notes = _Notes()
    read = [_resolved(line, config, start, modules, notes) for config in line.configs or (None,)]
    if notes.problems:
        raise UserError("\n".join(dict.fromkeys(notes.problems)))
    for notice in dict.fromkeys(notes.notices):
        logger.warning("%s", notice)
    return read


def type_name(wanted: Any) -> str:
    """The type of an input in words: int, float, bool, str, list of str, mapping; that None is allowed goes unsaid."""
    kind, _ = yaml_config.kind_of(wanted)
    named = {list: "list of str", dict: "mapping"}
    return named.get(kind) or (kind.__name__ if isinstance(kind, type) else str(kind))


def coerced(owner: Input, value: Any) -> Any:
    """`value` as the type of the input, from a word or from YAML; UserError naming option, found and expected.

    None, and the word null on a command line, are None where the input may be None.
    """
    kind, optional = yaml_config.kind_of(owner.type)
    if optional and (value is None or (kind is not str and isinstance(value, str) and value.lower() == "null")):
        return None
    if kind not in yaml_config.EXPECTED:
        raise UserError(f"{owner.name} is of the type {type_name(owner.type)}, which no option can give.")
    as_size = owner.name in SIZES
    try:
        return yaml_config.size(value) if as_size else yaml_config.converted(kind, value)
    except (ValueError, KeyError, OverflowError) as error:
        expected = "bytes, as 1000000 or 1GB" if as_size else yaml_config.EXPECTED[kind]
        raise UserError(f"{owner.name}={yaml_config.shown(value)}: expected {expected}.") from error


@dataclass
class _CommandLine:
    """A command line in its parts. given: the inputs named there, as they stand there."""

    given: dict[str, str] = field(default_factory=dict)
    configs: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    start: str | None = None
    allow_code: bool = False
    cached: bool = True
    tracking: Tracking = Tracking()


@dataclass(frozen=True)
class _Origin:
    """What one place says. values: by the names that stand there; written: numbers among them as they are written."""

    label: str
    values: dict[str, Any]
    written: Mapping[str, str]
    is_file: bool


@dataclass(frozen=True)
class _Graph:
    """The inputs of the graph that is meant, and those that only the other one has. start is None where neither is known."""

    start: str | None
    inputs: dict[str, Input]
    others: dict[str, Input]


@dataclass
class _Notes:
    """What is wrong, and what is worth telling where nothing is, collected over all configurations."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self, label: str = "") -> Iterator[None]:
        """Put a UserError of the block among the problems, instead of raising it."""
        try:
            yield
        except UserError as error:
            self.problems.append(f"{label}{error}")


FLAGS = ("--allow-code", "--no-cache", "--track", "--track-data")  # options without a value


def _switch(line: _CommandLine, flag: str) -> None:
    if flag == "--allow-code":
        line.allow_code = True
    elif flag == "--no-cache":
        line.cached = False
    else:
        line.tracking = replace(line.tracking, wanted=True, with_data=line.tracking.with_data or flag == "--track-data")


def _command_line(arguments: Sequence[str]) -> _CommandLine:
    line = _CommandLine()
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in FLAGS:
            _switch(line, word)
            continue
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
        name = re.sub(r"^-+", "", name).replace("-", "_")
        if name == "track_url":
            line.tracking = replace(line.tracking, url=value)
            continue
        if name == "track_project":
            line.tracking = replace(line.tracking, project=value)
            continue
        if name in line.given or (name == "start" and line.start is not None):
            raise UserError(f"--{name.replace('_', '-')} is given twice.")
        if name == "start":
            line.start = value
        elif name in {"c", "config"}:
            line.configs.append(value)
        elif name == "module":
            line.modules.append(value)
        else:
            line.given[name] = value
    return line


def _resolved(
    line: _CommandLine, path: str | None, command: str | None, modules: tuple[ModuleType, ...], notes: _Notes
) -> Options:
    """One configuration under the flags. Where there are problems, which go to `notes`, the options are not whole."""
    label = "" if path is None else f"{path}: "
    file, found = yaml_config.Config(), len(notes.problems)
    with notes.collecting():
        if path is not None:
            file = yaml_config.read_config(path)
    values = {name: value for name, value in file.values.items() if value is not None}
    named_start, replacements = values.pop("start", None), values.pop("replace", None)
    with notes.collecting(label):
        modules = (*modules, *_replacing(replacements, line.allow_code))
    below = _Origin(label, _flat(values, label, notes), file.written, is_file=True)
    above = _Origin("", _flat(line.given, "", notes), {}, is_file=False)
    start = _chosen_start(command, line.start, named_start, above, below, notes)
    graph = _graph(start, modules)
    inputs = _over(_taken(below, graph, notes), _taken(above, graph, notes))
    with notes.collecting(label):
        _settle_alpha(inputs, label, notes)
    if not line.cached:
        inputs = {"reuse_replies": False, **inputs}
    if len(notes.problems) == found:
        inputs = inputs if "data_path" in inputs else _with_example(inputs)
        missing = [each for each in graph.inputs.values() if each.default is REQUIRED and each.name not in inputs]
        if missing:
            named = "; ".join(f"--{each.name.replace('_', '-')} ({each.meaning.rstrip('.')})" for each in missing)
            notes.problems.append(f"{label}Missing: {named}.")
    return Options(str(start), inputs, modules, path, line.cached, line.tracking)


def _replacing(replacements: Any, allow_code: bool) -> tuple[ModuleType, ...]:
    if replacements is not None and not isinstance(replacements, dict):
        raise UserError(f"replace={yaml_config.shown(replacements)}: expected {{node: {{method: path.to.module::function}}}}.")
    return own_modules([], replacements, allow_code)


def _flat(values: Mapping[str, Any], label: str, notes: _Notes) -> dict[str, Any]:
    """`lora_parameters: {rank: 8}` as lora_parameters.rank."""
    flat = {name: value for name, value in values.items() if name != LORA_PARAMETERS.name}
    if LORA_PARAMETERS.name in values:
        with notes.collecting(label):
            for name, value in coerced(LORA_PARAMETERS, values[LORA_PARAMETERS.name]).items():
                dotted = f"{LORA_PARAMETERS.name}.{name}"
                if dotted in flat:
                    notes.problems.append(f"{label}{dotted} is given twice.")
                elif value is not None:
                    flat[dotted] = value
    return flat


def _chosen_start(command: str | None, flag: str | None, named: Any, above: _Origin, below: _Origin, notes: _Notes) -> str | None:
    """The graph that is meant, by command, flag, `start` in the file or mlx-lm's switches; None where that is a problem."""
    by_flag = bool({"train", "test"} & above.values.keys())
    found: dict[str, Any] = {}
    for origin in (below, above):
        for name, owner in SWITCHES.items():
            if name in origin.values:
                with notes.collecting(origin.label):
                    found[name] = coerced(owner, origin.values[name])
    start = None
    with notes.collecting(below.label):
        if found.get("test") and found.get("test_batches", -1) != -1:
            raise UserError(
                f"test_batches={found['test_batches']} is refused. The hold-out is evaluated whole: a verdict on some of its "
                "rows would be weaker. Leave it out, or give -1."
            )
    with notes.collecting(below.label):
        start = _named_start(command, flag, None if by_flag else named, found.get("train")) or yaml_config.start_meant(found)
    if start == "base" and found.get("test") is False:
        notes.notices.append(
            f"{below.label}test is false. The hold-out is evaluated all the same, because the verdict rests on it."
        )
    return start


def _named_start(command: str | None, flag: str | None, named: Any, train: bool | None) -> str | None:
    """The start that the command, a flag or the file names; None where none does."""
    if command is not None and (flag or named) not in (None, command):
        raise UserError(f"This command means --start {command}; found {flag or named!r}.")
    start = command or flag or named
    if start is not None and start not in STARTS:
        raise UserError(f"--start {start!r} is unknown.{nearest(str(start), STARTS)} Expected base or presaved.")
    if command is None and flag is None and named is not None and train not in (None, named == "base"):
        raise UserError(f"start: {named} and train: {str(train).lower()} contradict each other. Leave one of them out.")
    return start


def _graph(start: str | None, modules: tuple[ModuleType, ...]) -> _Graph:
    if start is None:
        return _Graph(None, {name: each for one in STARTS for name, each in _own_inputs(one).items()}, {})
    inputs = _with_alpha(graph_inputs(build_driver(start, modules))) if modules else _own_inputs(start)
    others = _own_inputs("base" if start == "presaved" else "presaved")
    return _Graph(start, inputs, {name: each for name, each in others.items() if name not in inputs})


@functools.cache
def _own_inputs(start: str) -> dict[str, Input]:
    return _with_alpha(graph_inputs(build_driver(start)))


def _with_alpha(inputs: dict[str, Input]) -> dict[str, Input]:
    return inputs | {ALPHA.name: ALPHA} if "lora_scale" in inputs else inputs


def _taken(origin: _Origin, graph: _Graph, notes: _Notes) -> dict[str, Any]:
    """The inputs that one origin gives, by their own names; None for one that it takes back."""
    spelled: dict[str, str] = {}
    taken: dict[str, Any] = {}
    unused = []
    for spelling, value in origin.values.items():
        if spelling in SWITCHES:
            continue
        name = _input_name(spelling, origin, graph)
        with notes.collecting(origin.label):
            if name in spelled:
                raise UserError(f"{spelled[name]} and {spelling} are the same input. Give one of them.")
            spelled[name] = spelling
            owner = _owner(name, origin, graph)
            if owner is None:
                _check_without_input(spelling, name, value, origin, graph)
                continue
            value = coerced(owner, origin.written.get(spelling, value) if owner.type is str else value)
            if name in graph.others:
                unused.append(spelling)
            else:
                taken[name] = None if NOT_GIVEN.get(name) == value else value
    if unused:
        notes.notices.append(f'{origin.label}start="{graph.start}" has no use for {", ".join(unused)}.')
    for group in RIVALS:
        given = [f"{spelled[name]}={taken[name]!r}" for name in group if taken.get(name) is not None]
        if len(given) > 1:
            notes.problems.append(f"{origin.label}{' and '.join(given)} say the same thing. Give one of {', '.join(group)}.")
    return taken


def _input_name(spelling: str, origin: _Origin, graph: _Graph) -> str:
    name = ALIASES.get(spelling, spelling)
    if name == "adapter_path" and origin.is_file and graph.start == "base" and "save_adapter_to" in graph.inputs:
        return "save_adapter_to"  # mlx-lm's key for where the adapter is written
    return ALPHA.name if name in ALPHAS else name


def _owner(name: str, origin: _Origin, graph: _Graph) -> Input | None:
    """The input that a value is for. A file may serve both graphs, so it may name inputs of the other one."""
    return graph.inputs.get(name) or (graph.others.get(name) if origin.is_file else None)


def _check_without_input(spelling: str, name: str, value: Any, origin: _Origin, graph: _Graph) -> None:
    """Raise UserError for a name that is no input, unless it is a key of another tool's with a value that changes nothing."""
    if not origin.is_file:
        with suppress(ValueError):
            value = yaml_config.parsed(value)
    try:
        problem = yaml_config.refusal(spelling, value)
    except KeyError:
        problem = _unknown(name, spelling, graph)
    if problem is not None:
        raise UserError(problem)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The flags over the file: a flag takes the place of its rivals, too."""
    given = {name for name, value in above.items() if value is not None}
    replaced = {name for group in RIVALS if given & {*group} for name in group}
    merged = {**{name: value for name, value in below.items() if name not in replaced}, **above}
    return {name: value for name, value in merged.items() if value is not None}


def _settle_alpha(inputs: dict[str, Any], label: str, notes: _Notes) -> None:
    """Take alpha out: beside a scale it has no effect, alone it is refused."""
    alpha = inputs.pop(ALPHA.name, None)
    if alpha is None:
        return
    if "lora_scale" not in inputs:
        rank = inputs.get("lora_rank")
        here = f", here {alpha:g} / {rank} = {alpha / rank:g}" if rank else ""
        raise UserError(f"{ALPHA.name}={alpha:g} is refused. Give lora_parameters.scale, which is alpha / rank{here}.")
    notes.notices.append(f"{label}{ALPHA.name}={alpha:g} is not used: the scale is {inputs['lora_scale']:g}.")


def _unknown(name: str, spelling: str, graph: _Graph) -> str:
    if name in GONE:
        return f"{name} is no input any more. {GONE[name]}"
    if name == "adapter_path":
        return (
            'adapter_path is no input under start="base", which makes an adapter in <output_dir>/adapters. '
            "To evaluate an adapter, use --start presaved; to choose where a fit is written, use --out."
        )
    if name in graph.others:
        return f'{name} is no input under start="{graph.start}".'
    close = nearest(spelling, [*graph.inputs, *ALIASES, *SWITCHES])
    return f"Unknown option {spelling!r}.{close} `run.py inputs` lists all."


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
    section = (inspect.getdoc(function) or "").partition("Inputs:\n")[2]
    found = re.search(rf"^    {name}: (.*(?:\n        .*)*)", section, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""

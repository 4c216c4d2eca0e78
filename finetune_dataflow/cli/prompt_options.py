"""The options of `run.py prompt`: from a command line and a YAML file to what is asked for, checked and with its types."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hamilton import driver

from finetune_dataflow.cli.modules import own_modules
from finetune_dataflow.cli.options import (
    ALIASES,
    ALPHAS,
    LORA_PARAMETERS,
    SWITCHES,
    Input,
    build_driver,
    coerced,
    graph_inputs,
)
from finetune_dataflow.cli.yaml_config import REFUSED as OTHER_TOOLS
from finetune_dataflow.cli.yaml_config import Config, parsed, read_config, refusal
from finetune_dataflow.engine.adapters import check_adapter
from finetune_dataflow.engine.files import user_path
from finetune_dataflow.engine.run_directory import WEIGHTS
from finetune_dataflow.engine.streaming import SamplingSettings
from finetune_dataflow.errors import UserError, nearest

SHORT = {
    "a": "adapter_path", "c": "config", "f": "prompt_format", "nt": "max_tokens", "p": "prompt", "rp": "repetition_penalty",
    "t": "temperature", "tp": "top_p",
}  # fmt: skip
OTHER_NAMES = {"cot_source": "few_shot_file", "min_p_tokens": "min_tokens_to_keep", "temp": "temperature"}
SAMPLING = {
    "max_tokens": int, "temperature": float, "top_p": float, "min_p": float, "min_tokens_to_keep": int, "top_k": int,
    "repetition_penalty": float | None, "repetition_context_size": int, "random_state": int,
}  # fmt: skip
OWN = {**SAMPLING, "prompt": str, "adapter_path": str, "run": str, "compare": bool, "colorize": bool}
FLAGS = ("colorize", "compare", "allow_code")  # --colorize alone is --colorize true
NOT_GIVEN = {"max_tokens": -1, "min_p": -1}  # as mlx-tuning-fork writes it
FROM_LINE_ALONE = ("random_state", "run", "compare")  # a file's random_state deals rows and starts a fit
REFUSED = ("eos_token", "trust_remote_code")  # other tools' keys that would change a reply
FIRST_NODES = ("prompt_settings", "chat_template")


@dataclass
class Line:
    """A command line by the inputs' own names, each value as the word that stands there."""

    given: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    config: str | None = None
    allow_code: bool = False


@dataclass(frozen=True)
class Asked:
    """What is asked for. own: this command's options; inputs: those of the graph that shape a prompt."""

    dr: driver.Driver
    own: dict[str, Any]
    inputs: dict[str, Any]
    sampling: SamplingSettings

    def made(self, *nodes: str) -> dict[str, Any]:
        """Nodes of the graph, by name."""
        return dict(self.dr.execute(list(nodes), inputs=self.inputs))


WHERE = "The prompt is given with -p, the model with --model-id, a YAML file with -c."


def read(arguments: Sequence[str], flags: Collection[str] = FLAGS, where: str = WHERE) -> Line:
    """The words of a command line. Raises UserError for one that is no option, or an option without its value.

    flags: the options that need no value. where: what is said of a word that stands alone.
    """
    line, words = Line(), list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            raise UserError(f"{word!r} was not expected. {where}")
        name, separator, value = word.partition("=")
        if name == "--set" and (separator or words):
            name, separator, value = (value if separator else words.pop(0)).partition("=")
            if not separator:
                raise UserError(f"--set {name!r}: expected name=value.")
        option, bare = name, name.lstrip("-").replace("-", "_")
        name = SHORT.get(bare, bare) if not option.startswith("--") else bare
        if name.startswith("no_") and name[3:] in flags and not separator:
            name, separator, value = name[3:], "=", "false"
        elif name in flags and not separator:
            separator, value = "=", words.pop(0) if words[:1] in (["true"], ["false"]) else "true"
        if not separator:
            if not words:
                raise UserError(f"{option} needs a value.")
            value = words.pop(0)
        _put(line, option, OTHER_NAMES.get(name) or ALIASES.get(name, name), value)
    return line


def _put(line: Line, option: str, name: str, value: str) -> None:
    """Take a word into the command line, under the name of what it gives."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{option} is not UTF-8, at character {error.start}.") from error
    if name == "module":
        line.modules.append(value)
    elif name == "allow_code":
        line.allow_code = value == "true"
    elif name == "loom_markers" and name in line.given:
        line.given[name] += f" {value}"
    elif name in line.given or (name == "config" and line.config is not None):
        raise UserError(f"--{name.replace('_', '-')} is given twice.")
    elif name == "config":
        line.config = value
    else:
        line.given[name] = value


def asked_for(line: Line) -> Asked:
    """What the command line and the file it names ask for. Raises one UserError with a line for every problem."""
    label, file = file_of(line)
    replaced = file.values.get("replace")
    if replaced is not None and not isinstance(replaced, dict):
        raise UserError(f"{label}replace={replaced!r}: expected {{node: {{method: path.to.module::function}}}}.")
    modules = own_modules(line.modules, replaced, line.allow_code)
    dr = build_driver("presaved", modules)
    known = {**graph_inputs(build_driver("base", modules)), **graph_inputs(dr)}
    upstream = dr.what_is_upstream_of(*FIRST_NODES, "base_model_path")
    shaping = {each.name: known[each.name] for each in upstream if each.is_external_input and each.name in known}
    owners = {**shaping, **{name: Input(name, kind, None, "", "") for name, kind in OWN.items()}}
    problems: list[str] = []
    values = {
        **values_of_file(file, label, owners, known.keys(), problems),
        **_values_of_line(line, owners, known.keys(), problems),
    }
    if problems:
        raise UserError("\n".join(problems))
    inputs = {name: value for name, value in values.items() if name in shaping}
    own = {name: value for name, value in values.items() if name in OWN}
    if own.get("adapter_path"):
        inputs = _with_adapter(inputs, own["adapter_path"])
    elif own.get("compare"):
        raise UserError("--compare needs a tuned model. Name its adapter in --adapter-path, or its run in --run.")
    chosen = {name: value for name, value in own.items() if name in SAMPLING and (name, value) != ("repetition_penalty", 0)}
    return Asked(dr, own, inputs, SamplingSettings(**chosen))


def _with_adapter(inputs: Mapping[str, Any], adapter_path: str) -> dict[str, Any]:
    """The inputs with an adapter, and with the base model that it names where none is given."""
    made_for = check_adapter(user_path(adapter_path)).get("model")
    base = {"model_id": made_for} if isinstance(made_for, str) and made_for else {}
    return {**base, **inputs, "adapter_path": adapter_path}


def file_of(line: Line) -> tuple[str, Config]:
    """The file of inputs that is named, or that the run has, and how problems in it begin; a run's names its adapter."""
    if "run" not in line.given:
        return ("", Config()) if line.config is None else (f"{line.config}: ", read_config(line.config))
    if line.config is not None:
        raise UserError("--run and --config both name a file of inputs. Give one.")
    directory = user_path(line.given["run"])
    path = directory / "config.yaml"
    if not path.is_file():
        what = "no finished run: config.yaml is missing" if directory.is_dir() else "no such directory"
        raise UserError(f"--run {str(directory)!r}: there is {what}. Expected the directory of a run.")
    config = read_config(str(path))
    fitted = {} if config.values.get("start") == "presaved" else {"adapter_path": str(directory / WEIGHTS.parent)}
    return f"{path}: ", Config({**config.values, **fitted}, config.written)


def values_of_file(
    file: Config,
    label: str,
    owners: Mapping[str, Input],
    known: Collection[str],
    problems: list[str],
    from_line_alone: Collection[str] = FROM_LINE_ALONE,
) -> dict[str, Any]:
    """What a file says of `owners`; what it says of training is left alone, an unknown name is a problem."""
    of_training = {*known, *ALIASES, *ALPHAS, *SWITCHES, *OTHER_TOOLS, LORA_PARAMETERS.name, "start", "replace"}
    usual = [each for each in (*owners, *of_training) if each not in from_line_alone]
    values: dict[str, Any] = {}
    for spelling, value in file.values.items():
        name = OTHER_NAMES.get(spelling) or ALIASES.get(spelling, spelling)
        owner = owners.get("adapter_path" if name == "save_adapter_to" else name)
        if value is None or (name == "save_adapter_to" and "adapter_path" in file.values):
            continue
        try:
            if spelling in REFUSED and (problem := refusal(spelling, value)):
                problems.append(f"{label}{problem}")
            elif owner is not None and owner.name not in from_line_alone:
                if owner.name in values:
                    problems.append(f"{label}{owner.name} is given twice, once as {spelling}.")
                taken = coerced(owner, file.written.get(spelling, value) if owner.type is str else value)
                values |= {} if NOT_GIVEN.get(owner.name) == taken else {owner.name: taken}
            elif not (name in of_training or spelling.startswith(("wandb_", f"{LORA_PARAMETERS.name}."))):
                problems.append(f"{label}Unknown option {spelling!r}.{nearest(spelling, usual)}")
        except UserError as error:
            problems.append(f"{label}{error}")
    return values


def _values_of_line(line: Line, owners: Mapping[str, Input], known: Collection[str], problems: list[str]) -> dict[str, Any]:
    """The values on the command line, with their types."""
    values: dict[str, Any] = {}
    for name, word in line.given.items():
        option = f"--{name.replace('_', '-')}"
        try:
            if name in owners:
                taken = coerced(owners[name], word)
                values |= {} if NOT_GIVEN.get(name) == taken else {name: taken}
            elif name in REFUSED:
                with suppress(ValueError):
                    word = parsed(word)
                problems += filter(None, [refusal(name, word)])
            elif name in known:
                problems.append(f"{option} does not shape a prompt. `run.py prompt --help` lists what does.")
            else:
                close = nearest(name, [*owners, *OTHER_NAMES, *ALIASES, "config", "module", "allow_code"])
                problems.append(f"Unknown option {option!r}.{close} `run.py prompt --help` lists all.")
        except UserError as error:
            problems.append(str(error))
    return values

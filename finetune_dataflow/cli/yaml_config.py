"""A YAML file of a run, read safely; values as the types of inputs; and other tools' keys that are no inputs here."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from finetune_dataflow.engine.files import user_path
from finetune_dataflow.errors import UserError

LARGEST_FILE = 1_000_000  # bytes
MOST_VALUES = 10_000
CORE_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
FLOAT_WITH_EXPONENT = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")

EXPECTED = {
    bool: "true or false",
    dict: "names with values, as {name: value}",
    float: "a number",
    int: "a whole number",
    list: "a list of texts, as a,b or [a, b]",
    str: "text, in quotes where it looks like something else",
}
UNITS = {"": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}

_WANDB = "Say report_to: wandb, and project_name; a team is named in the environment variable WANDB_ENTITY."
_PENALTY = "Only the command prompt takes it; replies of the evaluation have none. Leave it out."
# Keys that are no inputs: the values that change nothing here and are accepted, and why any other is refused.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_file": ((), "Name a directory in save_adapter_to: the adapter is written there in mlx-lm's layout."),
    "chat_feature": (("messages",), "Rows of conversations have their messages under the key 'messages'."),
    "config": ((), "A file cannot name another. Give several, each with -c."),
    "eos_token": ((), "The end of a reply is the one of the model's own tokenizer. Leave it out."),
    "eval_proportion_of_total": ((0,), "Say in val_batches how many batches a validation takes, -1 for all."),
    "hf_dataset": ((), "Name the dataset in data (owner/name), and its keys in input_text_key and output_text_key."),
    "ignore_chat_template": (
        (False,),
        "Say in prompt_format how a conversation is written, or train on plain text with train_type: self-supervised.",
    ),
    "repetition_penalty": ((0, 1), _PENALTY),
    "text_feature": (("text",), "Name the key in output_text_key, with train_type: self-supervised."),
    "training_mode": (("normal",), "Only supervised fine-tuning (normal) is built. Leave it out."),
    "trust_remote_code": ((False,), "Code from a model's directory is never run. Leave it out."),
    "use_dora": ((False,), "Say fine_tune_type: dora."),
    "validation_scale": ((), "Say in val_batches how many batches a validation takes, -1 for all."),
    "write_every": ((), "A reply is printed when it is finished. Leave it out."),
}


@dataclass(frozen=True)
class Config:
    """A file as it was read. values: by key, in the file's order; written: the numbers among them as they stand there."""

    values: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


def read_config(path: str) -> Config:
    """The names and values in a YAML file.

    Numbers such as 1e-5 are numbers, dates are text, keys are text. At most 1 MB and 10,000 values, where an alias counts
    as often as it is used, so that a small file cannot grow without bound.

    Raises UserError, naming file and line, for a file that cannot be read, a key that stands twice, or tags of its own.
    """
    text = _text(path)
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise UserError(f"{path} is empty. Expected names with values, such as epochs: 2.")
        if not isinstance(root, yaml.MappingNode):
            found = "a list" if isinstance(root, yaml.SequenceNode) else repr(root.value[:40])
            raise UserError(f"{path}: expected names with values, such as epochs: 2; found {found}.")
        written = {key.value: value.value for key, value in root.value if value.tag in CORE_TAGS[1:3]}
        return Config(loader.construct_document(root), written)
    except yaml.YAMLError as error:
        raise UserError(f"{path}, {_described(error, text)}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply.") from error
    finally:
        if loader is not None:
            loader.dispose()


def parsed(text: str) -> Any:
    """The value of a word on the command line that is YAML, JSON included. Raises ValueError where it is none."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from error


def kind_of(wanted: Any) -> tuple[Any, bool]:
    """The type without None, list[str] as list and dict[...] as dict; and whether None is allowed."""
    members = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    kinds = [each for each in members if each is not types.NoneType]
    if len(kinds) != 1:
        return wanted, False
    outer, arguments = typing.get_origin(kinds[0]), typing.get_args(kinds[0])
    plain = outer is dict or (outer is list and arguments == (str,))
    return (outer if plain else kinds[0]), len(members) > 1


def converted(kind: Any, value: Any) -> Any:
    """`value`, a word or from YAML, as one of the kinds in EXPECTED. Raises ValueError, KeyError or OverflowError."""
    return _CONVERTERS[kind](value)


def size(value: Any) -> int:
    """Bytes from a number, or from text such as 1.5GB; units are powers of 1000, as in mlx-lm."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    return round(float(found[1]) * UNITS[found[2].upper()]) if found else _whole(value)


def refusal(name: str, value: Any) -> str | None:
    """Why a key that is no input is refused with this value; None where the value changes nothing and is accepted.

    Raises KeyError for a key that is neither mlx-lm's nor mlx-tuning-fork's.
    """
    accepted, reason = ((), _WANDB) if name.startswith("wandb_") else REFUSED[name]
    if value is None or any(value == each and isinstance(value, str) == isinstance(each, str) for each in accepted):
        return None
    return f"{name}={shown(value)} is refused. {reason}"


def shown(value: Any) -> str:
    """A value as a message shows it, cut at 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def start_meant(switches: Mapping[str, bool | None]) -> str:
    """The graph that mlx-lm's `train` and `test` mean: base, or presaved where only testing is wanted.

    Raises UserError where neither is wanted.
    """
    if switches.get("train") is not False:
        return "base"
    if switches.get("test"):
        return "presaved"
    raise UserError("There is nothing to do: train is false, and test is not true. Set one of them to true.")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter: bounded, without tags of its own, each key once and text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0
        self._values_of: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        before = self._values
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._values_of:
                raise _problem(f"the alias *{event.anchor} stands within what it stands for", event)
            self._values += self._values_of[event.anchor]
        else:
            self._check(node)
            self._values += 1
            if event.anchor:
                self._values_of[event.anchor] = self._values - before
        if self._values > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES:,} values, counting each use of an alias", event)
        return node

    @staticmethod
    def _check(node: yaml.Node | None) -> None:
        """Raise for a tag of its own, and for a key that is not text or stands twice."""
        if node is not None and node.tag not in CORE_TAGS:
            raise _problem(f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed, only plain values", node)
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag not in (CORE_TAGS[0], CORE_TAGS[-1]):
                raise _problem(f"{_shown(key)} is no key: expected text, in quotes where it looks like something else", key)
            if key.value in lines:
                raise _problem(f"the key {key.value!r} stands there twice, first in line {lines[key.value]}", key)
            lines[key.value] = key.start_mark.line + 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # raises for more digits than Python writes
            return value
        except (ValueError, KeyError, IndexError) as error:  # a scalar that is not what its tag says, or has too many digits
            raise _problem(f"{_shown(node)} cannot be read as {node.tag.rpartition(':')[2]}", node) from error


# YAML 1.1 takes 1e-5 for text and 2024-01-01 for a date; a settings file means a number and a text. The table is a copy:
# PyYAML's own would change for everyone in the process.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in CORE_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_WITH_EXPONENT, list("-+.0123456789"))


def _text(path: str) -> str:
    try:
        with user_path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"The configuration {path} cannot be read: {reason}.") from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} is larger than {LARGEST_FILE:,} bytes. Expected a file of settings.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#x}).") from error


def _described(error: yaml.YAMLError, text: str) -> str:
    """Line, column and problem of what PyYAML found."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"line {text.count(chr(10), 0, error.position) + 1}: the character {error.character:#x} is not allowed in YAML."
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not YAML: {error}"
    where = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    problem = error.problem or ""
    if problem.startswith("but ") and error.context:
        problem = f"{error.context}, {problem}"
    if "'\\t'" in problem:
        problem = "a tab; YAML allows only spaces there"
    return f"{where}: {'' if isinstance(error, _Refused) else 'not YAML: '}{problem}."


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not what a settings file may hold."""


def _problem(text: str, at: Any) -> _Refused:
    """What to raise at a node or an event."""
    return _Refused(problem=text, problem_mark=at.start_mark)


def _shown(node: yaml.Node) -> str:
    return repr(node.value[:40]) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _list(value: Any) -> list[str]:
    if isinstance(value, str):
        value = parsed(value) if value.lstrip().startswith("[") else [each.strip() for each in value.split(",")]
    if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError
    return value


def _mapping(value: Any) -> dict[str, Any]:
    value = parsed(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError
    return value


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    bool: _truth, dict: _mapping, float: _number, int: _whole, list: _list, str: _words,
}  # fmt: skip

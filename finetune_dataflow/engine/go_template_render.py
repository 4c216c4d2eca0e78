"""A Go template rendered as Ollama renders it: Go's rules, and the data that Ollama gives a template.

Texts are bytes, as in Go: `len` counts bytes, and `slice` may cut a character in two. `tests_full` renders the same templates
with Go itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_dataflow.engine.go_template_parse import (
    Expression,
    Function,
    GoTemplateError,
    If,
    Literal,
    Node,
    Range,
    Set,
    Text,
    Value,
    Write,
    parsed_go,
)

DEEPEST = 100_000  # templates inside templates: Go's own limit


def render_go(text: str, messages: Sequence[Mapping[str, Any]], system: str = "") -> str:
    """What Ollama makes of a conversation with the template `text`: the prompt that the model continues.

    `system` is the Modelfile's, which stands before a conversation that does not begin with one of its own. Messages of the
    same role in a row are joined first, as Ollama does. Raises GoTemplateError where Go would refuse.
    """
    if system and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    data = {
        "System": "\n\n".join(each["content"] for each in messages if each["role"] == "system"),
        "Messages": [{"Role": each["role"], "Content": each["content"]} for each in collated(messages)],
        "Response": "",
    }
    return execute(text, data)


def collated(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages as Ollama hands them to a template: those of one role in a row are one, blank lines between their texts.

    Results of tools are the exception: each stays a message.
    """
    joined: list[dict[str, str]] = []
    for each in messages:
        role, content = each["role"], each["content"]
        if joined and joined[-1]["role"] == role != "tool":
            joined[-1]["content"] += f"\n\n{content}"
        else:
            joined.append({"role": role, "content": content})
    return joined


def execute(text: str, data: Mapping[str, Any]) -> str:
    """The template `text` executed on `data`, whose texts are strings. Raises GoTemplateError where Go would refuse."""
    return _Run(_parsed(text)).run(_as_bytes(data)).decode("utf-8", "replace")


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Mapping[str, list[Node]]:
    return parsed_go(text)


def _as_bytes(value: Any) -> Value:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, Mapping):
        return {name: _as_bytes(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_bytes(each) for each in value]
    return value


@dataclass
class _Scope:
    """The dot, and the variables that are in sight, the latest last."""

    dot: Value
    variables: list[list[Any]]

    def variable(self, name: str) -> list[Any]:
        for found in reversed(self.variables):
            if found[0] == name:
                return found
        raise GoTemplateError(f"undefined variable {name!r}")


class _Run:
    """One execution. Blocks run as generators on a list of their own, so that no depth is too deep for Python."""

    def __init__(self, templates: Mapping[str, list[Node]]) -> None:
        self._templates = templates
        self._written: list[bytes] = []

    def run(self, data: Value) -> bytes:
        running = [self._nodes(self._templates[""], _Scope(data, [["$", data]]))]
        while running:
            if len(running) > 4 * DEEPEST:
                raise GoTemplateError("templates inside templates, too deep")
            inner = next(running[-1], None)
            if inner is None:
                running.pop()
            else:
                running.append(inner)
        return b"".join(self._written)

    def _nodes(self, nodes: Sequence[Node], scope: _Scope) -> Iterator[Any]:
        """Execute some nodes; what is to run inside them is yielded."""
        known = len(scope.variables)
        for node in nodes:
            if isinstance(node, Text):
                self._written.append(node.text)
            elif isinstance(node, Write):
                self._written.append(_printed(self._value(node.value, scope)))
            elif isinstance(node, Set):
                self._set(node, scope)
            elif isinstance(node, If):
                yield self._nodes(node.then if _true(self._value(node.condition, scope)) else node.otherwise, scope)
            elif isinstance(node, Range):
                yield from self._repeated(node, scope)
            else:
                if node.name not in self._templates:
                    raise GoTemplateError(f"template {node.name!r} not defined")
                data = self._value(node.data, scope)
                yield self._nodes(self._templates[node.name], _Scope(data, [["$", data]]))
        del scope.variables[known:]

    def _repeated(self, node: Range, scope: _Scope) -> Iterator[Any]:
        over = self._value(node.over, scope)
        if not isinstance(over, list):
            raise GoTemplateError("range over what is not a list")
        for index, item in enumerate(over):
            values = [index, item] if len(node.names) == 2 else [item]
            own = [[name, value] for name, value in zip(node.names, values, strict=False)]
            inner = _Scope(item, [*scope.variables, *own])  # the outer variables are shared, so what is set stays set
            yield self._nodes(node.body, inner)

    def _set(self, node: Set, scope: _Scope) -> None:
        value = self._value(node.value, scope)
        if node.declares:
            scope.variables.append([node.name, value])
        else:
            scope.variable(node.name)[1] = value

    def _value(self, expression: Expression, scope: _Scope) -> Value:
        if isinstance(expression, Literal):
            return expression.value
        if isinstance(expression, Function):
            return _called(expression.name, [self._value(each, scope) for each in expression.arguments])
        value = scope.variable(expression.variable)[1] if expression.variable else scope.dot
        for name in expression.names:
            if not isinstance(value, Mapping) or name not in value:
                raise GoTemplateError(f"no field {name!r}")
            value = value[name]
        return value


def _true(value: Value) -> bool:
    return bool(value)


def _printed(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int):
        return str(value).encode()
    raise GoTemplateError(f"a {type(value).__name__} cannot be written")


def _called(name: str, arguments: list[Value]) -> Value:
    """One of Go's functions. Raises GoTemplateError for arguments that it does not take."""
    try:
        return _IMPLEMENTED[name](*arguments)
    except (TypeError, ValueError, IndexError) as error:
        raise GoTemplateError(f"{name}: {error}") from error


def _eq(first: Value, *others: Value) -> bool:
    if not others or any(type(each) is not type(first) for each in others):
        raise TypeError("incompatible types for comparison")
    return first in others


def _gt(first: Value, second: Value) -> bool:
    if type(first) is not int or type(second) is not int:
        raise TypeError("incompatible types for comparison")
    return first > second


def _len(value: Value) -> int:
    if not isinstance(value, bytes | list):
        raise TypeError("a value without a length")
    return len(value)


def _slice(value: Value, start: Value, end: Value = None) -> Value:
    end = _len(value) if end is None else end
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= _len(value):
        raise IndexError(f"no slice from {start} to {end} of a length of {_len(value)}")
    return value[start:end]


def _printf(form: Value, value: Value) -> bytes:
    if form != b"%.1s" or not isinstance(value, bytes):
        raise TypeError("only the first character of a text is known")
    return value.decode("utf-8", "surrogatepass")[:1].encode("utf-8", "surrogatepass")


_IMPLEMENTED: Mapping[str, Callable[..., Value]] = {
    "eq": _eq,
    "ne": lambda first, second: not _eq(first, second),
    "not": lambda value: not _true(value),
    "and": lambda *values: next((each for each in values if not _true(each)), values[-1]),
    "or": lambda *values: next((each for each in values if _true(each)), values[-1]),
    "gt": _gt,
    "len": _len,
    "slice": _slice,
    "printf": _printf,
}

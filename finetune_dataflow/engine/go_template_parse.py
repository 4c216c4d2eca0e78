"""Go's `text/template`, as much of it as this project writes, from text to a tree; what is outside that part is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

_ACTION = re.compile(r'\{\{(?P<left>-(?=\s))?(?P<inside>(?:"(?:[^"\\\n]|\\.)*"|(?!\s-\}\}|\}\})[^"])*)(?P<right>\s-)?\}\}')
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>[0-9]+)|(?P<sign>:=|=|,|\(|\))'
    r"|(?P<name>\$?[A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_0-9]+)*|\$(?:\.[A-Za-z_0-9]+)*|(?:\.[A-Za-z_0-9]+)+|\.))"
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_SIMPLE_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_SPACE = " \t\r\n"  # what `{{-` and `-}}` remove
_FUNCTIONS = ("eq", "ne", "not", "and", "or", "gt", "len", "slice", "printf")
_KEYWORDS = ("if", "else", "end", "range", "define", "template")

Value: TypeAlias = Any  # bytes, int, bool, a list of values, or a mapping from names to values


class GoTemplateError(ValueError):
    """A template that Go, or this part of it, refuses to parse or to execute."""


@dataclass(frozen=True)
class Literal:
    """A text, a number or a truth value."""

    value: Value


@dataclass(frozen=True)
class Field:
    """A variable or the dot (""), and the fields that are read of it one after the other."""

    variable: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A function and its arguments."""

    name: str
    arguments: tuple[Expression, ...]


Expression: TypeAlias = Literal | Field | Function


@dataclass(frozen=True)
class Text:
    """What stands between actions."""

    text: bytes


@dataclass(frozen=True)
class Write:
    """A value that is written."""

    value: Expression


@dataclass(frozen=True)
class Set:
    """A variable that is declared or set anew."""

    name: str
    value: Expression
    declares: bool


@dataclass(frozen=True)
class If:
    """A choice."""

    condition: Expression
    then: list[Node]
    otherwise: list[Node]


@dataclass(frozen=True)
class Range:
    """A block for every item of a list."""

    names: tuple[str, ...]
    over: Expression
    body: list[Node]


@dataclass(frozen=True)
class Use:
    """Another template, on its own data."""

    name: str
    data: Expression


Node: TypeAlias = Text | Write | Set | If | Range | Use


def parsed_go(text: str) -> dict[str, list[Node]]:
    """The templates that a text defines, by name; its own has the name "". Raises GoTemplateError."""
    return _Parser(text).templates


def _pieces(text: str) -> Iterator[str | list[tuple[str, str]]]:
    """The text between actions, white space removed where they say so, and the tokens of each action."""
    place, trims = 0, False
    while (start := text.find("{{", place)) >= 0:
        action = _ACTION.match(text, start)
        if action is None:
            raise GoTemplateError(f"an action that does not end: {text[start : start + 60]!r}")
        before = text[place:start].lstrip(_SPACE) if trims else text[place:start]
        yield before.rstrip(_SPACE) if action["left"] else before
        yield _tokens(action["inside"])
        place, trims = action.end(), bool(action["right"])
    yield text[place:].lstrip(_SPACE) if trims else text[place:]


def _tokens(inside: str) -> list[tuple[str, str]]:
    inside, place, found = inside.rstrip(), 0, []
    while place < len(inside):
        token = _TOKEN.match(inside, place)
        if token is None:
            raise GoTemplateError(f"not a token that is known: {inside[place : place + 40]!r}")
        found.append((str(token.lastgroup), str(token[str(token.lastgroup)])))
        place = token.end()
    return found


def _unquoted(written: str) -> bytes:
    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code:
            return chr(int(code, 16))
        if match[3] not in _SIMPLE_ESCAPES:
            raise GoTemplateError(f"an escape that is not known: {match[0]!r}")
        return _SIMPLE_ESCAPES[match[3]]

    return _ESCAPE.sub(character, written[1:-1]).encode()


class _Parser:
    """The templates in a text, by name; the text's own has the name ""."""

    def __init__(self, text: str) -> None:
        self._pieces = _pieces(text)
        self.templates: dict[str, list[Node]] = {}
        nodes, ended = self._nodes(top=True)
        if ended:
            raise GoTemplateError(f"{{{{ {ended} }}}} without a beginning")
        self.templates[""] = nodes

    def _nodes(self, top: bool = False) -> tuple[list[Node], str]:
        """The nodes up to an `end` or `else`, which is left in `self._tokens`, and that word; "" at the end of the text."""
        nodes: list[Node] = []
        for piece in self._pieces:
            if isinstance(piece, str):
                nodes += [Text(piece.encode())] if piece else []
                continue
            self._tokens = piece
            word = piece[0][1] if piece and piece[0][0] == "name" else ""
            if word in ("end", "else"):
                return nodes, word
            if word == "define":
                if not top:
                    raise GoTemplateError("a define inside another block")
                self._take("name")
                name = _unquoted(self._take("string")).decode()
                self.templates[name] = self._block()
            else:
                nodes.append(self._node(word))
        return nodes, ""

    def _block(self) -> list[Node]:
        """The nodes up to an `end`."""
        self._finished()
        nodes, ended = self._nodes()
        if ended != "end":
            raise GoTemplateError(f"expected an end, found {ended or 'the end of the text'}")
        self._take("name")
        self._finished()
        return nodes

    def _node(self, word: str) -> Node:
        if word in _KEYWORDS:
            self._take("name")
        if word == "if":
            return self._if()
        if word == "range":
            names = self._names()
            over = self._expression()
            return Range(names, over, self._block())
        if word == "template":
            name = _unquoted(self._take("string")).decode()
            node: Node = Use(name, self._expression())
        elif names := self._names():
            node = Set(names[0], self._expression(), self._assigned == ":=")
        else:
            node = Write(self._expression())
        self._finished()
        return node

    def _if(self) -> If:
        condition = self._expression()
        self._finished()
        then, ended = self._nodes()
        otherwise: list[Node] = []
        if ended == "else":
            self._take("name")
            if self._tokens[:1] == [("name", "if")]:
                self._take("name")
                return If(condition, then, [self._if()])  # the two share one end
            otherwise = self._block()
        elif ended == "end":
            self._take("name")
            self._finished()
        else:
            raise GoTemplateError("an if without an end")
        return If(condition, then, otherwise)

    def _names(self) -> tuple[str, ...]:
        """The variables before `:=` or `=`, and which of the two it was; none where nothing is set."""
        at = next((place for place, token in enumerate(self._tokens) if token[1] in (":=", "=") and token[0] == "sign"), 0)
        if not at:
            return ()
        taken, self._assigned, self._tokens = self._tokens[:at], self._tokens[at][1], self._tokens[at + 1 :]
        names = tuple(each for kind, each in taken if kind == "name" and each.startswith("$"))
        if [each for _, each in taken] not in ([*names[:1]], [*names[:1], ",", *names[1:2]]):
            raise GoTemplateError(f"not variables: {taken}")
        return names

    def _expression(self) -> Expression:
        """A function and its operands, or one operand."""
        if self._tokens and self._tokens[0][1] in _FUNCTIONS and self._tokens[0][0] == "name":
            name = self._take("name")
            operands = []
            while self._tokens and self._tokens[0][1] != ")":
                operands.append(self._operand())
            return Function(name, tuple(operands))
        return self._operand()

    def _operand(self) -> Expression:
        kind, token = self._tokens.pop(0) if self._tokens else ("", "")
        if kind == "string":
            return Literal(_unquoted(token))
        if kind == "number":
            return Literal(int(token))
        if token == "(":
            inner = self._expression()
            if self._take("sign") != ")":
                raise GoTemplateError("a bracket that is not closed")
            return inner
        if token in ("true", "false"):
            return Literal(token == "true")
        if kind == "name" and token[0] in "$.":
            variable, *names = [""] if token == "." else token.split(".")
            return Field(variable, tuple(names))
        raise GoTemplateError(f"not an operand that is known: {token!r}")

    def _take(self, kind: str) -> str:
        found, token = self._tokens.pop(0) if self._tokens else ("", "")
        if found != kind:
            raise GoTemplateError(f"expected a {kind}, found {token!r}")
        return token

    def _finished(self) -> None:
        if self._tokens:
            raise GoTemplateError(f"not expected in an action: {self._tokens[0][1]!r}")

"""What a chat template writes around the texts of a conversation, found out once so that it need not run for every row.

Most templates put the texts of the messages between strings of their own, which depend on the roles alone. That is proved
for each sequence of roles before it is used: the template may do nothing with a text but put it out (or strip it), which a
text that notes what is done with it tells, and it must write hostile texts exactly as the layout does. Where any of this
fails there is no layout, and the template runs for every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

Part = str | int  # what the template writes, or the number of the message whose text stands there

_BEFORE, _AFTER = "\uf8f0", "\uf8f1"  # around a message's number, where its text will stand
_MARK = re.compile(f"{_BEFORE}([0-9]+){_AFTER}")
_HOSTILE = (
    " \t\n{}'\"\\<b>&amp;</think>ÄßΩ \U0001d54f\u200b\r\n ",
    "</think>{{ x }}[INST]İı %s {} \\n\u3000",
    "a",
    "user",
)
# What joins texts in ways that a text does not see.
_UNSEEN = (nodes.Concat, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)
_UNSEEN_FILTERS = {"join", "format", "string", "map", "select", "reject", "selectattr", "rejectattr", "groupby", "tojson"}


@dataclass(frozen=True)
class Layout:
    """What a template writes for one sequence of roles: parts in their order, and the messages whose texts it strips."""

    parts: tuple[Part, ...]
    stripped: frozenset[int]

    def text(self, contents: Sequence[str]) -> str:
        """The rendered conversation with these contents of its messages."""
        return "".join(part if isinstance(part, str) else self.content(part, contents) for part in self.parts)

    def content(self, message: int, contents: Sequence[str]) -> str:
        """The text of a message as the template writes it."""
        return contents[message].strip() if message in self.stripped else contents[message]


def layout(
    template: str, roles: Sequence[str], variables: Mapping[str, object], rendered: Callable[[Sequence[str]], str]
) -> Layout | None:
    """The layout of conversations of these roles whose texts are not blank; None where it cannot be proved.

    variables: what the template knows besides messages. rendered: the template's own rendering of some contents.
    """
    used = _uses(template, roles, variables)
    if used is None or any(what != "strip" for _, what in used):
        return None
    try:
        marked = rendered([f"{_BEFORE}{message}{_AFTER}" for message in range(len(roles))])
        pieces = _MARK.split(marked)
        parts = [piece if place % 2 == 0 else int(piece) for place, piece in enumerate(pieces)]
        found = Layout(tuple(part for part in parts if part != ""), frozenset(message for message, _ in used))
        for hostile in _HOSTILE:
            contents = [f"{hostile}{message}{hostile}" for message in range(len(roles))]
            if rendered(contents) != found.text(contents):
                return None
        return found
    except ValueError:  # the template refuses one of the texts, or writes the marks otherwise
        return None


def _uses(template: str, roles: Sequence[str], variables: Mapping[str, object]) -> set[tuple[int, str]] | None:
    """What the template does with which message's text besides putting it out; None where that cannot be seen."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    used: set[tuple[int, str]] = set()
    try:
        parsed = environment.parse(template)
        if any(True for _ in parsed.find_all(_UNSEEN)):
            return None
        if any(each.name in _UNSEEN_FILTERS for each in parsed.find_all(nodes.Filter)):
            return None
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda _: ""
        messages = [{"role": role, "content": _Watched(f"text {message}", message, used)} for message, role in enumerate(roles)]
        environment.from_string(parsed).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **variables
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError):
        return None
    return used


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Watched(str):
    """A text that notes what is done with it: anything but putting it out, joining it with + and asking whether it is blank."""

    message: int
    used: set[tuple[int, str]]

    def __new__(cls, text: str, message: int, used: set[tuple[int, str]]) -> _Watched:
        made = super().__new__(cls, text)
        made.message, made.used = message, used
        return made

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: str) -> str:
        return _Watched(str.__add__(self, other), self.message, self.used)

    def __radd__(self, other: str) -> str:
        return _Watched(str.__add__(other, self), self.message, self.used)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in {"message", "used"}:
            return super().__getattribute__(name)
        if name == "strip":
            return self._strip
        if name != "_strip":
            self.used.add((self.message, name))
        return super().__getattribute__(name)

    def _strip(self, characters: str | None = None) -> str:
        self.used.add((self.message, "strip" if characters is None else "strip of characters"))
        return _Watched(str.strip(self, characters), self.message, self.used)

    def _noted(self, name: str) -> None:
        self.used.add((self.message, name))

    def __len__(self) -> int:
        self._noted("length")
        return super().__len__()

    def __iter__(self) -> Iterator[str]:
        self._noted("characters")
        return super().__iter__()

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        self._noted("piece")
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._noted("contains")
        return super().__contains__(key)  # type: ignore[operator]

    def __mod__(self, value: Any) -> str:
        self._noted("format")
        return super().__mod__(value)

    def __mul__(self, value: SupportsIndex) -> str:
        self._noted("repeat")
        return super().__mul__(value)

    def __hash__(self) -> int:
        self._noted("hash")
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        self._noted("equal")
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        self._noted("equal")
        return super().__ne__(other)

    def __lt__(self, other: str) -> bool:
        self._noted("order")
        return super().__lt__(other)

    def __le__(self, other: str) -> bool:
        self._noted("order")
        return super().__le__(other)

    def __gt__(self, other: str) -> bool:
        self._noted("order")
        return super().__gt__(other)

    def __ge__(self, other: str) -> bool:
        self._noted("order")
        return super().__ge__(other)

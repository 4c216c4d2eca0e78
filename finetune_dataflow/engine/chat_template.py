"""A model's own chat template, in Jinja: rendered as `transformers` does, and what its source says of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_dataflow.errors import UserError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
LONGEST_CONSTANT = 200  # characters of a string that a template may look for

# What a template may raise on a conversation that it is not made for.
REFUSALS = (
    jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip

Roles: TypeAlias = tuple[str, ...]


class Refused(Exception):
    """The chat template refuses a conversation; the text says why."""


def messages_of(roles: Sequence[str], contents: Iterable[str]) -> list[dict[str, str]]:
    """Messages of these roles and texts."""
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, with which `transformers` marks replies: it writes what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """A chat template in the sandbox and with the functions that `transformers` gives it, for messages of text."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], today: date | None = None, default_system: str = ""
    ) -> None:
        """Raise UserError for what is no Jinja. `default_system` stands before conversations without a system message."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": self._now}
        try:
            self.tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"The chat template is not valid Jinja, in line {error.lineno}: {error.message}.") from error
        self.special_tokens = special_tokens
        self.default_system = default_system
        self.today = today or date(2001, 2, 3)

    def _now(self, form: str) -> str:
        return datetime.combine(self.today, time()).strftime(form)

    def rendered(self, messages: Sequence[Mapping[str, str]], *, generation: bool = True) -> str:
        """What the template writes for a conversation. Raises Refused."""
        if self.default_system and (not messages or messages[0]["role"] != SYSTEM):
            messages = [{"role": SYSTEM, "content": self.default_system}, *messages]
        values = {"tools": None, "documents": None, "add_generation_prompt": generation, **self.special_tokens}
        try:
            return self._template.render(messages=[dict(each) for each in messages], **values)
        except REFUSALS as error:
            raise Refused(str(error) or type(error).__name__) from error

    def depends_on_the_day(self) -> bool:
        """Whether another day gives another text."""
        today, texts = self.today, []
        for each in (date(2001, 2, 3), date(2012, 11, 30)):
            self.today = each
            texts.append([self._or_reason(roles) for roles in ((USER,), (SYSTEM, USER), (USER, ASSISTANT, USER))])
        self.today = today
        return texts[0] != texts[1]

    def _or_reason(self, roles: Roles) -> str:
        try:
            return self.rendered(messages_of(roles, roles))
        except Refused as refusal:
            return str(refusal)

    def constants(self) -> list[str]:
        """The strings that the template may look for in a text."""
        found = {each.value for each in self.tree.find_all(nodes.Const) if isinstance(each.value, str) and each.value}
        return sorted(each for each in found if len(each) <= LONGEST_CONSTANT)

    def numbers(self) -> list[int]:
        """The numbers that it may compare with."""
        return [each.value for each in self.tree.find_all(nodes.Const) if type(each.value) is int]

    def other_inputs(self) -> list[str]:
        """The names it reads besides the messages and special tokens, without those it sets itself."""
        known = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", *TOKENS, *self.special_tokens}
        own = {each.name for each in self.tree.find_all(nodes.Name) if each.ctx == "store"} - {"tools", "documents"}
        return sorted(jinja2.meta.find_undeclared_variables(self.tree) - known - own)

    def suspects(self) -> str:
        """The constructs that a Go template cannot express, as a sentence's end; "" where there is none."""
        filters = {f"the filter `{each.name}`" for each in self.tree.find_all(nodes.Filter) if each.name != "trim"}
        called = [each.node for each in self.tree.find_all(nodes.Call)]
        methods = {f"the method `.{each.attr}()`" for each in called if isinstance(each, nodes.Getattr)} - {
            "the method `.strip()`"
        }
        parts = {"messages made of parts, such as images"} if any(map(_is_content, self.tree.find_all(nodes.For))) else set()
        found = sorted({*filters, *methods, *parts, *(f"`{each}`" for each in self.other_inputs())})
        return f" It uses {', '.join(found)}." if found else ""


def _is_content(loop: nodes.For) -> bool:
    """Whether a loop runs over a message's content."""
    over: nodes.Node | None = loop.iter
    while isinstance(over, nodes.Filter):
        over = over.node
    named = over.attr if isinstance(over, nodes.Getattr) else over.arg if isinstance(over, nodes.Getitem) else None
    return named == "content" or (isinstance(named, nodes.Const) and named.value == "content")

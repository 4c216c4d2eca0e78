"""The content of a prompt, before any format wraps it: system text, examples, earlier turns, contexts, input, reply.

One function makes the messages of a row for training and for generation. Every part has one source; where two are set,
`check_sources` names both. The options' texts are templates with markers (`engine.markers`): `{input}`, `{context}` and
`{response}` are the row's own parts, any other name is a column. The system prompt is no template: it is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune_dataflow.engine.few_shot import ExampleRow, few_shot_examples
from finetune_dataflow.engine.markers import Template, parsed
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from finetune_dataflow.engine.chat import Message
    from finetune_dataflow.word_loom import PreparedLoom

INPUT_TEMPLATE, CONTEXT_TEMPLATE, RESPONSE_TEMPLATE = "{input}", "{context}", "{response}"


@dataclass(frozen=True)
class PromptContent:
    """What stands in a prompt besides a row's own input. Empty means not given; `few_shot_count` 0 means all."""

    system_prompt: str = ""
    input_template: str = INPUT_TEMPLATE
    context_template: str = CONTEXT_TEMPLATE
    response_template: str = RESPONSE_TEMPLATE
    few_shot_file: str = ""
    few_shot_count: int = 0


class Record(Protocol):
    """A row, whatever its shape in the file."""

    @property
    def input_text(self) -> str:
        """What the user says; not read in a chat row."""

    @property
    def output_text(self) -> str:
        """The reply; not read in a chat row."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """Texts that come before the input."""

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The turns of a chat row, its reply the last; empty in any other."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """The row as it is in the file, by name."""


@dataclass(frozen=True)
class PreparedContent:
    """Prompt content whose templates are parsed and whose example file is read."""

    system_prompt: str
    input_template: Template
    context_template: Template
    response_template: Template
    loom: PreparedLoom | None
    own_input_template: bool
    own_response_template: bool
    examples: tuple[Message, ...] = ()

    def build(self, record: Record) -> tuple[tuple[Message, ...], str]:
        """The messages of a row's prompt (system, examples, earlier turns, user), and its reply.

        Raises UserError for a marker without a value, a chat row without a reply, and a part of the row that is also set.
        """
        if record.messages:
            return self._chat(record)
        system, user = self._texts(record.input_text, record.contexts, record.columns)
        reply = self._reply(record.input_text, record.output_text, record.columns)
        return (*_system(system), *self.examples, {"role": "user", "content": user}), reply

    def _chat(self, record: Record) -> tuple[tuple[Message, ...], str]:
        """A chat row: what comes before its last reply is the prompt, whose last user turn is the input."""
        *turns, last = record.messages
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise UserError(
                f"The row's messages end with a message of {last['role']!r}"
                f"{' without text' if last['role'] == 'assistant' else ''}. Expected the assistant's reply."
            )
        own_system = turns[:1] if turns and turns[0]["role"] == "system" else []
        turns = turns[len(own_system) :]
        if turns and turns[-1]["role"] == "user" and isinstance(turns[-1].get("content"), str):
            input_text = turns[-1]["content"]
            system, user = self._texts(input_text, record.contexts, record.columns)
            turns[-1] = {**turns[-1], "content": user}
        elif record.contexts or self.loom or self.own_input_template:
            raise UserError(
                "The row's last message before the reply is no text of the user, so contexts, input_template and a word loom "
                "have no place in it."
            )
        else:
            input_text, system = "", self.system_prompt
        if system and own_system:
            other = "system_prompt" if self.system_prompt else _source(self.loom.system if self.loom else None)
            raise UserError(f"Two sources for the system message: the row's own messages and {other}. Expected one.")
        reply = self._reply(input_text, last["content"], record.columns)
        return (*(own_system or _system(system)), *self.examples, *turns), reply

    def _texts(self, input_text: str, contexts: Sequence[str], columns: Mapping[str, Any]) -> tuple[str, str]:
        """The system text and the user's text of a row."""
        if not contexts and self.loom is None and not self.own_input_template:
            return self.system_prompt, input_text
        joined = "\n\n".join(self.context_template.fill({**columns, "context": each}) for each in contexts)
        values = {**columns, "input": input_text, "context": joined}
        if self.loom is None:
            user = self.input_template.fill(values)
            named = "context" in self.input_template.markers
            return self.system_prompt, user if named else _paragraphs(joined, user)
        if input_text and not self.loom.row_markers:
            raise UserError(
                f"{self.loom.question.where}: no text of the word loom names {{input}} or a column, so every row would have the "
                "same prompt and lose its own input. Put {input} into the question."
            )
        parts = self.loom.parts(values)
        if joined and "context" not in self.loom.row_markers:
            if parts.context:
                raise UserError(
                    f"Two sources for the context: the row's own and {_source(self.loom.context)}. Expected one, or {{context}} "
                    "in the loom's text."
                )
            return parts.system or self.system_prompt, _paragraphs(joined, parts.question)
        return parts.system or self.system_prompt, _paragraphs(parts.context or "", parts.question)

    def _reply(self, input_text: str, output_text: str, columns: Mapping[str, Any]) -> str:
        if not self.own_response_template:
            return output_text
        return self.response_template.fill({**columns, "input": input_text, "response": output_text})


def build(record: Record, content: PromptContent, loom: PreparedLoom | None) -> tuple[tuple[Message, ...], str]:
    """The messages of one row's prompt and its reply. For many rows, `prepared_content` reads and checks once."""
    return prepared_content(content, loom).build(record)


def prepared_content(content: PromptContent, loom: PreparedLoom | None) -> PreparedContent:
    """The content, checked, parsed and read. Raises UserError as `check_sources` does, and for a bad example file."""
    check_sources(content, loom)
    prepared = PreparedContent(
        content.system_prompt,
        parsed(content.input_template, "input_template"),
        parsed(content.context_template, "context_template"),
        parsed(content.response_template, "response_template"),
        loom,
        content.input_template != INPUT_TEMPLATE,
        content.response_template != RESPONSE_TEMPLATE,
    )
    examples: list[Message] = []
    for example in few_shot_examples(Path(content.few_shot_file), content.few_shot_count) if content.few_shot_file else ():
        if isinstance(example, ExampleRow):
            examples += _example_turns(prepared, example)
        else:
            examples += example
    return replace(prepared, examples=tuple(examples))


def check_sources(content: PromptContent, loom: PreparedLoom | None) -> None:
    """Raise UserError, naming all conflicts: a part with two sources, or a template that cannot serve."""
    found: list[str] = []
    if loom is not None:
        for part, option, is_set, template in (
            ("the system message", "system_prompt", bool(content.system_prompt), loom.system),
            ("the context", "context_template", content.context_template != CONTEXT_TEMPLATE, loom.context),
            ("the user's text", "input_template", content.input_template != INPUT_TEMPLATE, loom.question),
        ):
            if is_set and template is not None:
                found.append(f"two sources for {part}: {option} and {_source(template)}")
        for template in (loom.system, loom.context, loom.question):
            if template is not None and "response" in template.markers - set(loom.values):
                found.append(f"{template.where} names {{response}}, which is the reply and is not known in a prompt")
    for option, needed, unknown in (
        ("input_template", "", "response"),
        ("context_template", "context", "response"),
        ("response_template", "", "context"),
    ):
        template = parsed(getattr(content, option), option)
        if not template.markers:
            found.append(f"{option} names no marker, so it would be the same in every row; expected as in {{{option[:-9]}}}")
        elif needed and needed not in template.markers:
            found.append(f"{option} does not name {{{needed}}}")
        if unknown in template.markers:
            found.append(f"{option} names {{{unknown}}}, which is not known there")
    if content.few_shot_count < 0:
        found.append(f"few_shot_count is {content.few_shot_count}; expected 0 (all of them) or more")
    if content.few_shot_count and not content.few_shot_file:
        found.append(f"few_shot_count is {content.few_shot_count}, but no few_shot_file is given")
    if found:
        raise UserError(f"Prompt content: {'; '.join(found)}.")


def _example_turns(prepared: PreparedContent, example: ExampleRow) -> list[Message]:
    """An example as a row would be written, so that templates and loom treat both alike."""
    try:
        _, user = prepared._texts(example.input_text, (), example.columns)
        reply = prepared._reply(example.input_text, example.output_text, example.columns)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    return [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]


def _source(template: Template | None) -> str:
    return f"the word loom ({template.where})" if template else "the word loom"


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)

"""Conversations from records and prompt settings: one function for training and for generation."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_dataflow.engine.chat import Conversation, Message
from finetune_dataflow.engine.prompting import (
    CONTEXT_TEMPLATE,
    INPUT_TEMPLATE,
    RESPONSE_TEMPLATE,
    PromptContent,
    prepared_content,
)
from finetune_dataflow.engine.settings import PromptSettings
from finetune_dataflow.engine.shapes import Record
from finetune_dataflow.errors import UserError
from finetune_dataflow.word_loom import LoomSettings, PreparedLoom, prepared_loom


def conversations(records: Iterable[Record], settings: PromptSettings) -> list[Conversation]:
    """Each record as the messages of its prompt and its reply; a text without an input has no messages.

    Raises UserError where one part of the prompt has two sources, or a template, loom or example file is wrong.
    """
    content = PromptContent(
        system_prompt=settings.system_prompt,
        input_template=settings.input_template or INPUT_TEMPLATE,
        context_template=settings.context_template or CONTEXT_TEMPLATE,
        response_template=settings.response_template or RESPONSE_TEMPLATE,
        few_shot_file=settings.few_shot_file,
        few_shot_count=settings.few_shot_count,
    )
    loom = _loom(settings)
    prepared = prepared_content(content, loom)
    made = []
    for record in records:
        if not record.input_text and not record.messages:
            made.append(Conversation(record.row, (), record.output_text))
        else:
            messages, reply = prepared.build(record)
            made.append(Conversation(record.row, tuple(messages), reply, tuple(record.tools)))
    return made


def prompt_messages(text: str, settings: PromptSettings) -> tuple[Message, ...]:
    """The messages of a prompt whose input is `text`, made as a row's are."""
    record = Record(0, text, "", (), (), (), {"input": text}, None, None)
    return conversations([record], settings)[0].prompt


def _loom(settings: PromptSettings) -> PreparedLoom | None:
    if settings.loom_file:
        return prepared_loom(
            LoomSettings(settings.loom_file, settings.build_prompt, settings.loom_markers, settings.loom_language)
        )
    unused = [name for name in ("build_prompt", "loom_markers", "loom_language") if getattr(settings, name)]
    if unused:
        raise UserError(f"{' and '.join(unused)} need{'s' if len(unused) == 1 else ''} a word loom. Name it in loom_file.")
    return None

"""Conversations from records and prompt settings: one function for training and for generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from finetune_dataflow.engine.chat import Conversation, Message
from finetune_dataflow.engine.code_versions import code_version
from finetune_dataflow.engine.many_rows import lines_fingerprint
from finetune_dataflow.engine.prompting import (
    CONTEXT_TEMPLATE,
    INPUT_TEMPLATE,
    RESPONSE_TEMPLATE,
    PreparedContent,
    PromptContent,
    prepared_content,
)
from finetune_dataflow.engine.records import OPTIONAL, each_record, lines
from finetune_dataflow.engine.settings import PromptSettings
from finetune_dataflow.engine.shapes import Record
from finetune_dataflow.errors import UserError
from finetune_dataflow.word_loom import LoomSettings, PreparedLoom, prepared_loom


class Conversations(Sequence[Conversation]):
    """The lines of a table as conversations, made when they are asked for; the table must not change meanwhile."""

    def __init__(self, rows: pd.DataFrame, settings: PromptSettings) -> None:
        """Raise UserError where one part of the prompt has two sources, or a template, loom or example file is wrong."""
        self._rows, self._settings = rows, settings
        self._prepared = _prepared(settings)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        """A conversation, or a list of some. Raises UserError for a row that lacks what a template names."""
        if isinstance(index, slice):
            return [conversation(record, self._prepared) for record in each_record(self._rows.iloc[index])]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self[index : index + 1 or None][0]

    def __iter__(self) -> Iterator[Conversation]:
        """Every conversation once, each made anew."""
        return (conversation(record, self._prepared) for record in each_record(self._rows))

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """The number of each conversation's row, int64 [n]."""
        return self._rows["row"].to_numpy(np.int64)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that the conversations are made of: the rows, and what is put around them."""
        names = [each for each in ("row", "input_text", "output_text", *OPTIONAL) if each in self._rows]
        code = code_version(conversation)  # which runs when a conversation is looked at, so it belongs to what this is
        return lines_fingerprint(lines(self._rows, names), asdict(self._settings), repr(self._prepared), code)


def conversation(record: Record, prepared: PreparedContent) -> Conversation:
    """A record as the messages of its prompt and its reply; a text without an input has no messages."""
    if not record.input_text and not record.messages:
        return Conversation(record.row, (), record.output_text)
    messages, reply = prepared.build(record)
    return Conversation(record.row, tuple(messages), reply, tuple(record.tools))


def conversations(records: Iterable[Record], settings: PromptSettings) -> list[Conversation]:
    """Each record as a conversation. Raises UserError as `Conversations` does, and for a row that lacks what is named."""
    prepared = _prepared(settings)
    return [conversation(record, prepared) for record in records]


def prompt_content(settings: PromptSettings) -> PromptContent:
    """What the settings say of a prompt's content, templates that are not given by default."""
    return PromptContent(
        system_prompt=settings.system_prompt,
        input_template=settings.input_template or INPUT_TEMPLATE,
        context_template=settings.context_template or CONTEXT_TEMPLATE,
        response_template=settings.response_template or RESPONSE_TEMPLATE,
        few_shot_file=settings.few_shot_file,
        few_shot_count=settings.few_shot_count,
    )


def _prepared(settings: PromptSettings) -> PreparedContent:
    return prepared_content(prompt_content(settings), _loom(settings))


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

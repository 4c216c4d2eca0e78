"""From records to conversations: content first, then the template that wraps it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from hamilton.function_modifiers import parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.chat import Conversation
from finetune_dataflow.engine.settings import PromptSettings


def prompt_settings(
    system_prompt: str = "",
    prompt_format: str = "",
    input_template: str = "",
    context_template: str = "",
    response_template: str = "",
    few_shot_file: str = "",
    few_shot_count: int = 0,
    loom_file: str = "",
    build_prompt: str = "",
    loom_markers: str = "",
    loom_language: str = "",
) -> PromptSettings:
    """What stands in a prompt besides a row's own texts, and how the result is wrapped.

    Inputs:
        system_prompt: The system message of every conversation; empty leaves it to the template.
        prompt_format: How a conversation is written: empty for the tokenizer's chat template, a named format (docs/prompts.md),
            or a Jinja file.
        input_template: The user's message, with {input}, {context} or a {column} of the row in it.
        context_template: How each context is written, with {context} in it.
        response_template: The reply, with {response} in it.
        few_shot_file: A JSON or JSON lines file of examples, put before every question as earlier turns.
        few_shot_count: How many of the examples are used; 0 for all.
        loom_file: A word loom (OgbujiPT, TOML) that holds the prompt's texts.
        build_prompt: The loom's tables that make the prompt: one, two or three names.
        loom_markers: What the loom's markers stand for, as name=[value]; a value may be a column's name in braces.
        loom_language: The language to take the loom's texts in.
    """
    return PromptSettings(
        system_prompt=system_prompt,
        prompt_format=prompt_format,
        input_template=input_template,
        context_template=context_template,
        response_template=response_template,
        few_shot_file=few_shot_file,
        few_shot_count=few_shot_count,
        loom_file=loom_file,
        build_prompt=build_prompt,
        loom_markers=loom_markers,
        loom_language=loom_language,
    )


@computed_anew
def chat_template(prompt_settings: PromptSettings) -> str:
    """The Jinja template that wraps a conversation in place of the tokenizer's own; empty for the tokenizer's."""
    return engine.formats.template(prompt_settings.prompt_format) if prompt_settings.prompt_format else ""


@computed_anew
@parameterize(
    train_conversations={"rows": source("train_set")},
    validation_conversations={"rows": source("validation_set")},
    hold_out_conversations={"rows": source("hold_out_set")},
)
def conversations(rows: pd.DataFrame, prompt_settings: PromptSettings) -> Sequence[Conversation]:
    """The rows of {rows} as conversations, each made when it is asked for: the prompt's messages, and the reply to learn."""
    return engine.content.Conversations(rows, prompt_settings)

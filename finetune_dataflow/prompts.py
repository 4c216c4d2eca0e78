"""From records to conversations: what the user says, what the assistant replies, and a system prompt where one is given."""

from __future__ import annotations

import pandas as pd
from hamilton.function_modifiers import parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.engine.settings import PromptSettings


def prompt_settings(system_prompt: str = "") -> PromptSettings:
    """What stands in a prompt besides the row's input text.

    Inputs:
        system_prompt: The system message of every conversation; empty leaves it to the tokenizer's chat template.
    """
    return PromptSettings(system_prompt)


@parameterize(
    train_conversations={"rows": source("train_set")},
    validation_conversations={"rows": source("validation_set")},
    hold_out_conversations={"rows": source("hold_out_set")},
)
def conversations(rows: pd.DataFrame, prompt_settings: PromptSettings) -> list[engine.chat.Conversation]:
    """The rows of {rows} as conversations: the messages of the prompt, and the reply that is learned."""
    system = [{"role": "system", "content": prompt_settings.system_prompt}] if prompt_settings.system_prompt else []
    return [
        engine.chat.Conversation(row, (*system, {"role": "user", "content": input_text}), output_text)
        for row, input_text, output_text in rows[["row", "input_text", "output_text"]].itertuples(index=False)
    ]

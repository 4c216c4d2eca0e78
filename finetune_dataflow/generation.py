"""From prompts to replies: base and tuned model answer the same prompts, batched and greedy."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from hamilton.function_modifiers import parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.engine.replies import PromptReply
from finetune_dataflow.engine.settings import GenerationSettings, PromptSettings
from finetune_dataflow.engine.tokens import TokenColumns


def generation_settings(max_tokens: int = 100, generation_batch_size: int = 32) -> GenerationSettings:
    """How replies are generated for the evaluation.

    Inputs:
        max_tokens: The most tokens of a generated reply.
        generation_batch_size: How many prompts are answered side by side.
    """
    return GenerationSettings(max_tokens, generation_batch_size)


@parameterize(
    validation_base_replies={"tokens": source("validation_tokens")},
    hold_out_base_replies={"tokens": source("hold_out_tokens")},
)
def base_replies(
    tokens: TokenColumns, base_model_path: Path, chat_template: str, generation_settings: GenerationSettings
) -> list[str]:
    """The base model's greedy reply to each prompt of {tokens}."""
    return _replies(tokens, base_model_path, chat_template, None, generation_settings)


@parameterize(
    validation_tuned_replies={"tokens": source("validation_tokens")},
    hold_out_tuned_replies={"tokens": source("hold_out_tokens")},
)
def tuned_replies(
    tokens: TokenColumns,
    base_model_path: Path,
    chat_template: str,
    evaluated_adapter: Path,
    generation_settings: GenerationSettings,
) -> list[str]:
    """The tuned model's greedy reply to each prompt of {tokens}."""
    return _replies(tokens, base_model_path, chat_template, evaluated_adapter, generation_settings)


def _replies(
    tokens: TokenColumns, base_model_path: Path, chat_template: str, adapter: Path | None, settings: GenerationSettings
) -> list[str]:
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    prompts = [tokens.prompt(index) for index in range(len(tokens))]
    replies = engine.generation.greedy_replies(base_model_path, adapter, prompts, encoder, settings)
    return [encoder.reply_text(reply.token_ids) for reply in replies]


@parameterize(
    validation_rows={"rows": source("validation_set"), "tokens": source("validation_tokens")},
    hold_out_rows={"rows": source("hold_out_set"), "tokens": source("hold_out_tokens")},
)
def used_rows(rows: pd.DataFrame, tokens: TokenColumns) -> pd.DataFrame:
    """The records of {rows} that are used, in the order of their tokens: row, input_text, output_text."""
    return rows.set_index("row").loc[tokens.rows].reset_index()


def prompt_reply(
    base_model_path: Path,
    evaluated_adapter: Path,
    chat_template: str,
    prompt_settings: PromptSettings,
    generation_settings: GenerationSettings,
    prompt: str = "",
    colorize: bool = False,
) -> PromptReply | None:
    """The tuned model's greedy reply to a prompt of the user's own; None where there is none.

    Inputs:
        prompt: A question that the tuned model answers at the end, wrapped as the rows are.
        colorize: Whether each token of that reply is shown in the colour of its probability, on a terminal.
    """
    if not prompt:
        return None
    messages = engine.content.prompt_messages(prompt, prompt_settings)
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    model = engine.models.load_model(base_model_path, evaluated_adapter)
    sampling = engine.streaming.SamplingSettings(max_tokens=generation_settings.max_tokens)
    return PromptReply(prompt, tuple(engine.streaming.stream(model, encoder, encoder.prompt_ids(messages), sampling)), colorize)


def hold_out_set_predictions(hold_out_rows: pd.DataFrame, hold_out_tuned_replies: list[str]) -> list[tuple[str, str]]:
    """The tuned model's prediction for every hold-out row: (input text as in the file, prediction)."""
    return list(zip(hold_out_rows["input_text"], hold_out_tuned_replies, strict=True))


def finetuned_model_on_validation_set(validation_rows: pd.DataFrame, validation_tuned_replies: list[str]) -> dict[str, list[str]]:
    """The tuned model's replies to the validation prompts, `validation_predictions`, and the file's, `validation_references`."""
    return {
        "validation_predictions": validation_tuned_replies,
        "validation_references": validation_rows["output_text"].tolist(),
    }

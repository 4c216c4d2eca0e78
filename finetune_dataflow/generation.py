"""From prompts to replies: base and tuned model answer the same prompts, batched, greedy unless sampling is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from hamilton.function_modifiers import parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.replies import PromptReply
from finetune_dataflow.engine.settings import GenerationSettings, PromptSettings, SplitSettings
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.engine.user_cache import user_cache_directory


def generation_settings(
    split_settings: SplitSettings,
    max_tokens: int = 100,
    generation_batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> GenerationSettings:
    """How replies are generated for the evaluation.

    Inputs:
        max_tokens: The most tokens of a generated reply.
        generation_batch_size: How many prompts are answered side by side.
        temperature: 0 for the most probable token every time; above, tokens are drawn, seeded by random_state.
        top_p: Tokens are drawn from those that together have this share of the probability; 1 for all.
        top_k: Tokens are drawn from so many of the most probable ones; 0 for all.
        min_p: Tokens are drawn from those with at least this share of the highest probability.
    """
    seed = split_settings.random_state if temperature else 0
    return GenerationSettings(max_tokens, generation_batch_size, temperature, top_p, top_k, min_p, seed)


@computed_anew
def reply_store(reuse_replies: bool = True) -> Path | None:
    """Where replies are kept as they are generated, in the user's cache directory: a killed evaluation goes on where it was.

    Later runs with the same model, prompts and decoding find them, so that a base model answers once.

    Inputs:
        reuse_replies: Whether replies of earlier runs are used, and those of this one kept for later ones.
    """
    return engine.files.Location(user_cache_directory() / "replies") if reuse_replies else None


@parameterize(
    validation_base_replies={"tokens": source("validation_tokens")},
    hold_out_base_replies={"tokens": source("hold_out_tokens")},
)
def base_replies(
    tokens: TokenColumns,
    base_model_path: Path,
    base_model_fingerprint: str,
    chat_template: str,
    generation_settings: GenerationSettings,
    reply_store: Path | None,
) -> pd.DataFrame:
    """The base model's reply to each prompt of {tokens}: reply, tokens, ended (by itself, within max_tokens)."""
    return _replies(tokens, base_model_path, base_model_fingerprint, chat_template, None, generation_settings, reply_store)


@parameterize(
    validation_tuned_replies={"tokens": source("validation_tokens")},
    hold_out_tuned_replies={"tokens": source("hold_out_tokens")},
)
def tuned_replies(
    tokens: TokenColumns,
    base_model_path: Path,
    base_model_fingerprint: str,
    chat_template: str,
    evaluated_adapter: Path,
    generation_settings: GenerationSettings,
    reply_store: Path | None,
) -> pd.DataFrame:
    """The tuned model's reply to each prompt of {tokens}: reply, tokens, ended (by itself, within max_tokens)."""
    adapter = evaluated_adapter
    return _replies(tokens, base_model_path, base_model_fingerprint, chat_template, adapter, generation_settings, reply_store)


def _replies(
    tokens: TokenColumns,
    base_model_path: Path,
    base_model_fingerprint: str,
    chat_template: str,
    adapter: Path | None,
    settings: GenerationSettings,
    kept_in: Path | None,
) -> pd.DataFrame:
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    prompts = [tokens.prompt(index) for index in range(len(tokens))]
    tuned = engine.adapters.adapter_fingerprint(adapter) if adapter else ""
    with ExitStack() as opened:
        store = None
        if kept_in is not None:
            key = engine.generation.store_key(base_model_fingerprint, tuned, encoder, settings)
            store = opened.enter_context(engine.reply_store.ReplyStore.opened(kept_in, key))
        found = engine.generation.replies(base_model_path, adapter, prompts, encoder, settings, store)
    return pd.DataFrame(
        {
            "reply": [encoder.reply_text(each.token_ids) for each in found],
            "tokens": [len(each.token_ids) for each in found],
            "ended": [each.ended for each in found],
        }
    )


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
    """The tuned model's reply to a prompt of the user's own; None where there is none.

    Inputs:
        prompt: A question that the tuned model answers at the end, wrapped as the rows are.
        colorize: Whether each token of that reply is shown in the colour of its probability, on a terminal.
    """
    if not prompt:
        return None
    messages = engine.content.prompt_messages(prompt, prompt_settings)
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    model = engine.models.load_model(base_model_path, evaluated_adapter)
    chosen = generation_settings
    sampling = engine.streaming.SamplingSettings(
        chosen.max_tokens, chosen.temperature, chosen.top_p, chosen.min_p, top_k=chosen.top_k, random_state=chosen.random_state
    )
    return PromptReply(prompt, tuple(engine.streaming.stream(model, encoder, encoder.prompt_ids(messages), sampling)), colorize)


def hold_out_set_predictions(hold_out_rows: pd.DataFrame, hold_out_tuned_replies: pd.DataFrame) -> list[tuple[str, str]]:
    """The tuned model's prediction for every hold-out row: (input text as in the file, prediction)."""
    return list(zip(hold_out_rows["input_text"], hold_out_tuned_replies["reply"], strict=True))


def finetuned_model_on_validation_set(
    validation_rows: pd.DataFrame, validation_tuned_replies: pd.DataFrame
) -> dict[str, list[str]]:
    """The tuned model's replies to the validation prompts, `validation_predictions`, and the file's, `validation_references`."""
    return {
        "validation_predictions": validation_tuned_replies["reply"].tolist(),
        "validation_references": validation_rows["output_text"].tolist(),
    }

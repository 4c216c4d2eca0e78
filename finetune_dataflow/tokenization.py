"""From conversations to token ids and labels: the prompt masked, the reply and its end of turn learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from hamilton.function_modifiers import parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.engine.chat import Conversation
from finetune_dataflow.engine.quality import QualityReport
from finetune_dataflow.engine.settings import TokenizationSettings
from finetune_dataflow.engine.shapes import ShapedRows
from finetune_dataflow.engine.tokens import DroppedRow, TokenColumns
from finetune_dataflow.errors import UserError


def tokenization_settings(
    max_seq_length: int = 512,
    long_rows: str = "truncate_prompt",
    mask_prompt: bool = True,
    train_type: str = "completion-only",
    assistant_turns: str = "every",
) -> TokenizationSettings:
    """How long a row may be, what becomes of a longer one, and which tokens are learned.

    Inputs:
        max_seq_length: The most tokens a row may have, prompt and reply together.
        long_rows: What becomes of a longer row: truncate_prompt (cut the beginning of its input text), drop, or error.
        mask_prompt: Whether the prompt is left out of what is learned.
        train_type: completion-only (the reply to a prompt), or self-supervised (the output text alone, without a prompt).
        assistant_turns: Which replies of a conversation are learned: every, or last.
    """
    return TokenizationSettings(max_seq_length, long_rows, mask_prompt, train_type, assistant_turns)


@parameterize(
    train_tokens={"conversations": source("train_conversations")},
    validation_tokens={"conversations": source("validation_conversations")},
    hold_out_tokens={"conversations": source("hold_out_conversations")},
)
def set_tokens(
    conversations: Sequence[Conversation], base_model_path: Path, chat_template: str, tokenization_settings: TokenizationSettings
) -> TokenColumns:
    """The token columns of {conversations}: flat ids, labels (-100 on the prompt), and the length of each prompt.

    Prompt and reply are tokenised apart and joined, so the prompt's ids are exactly those that generation is fed. Text that
    looks like a control string becomes plain text. Of 50,000 rows or more the columns are files in the user's cache, read
    through memory maps, and made once. Raises UserError for long rows under long_rows="error".
    """
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    settings = tokenization_settings
    limits = settings.max_seq_length, settings.long_rows, settings.learned
    if isinstance(conversations, engine.content.Conversations) and len(conversations) >= engine.shards.FEWEST_ROWS:
        tokens = engine.shards.prepared(
            [conversations.fingerprint(), encoder.fingerprint(), asdict(settings), engine.batch_encoding.code_fingerprint()],
            lambda: engine.chat.encoded_parts(encoder, conversations, *limits),
        )
    else:
        tokens = engine.chat.encode_conversations(encoder, conversations, *limits)
    if len(tokens) == 0:
        raise UserError(
            f"All {len(conversations)} rows of a set are longer than max_seq_length={settings.max_seq_length} tokens, "
            "prompt and reply together. Raise max_seq_length."
        )
    return tokens


def row_ledger(
    records: pd.DataFrame,
    shaped_rows: ShapedRows,
    row_sides: pd.Series,
    leaking_rows: list[DroppedRow],
    data_quality: QualityReport,
    train_set: pd.DataFrame,
    validation_set: pd.DataFrame,
    hold_out_set: pd.DataFrame,
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    hold_out_tokens: TokenColumns,
) -> pd.DataFrame:
    """Every row of the data file and what became of it; rows in == used + dropped, or it raises AssertionError.

    Columns: row, set, status ("used" or "dropped"), reason, truncated, prompt_tokens, reply_tokens, remarks (of data quality).
    """
    return engine.ledger.row_ledger(
        records["row"],
        row_sides,
        [*shaped_rows.dropped, *leaking_rows],
        data_quality.by_row(),
        {
            "train": (train_set["row"], train_tokens),
            "validation": (validation_set["row"], validation_tokens),
            "hold_out": (hold_out_set["row"], hold_out_tokens),
        },
    )

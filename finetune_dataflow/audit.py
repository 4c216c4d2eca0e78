"""Before anything is trained: the quality of the data, and the labels looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from finetune_dataflow import engine
from finetune_dataflow.engine.audit import LabelAudit
from finetune_dataflow.engine.chat import Conversation
from finetune_dataflow.engine.quality import QualityReport
from finetune_dataflow.engine.tokens import TokenColumns


def data_quality(records: pd.DataFrame, base_model_path: Path, chat_template: str, strict: bool = False) -> QualityReport:
    """What is odd in the data: duplicates, one input with two outputs, outliers in length, control strings, encodings.

    Inputs:
        strict: Whether a warning about the data stops the run.

    Raises UserError with all warnings where `strict` is set.
    """
    control_strings = engine.chat.load_encoder(base_model_path, chat_template).control_strings
    report = engine.quality.data_quality(records, control_strings)
    report.raise_if_strict(strict)
    return report


def label_audit(
    train_conversations: Sequence[Conversation],
    validation_conversations: Sequence[Conversation],
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    base_model_path: Path,
    chat_template: str,
    data_quality: QualityReport,
) -> LabelAudit:
    """What is learned of the training and the validation set, in figures, and three rows decoded with what is learned marked.

    It takes the data's quality so that a strict run stops there. Raises UserError naming the rows without a supervised token,
    without a learned end of turn, or with another prompt than generation is fed.
    """
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    sets = {
        "train": (train_conversations, train_tokens),
        "validation": (validation_conversations, validation_tokens),
    }
    return engine.audit.label_audit(encoder, sets)


def hold_out_audit(
    hold_out_conversations: Sequence[Conversation], hold_out_tokens: TokenColumns, base_model_path: Path, chat_template: str
) -> LabelAudit:
    """The same of the hold-out, apart, because nothing before the verdict may depend on it."""
    encoder = engine.chat.load_encoder(base_model_path, chat_template)
    return engine.audit.label_audit(encoder, {"hold_out": (hold_out_conversations, hold_out_tokens)})

"""Cross-entropy over supervised tokens, in nats."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd

from finetune_dataflow.engine.batches import Batch, in_order
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.progress import progress
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns


def token_losses(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """The loss of every target, float32 [rows, width]; zero where the target is -100, so padding never counts."""
    learned = targets != IGNORED
    losses = nn.losses.cross_entropy(model(inputs).astype(mx.float32), mx.where(learned, targets, 0))
    return losses * learned


def row_losses(model: nn.Module, batch: Batch) -> mx.array:
    """The summed loss of each row of a batch, float32 [batch_size]; rows that only pad give zero."""
    return token_losses(model, mx.array(batch.inputs), mx.array(batch.targets)).sum(axis=1)


def mean_loss(model: nn.Module, columns: TokenColumns, batch_size: int) -> float:
    """The token-weighted mean loss over all rows, in nats per supervised token."""
    was_training = model.training
    model.eval()
    total, supervised = 0.0, 0
    for batch in in_order(columns, batch_size):
        total += row_losses(model, batch).sum().item()
        supervised += batch.supervised
    model.train(was_training)
    return total / supervised


def losses_by_row(
    base_model_path: Path, adapter_path: Path | None, columns: TokenColumns, batch_size: int = 8
) -> pd.DataFrame:
    """The loss of each row under the base model, or under the tuned one where an adapter is given.

    Columns: row, loss (nats, summed over its supervised tokens), supervised_tokens; in the order of `columns`.
    """
    model = load_model(base_model_path, adapter_path)
    losses = np.zeros(len(columns))
    for batch in progress(list(in_order(columns, batch_size)), "tuned loss" if adapter_path else "base loss"):
        losses[list(batch.indices)] = np.array(row_losses(model, batch))[: len(batch.indices)]
    supervised = [int((columns.row_labels(index)[1:] != IGNORED).sum()) for index in range(len(columns))]
    return pd.DataFrame({"row": columns.rows, "loss": losses, "supervised_tokens": supervised})

"""Cross-entropy over supervised tokens, in nats."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
from mlx.utils import tree_flatten

from finetune_dataflow.engine.batches import Batch, in_order
from finetune_dataflow.engine.heads import gathering, output_head
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.progress import progress
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)


def token_losses(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """The loss of every target, float32 [rows, width]; zero where the target is -100, so padding never counts."""
    learned = targets != IGNORED
    losses = nn.losses.cross_entropy(model(inputs).astype(mx.float32), mx.where(learned, targets, 0))
    return losses * learned


def row_losses(model: nn.Module, batch: Batch) -> mx.array:
    """The summed loss of each row of a batch, float32 [batch_size]; rows that only pad give zero."""
    return token_losses(model, mx.array(batch.inputs), mx.array(batch.targets)).sum(axis=1)


@dataclass(frozen=True)
class LossPath:
    """How the mean loss of a batch is computed: over gathered positions where `head` is given, else over all.

    `reason` says why, for the log and the run's record.
    """

    head: tuple[nn.Module, str] | None
    reason: str

    @classmethod
    def again(cls, model: nn.Module, gathered: bool, reason: str) -> LossPath:
        """The path that a fit took before it was interrupted: it must not change on the way."""
        return cls(output_head(model) if gathered else None, reason)

    def mean_loss(self, model: nn.Module, batch: Batch) -> mx.array:
        """The mean loss over the supervised targets of a batch, in nats: what the fit descends."""
        inputs = mx.array(batch.inputs)
        if self.head is None:
            return token_losses(model, inputs, mx.array(batch.targets)).sum() / batch.supervised
        labels = mx.array(batch.labels)
        learned = labels != IGNORED
        with gathering(self.head, mx.array(batch.positions)):
            logits = model(inputs)[0].astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.where(learned, labels, 0))
        return (losses * learned).sum() / batch.supervised


PLAIN = LossPath(None, "the plain path")


def proven_path(model: nn.Module, batch: Batch) -> LossPath:
    """The path over gathered positions where its loss and gradient on `batch` equal the plain path's, else the plain one.

    Equal means within 1e-4 of the loss and of the gradient's norm in float32, 2e-2 in half precision.
    """
    head = output_head(model)
    if head is None:
        return _plain_because("this model's output head was not found")
    gathered = LossPath(head, "the output head runs on supervised positions only, proven equal on the first batch")
    tolerance = 1e-4 if all(each.dtype == mx.float32 for each in _floating(model.trainable_parameters())) else 2e-2
    plain_loss, plain_gradient = nn.value_and_grad(model, PLAIN.mean_loss)(model, batch)
    mx.eval(plain_loss, plain_gradient)
    try:
        loss, gradient = nn.value_and_grad(model, gathered.mean_loss)(model, batch)
        mx.eval(loss, gradient)
    except (ValueError, IndexError, TypeError) as error:
        return _plain_because(f"this model does not take gathered positions ({error})")
    difference = abs(float(loss) - float(plain_loss))
    if not difference <= tolerance * abs(float(plain_loss)):
        return _plain_because(f"the loss over gathered positions differs by {difference:.2g}")
    apart = _norm([one - other for one, other in zip(_floating(gradient), _floating(plain_gradient), strict=True)])
    size = _norm(_floating(plain_gradient))
    if not apart <= tolerance * size:
        return _plain_because(f"the gradient over gathered positions differs by {apart / size:.2g} of its norm")
    return gathered


def mean_loss(model: nn.Module, columns: TokenColumns, batch_size: int, path: LossPath = PLAIN) -> float:
    """The token-weighted mean loss over all rows, in nats per supervised token."""
    was_training = model.training
    model.eval()
    total, supervised = 0.0, 0
    for batch in in_order(columns, batch_size):
        total += float(path.mean_loss(model, batch)) * batch.supervised
        supervised += batch.supervised
    model.train(was_training)
    return total / supervised


def losses_by_row(base_model_path: Path, adapter_path: Path | None, columns: TokenColumns, batch_size: int = 8) -> pd.DataFrame:
    """The loss of each row under the base model, or under the tuned one where an adapter is given.

    Columns: row, loss (nats, summed over its supervised tokens), supervised_tokens; in the order of `columns`.
    """
    model = load_model(base_model_path, adapter_path)
    losses = np.zeros(len(columns))
    for batch in progress(list(in_order(columns, batch_size)), "tuned loss" if adapter_path else "base loss"):
        losses[list(batch.indices)] = np.array(row_losses(model, batch))[: len(batch.indices)]
    if not np.isfinite(losses).all():
        rows = ", ".join(map(str, columns.rows[~np.isfinite(losses)][:10]))
        who = f"model with the adapter in {adapter_path}" if adapter_path else f"model in {base_model_path}"
        raise UserError(f"The {who} has a loss that is not finite on rows {rows}. Its weights are damaged, or too large.")
    supervised = [int((columns.row_labels(index)[1:] != IGNORED).sum()) for index in range(len(columns))]
    return pd.DataFrame({"row": columns.rows, "loss": losses, "supervised_tokens": supervised})


def _plain_because(reason: str) -> LossPath:
    logger.warning("The fit computes the output head on every position: %s. It is slower, and exact.", reason)
    return LossPath(None, reason)


def _floating(tree: dict[str, Any]) -> list[mx.array]:
    leaves = cast(list[tuple[str, mx.array]], tree_flatten(tree))
    return [each for _, each in leaves if mx.issubdtype(each.dtype, mx.floating)]


def _norm(arrays: list[mx.array]) -> float:
    return math.sqrt(sum(float(np.square(np.array(each.astype(mx.float32))).sum()) for each in arrays))

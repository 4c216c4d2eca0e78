"""Cross-entropy over supervised tokens, in nats."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
from mlx.utils import tree_flatten

from finetune_dataflow.engine.batches import Batch, in_order
from finetune_dataflow.engine.crew import Crew, crew_size
from finetune_dataflow.engine.exponentials import as_powers, cross_entropy, usable
from finetune_dataflow.engine.heads import gathering, output_head
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.packing import forward
from finetune_dataflow.engine.prefix_states import PrefixStates, starting_after
from finetune_dataflow.engine.progress import progress
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns
from finetune_dataflow.errors import UserError


def token_losses(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """The loss of every target, float32 [rows, width]; zero where the target is -100, so padding never counts."""
    return _losses(model(inputs).astype(mx.float32), targets)


def _losses(logits: mx.array, targets: mx.array) -> mx.array:
    learned = targets != IGNORED
    return nn.losses.cross_entropy(logits, mx.where(learned, targets, 0)) * learned


def row_losses(model: nn.Module, batch: Batch) -> mx.array:
    """The summed loss of each row of a batch, float32 [batch_size]; rows that only pad give zero."""
    return token_losses(model, mx.array(batch.inputs), mx.array(batch.targets)).sum(axis=1)


def gathered_row_losses(model: nn.Module, batch: Batch) -> mx.array:
    """As `row_losses`, with the output head on supervised positions only. Raises ValueError where the head is not known."""
    head = output_head(model)
    if head is None:
        raise ValueError("this model's output head was not found")
    with gathering(head, mx.array(batch.positions)):
        logits = model(mx.array(batch.inputs))[0].astype(mx.float32)
    labels = mx.array(batch.labels)
    learned = labels != IGNORED
    losses = cross_entropy(logits, mx.where(learned, labels, 0)) * learned
    lines, width = batch.inputs.shape
    return mx.zeros(lines).at[mx.array(batch.positions) // width].add(losses)


def _proven_row_losses(model: nn.Module, batch: Batch) -> tuple[Callable[[nn.Module, Batch], mx.array], bool]:
    """How row losses are computed on this model, and whether with exponentials as powers of two: fast where that is equal.

    Equal means within 1e-4 of the plain losses of the batch, 2e-2 in half precision.
    """
    plain = np.array(row_losses(model, batch))
    tolerance = 1e-4 if model_dtype(model) == mx.float32 else 2e-2
    try:
        with as_powers(usable()):
            fast = np.array(gathered_row_losses(model, batch))
    except (ValueError, IndexError, TypeError, RuntimeError):
        return row_losses, False
    equal = np.allclose(fast, plain, rtol=tolerance, atol=tolerance)
    return (gathered_row_losses, usable()) if equal else (row_losses, False)


def model_dtype(model: nn.Module) -> mx.Dtype:
    """The type that a model computes in: half precision where one of its weights has it, whatever adapters are kept in."""
    leaves = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return next((each.dtype for _, each in leaves if each.dtype in (mx.bfloat16, mx.float16)), mx.float32)


@dataclass(frozen=True)
class LossPath:
    """How the mean loss of a batch is computed.

    gathered: the output head runs on supervised positions only. exponentials: they are computed as powers of two
    (`engine.exponentials`). prefix: the first so many layers are not computed where a batch brings their states. packing:
    several rows may share a line. The plain path does none of these. `reason` says why, for the log and the run's record.
    """

    gathered: bool = False
    exponentials: bool = False
    prefix: int = 0
    packing: bool = False
    reason: str = ""

    def mean_loss(self, model: nn.Module, batch: Batch) -> mx.array:
        """The mean loss over the supervised targets of a batch, in nats: what the fit descends."""
        inputs = mx.array(batch.inputs)
        segments = None if batch.segments is None else mx.array(batch.segments)
        with ExitStack() as exchanged:
            if self.prefix and batch.states is not None:
                exchanged.enter_context(starting_after(model, self.prefix, batch.states))
            if not self.gathered:
                logits = forward(model, inputs, segments).astype(mx.float32)
                return _losses(logits, mx.array(batch.targets)).sum() / batch.supervised
            head = output_head(model)
            assert head is not None
            exchanged.enter_context(gathering(head, mx.array(batch.positions)))
            logits = forward(model, inputs, segments)[0].astype(mx.float32)
        labels = mx.array(batch.labels)
        learned = labels != IGNORED
        losses = cross_entropy(logits, mx.where(learned, labels, 0))
        return (losses * learned).sum() / batch.supervised


PLAIN = LossPath(reason="the plain path")


def mean_loss(
    model: nn.Module, columns: TokenColumns, batch_size: int, path: LossPath = PLAIN, states: PrefixStates | None = None
) -> float:
    """The token-weighted mean loss over all rows, in nats per supervised token."""
    with Crew(model, crew_size(model, 1 if path == PLAIN else batch_size)) as crew, as_powers(path.exponentials):
        return crew_loss(crew, columns, batch_size, path, states)


def crew_loss(crew: Crew, columns: TokenColumns, batch_size: int, path: LossPath, states: PrefixStates | None = None) -> float:
    """As `mean_loss`, by a crew that is there already, and with exponentials as they are."""
    total, supervised = summed_loss(crew, columns, batch_size, path, states)
    return total / supervised


def summed_loss(
    crew: Crew,
    columns: TokenColumns,
    batch_size: int,
    path: LossPath,
    states: PrefixStates | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[float, int]:
    """The summed loss and the supervised tokens of a rank's share of the rows, as `crew_loss` computes them."""
    was_training = crew.model.training
    crew.train(False)

    def weighted(model: nn.Module, current: Batch) -> tuple[float, int]:
        return float(path.mean_loss(model, current)) * current.supervised, current.supervised

    batches = in_order(columns, max(1, batch_size // crew.size), rank, ranks)
    every = (each if states is None else states.given(each) for each in batches)
    total, supervised = 0.0, 0
    for loss, learned in crew.map(weighted, every):
        total, supervised = total + loss, supervised + learned
    crew.train(was_training)
    return total, supervised


def losses_by_row(base_model_path: Path, adapter_path: Path | None, columns: TokenColumns, batch_size: int = 8) -> pd.DataFrame:
    """The loss of each row under the base model, or under the tuned one where an adapter is given.

    Columns: row, loss (nats, summed over its supervised tokens), supervised_tokens; in the order of `columns`.
    """
    model = load_model(base_model_path, adapter_path)
    losses = np.zeros(len(columns))
    function, exponentials = _proven_row_losses(model, next(in_order(columns.take(range(min(4, len(columns)))), batch_size)))
    description = "tuned loss" if adapter_path else "base loss"
    with Crew(model, crew_size(model, batch_size)) as crew, as_powers(exponentials):
        batches = list(in_order(columns, max(1, batch_size // crew.size)))
        found = crew.map(lambda view, current: (current, np.array(function(view, current))), batches)
        for (current, of_rows), _ in zip(found, progress(batches, description), strict=True):
            losses[list(current.indices)] = of_rows[: len(current.indices)]
    if not np.isfinite(losses).all():
        rows = ", ".join(map(str, columns.rows[~np.isfinite(losses)][:10]))
        who = f"model with the adapter in {adapter_path}" if adapter_path else f"model in {base_model_path}"
        raise UserError(f"The {who} has a loss that is not finite on rows {rows}. Its weights are damaged, or too large.")
    supervised = [int((columns.row_labels(index)[1:] != IGNORED).sum()) for index in range(len(columns))]
    return pd.DataFrame({"row": columns.rows, "loss": losses, "supervised_tokens": supervised})

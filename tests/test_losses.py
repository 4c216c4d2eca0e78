from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from finetune_dataflow.engine import losses
from finetune_dataflow.engine.batches import Batch, batch, widths
from finetune_dataflow.engine.losses import LossPath, losses_by_row, mean_loss, row_losses, token_losses
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns


@pytest.fixture
def columns() -> TokenColumns:
    """Five rows of different lengths, prompts and replies."""
    generator = np.random.default_rng(3)
    lengths = [(4, 3), (9, 1), (2, 12), (7, 7), (20, 5)]
    return token_columns(
        [
            EncodedRow(row, generator.integers(0, 250, prompt).tolist(), generator.integers(0, 250, reply).tolist())
            for row, (prompt, reply) in enumerate(lengths, start=1)
        ]
    )


def plain_losses(model: nn.Module, columns: TokenColumns, index: int) -> list[mx.array]:
    """The loss of every supervised token of one row, token by token, without batches, masks or padding."""
    ids = columns.row_ids(index).tolist()
    logits = model(mx.array([ids[:-1]]))[0]
    return [
        mx.logsumexp(logits[place - 1]) - logits[place - 1, ids[place]]
        for place in range(int(columns.prompt_lengths[index]), len(ids))
    ]


def path_of(kind: str) -> LossPath:
    return LossPath(gathered=kind == "gathered")


@pytest.mark.parametrize("kind", ["plain", "gathered"])
def test_the_loss_of_a_batch_is_the_mean_over_the_supervised_tokens_of_single_rows(
    kind: str, tiny_model: Path, columns: TokenColumns
) -> None:
    model = load_model(tiny_model)
    single = [loss.item() for index in range(5) for loss in plain_losses(model, columns, index)]
    made = batch(columns, [0, 1, 2, 3, 4], 8, widths(columns.lengths))
    together = path_of(kind).mean_loss(model, made).item()
    assert len(single) == 28
    assert together == pytest.approx(np.mean(single), rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "gathered"])
def test_the_gradient_of_a_batch_is_that_of_the_plain_loop_over_single_rows(
    kind: str, tiny_model: Path, columns: TokenColumns
) -> None:
    model = load_model(tiny_model)

    def plain(model: nn.Module) -> mx.array:
        losses = [loss for index in range(5) for loss in plain_losses(model, columns, index)]
        return mx.stack(losses).mean()

    made = batch(columns, [4, 1, 0, 3, 2], 8, widths(columns.lengths))
    _, expected = nn.value_and_grad(model, plain)(model)
    _, found = nn.value_and_grad(model, path_of(kind).mean_loss)(model, made)
    wanted, given = (dict(cast(list[tuple[str, mx.array]], tree_flatten(tree))) for tree in (expected, found))
    assert wanted.keys() == given.keys()
    for name, one in wanted.items():
        np.testing.assert_allclose(
            np.array(given[name]), np.array(one), rtol=0, atol=1e-5 * max(np.abs(one).max(), 1e-3), err_msg=name
        )


def test_padding_is_never_a_target(tiny_model: Path, columns: TokenColumns) -> None:
    """Token 0 pads; were it counted, a wider batch would change the loss."""
    model = load_model(tiny_model)
    narrow, wide = (batch(columns, [0, 1], rows, (width,)) for rows, width in ((2, 16), (6, 64)))
    assert token_losses(model, mx.array(narrow.inputs), mx.array(narrow.targets)).sum().item() == pytest.approx(
        token_losses(model, mx.array(wide.inputs), mx.array(wide.targets)).sum().item(), rel=1e-6
    )


def test_the_mean_loss_weighs_rows_by_their_tokens(tiny_model: Path, columns: TokenColumns) -> None:
    by_row = losses_by_row(tiny_model, None, columns, batch_size=2)
    assert by_row["row"].tolist() == [1, 2, 3, 4, 5]
    assert by_row["supervised_tokens"].tolist() == [3, 1, 12, 7, 5]
    weighted = by_row["loss"].sum() / 28
    assert mean_loss(load_model(tiny_model), columns, batch_size=3) == pytest.approx(weighted, rel=1e-6)
    assert weighted != pytest.approx((by_row["loss"] / by_row["supervised_tokens"]).mean(), rel=1e-4)


@pytest.mark.parametrize("usable", [True, False])
def test_the_fast_row_losses_are_the_plain_ones(
    usable: bool, tiny_model: Path, columns: TokenColumns, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model)
    expected = np.array(row_losses(model, batch(columns, range(5), 5, widths(columns.lengths))))
    taken: list[Batch] = []
    gathered = losses.gathered_row_losses

    def noting(model: nn.Module, current: Batch) -> mx.array:
        taken.append(current)
        return gathered(model, current)

    monkeypatch.setattr(losses, "gathered_row_losses", noting)
    monkeypatch.setattr(losses, "usable", lambda: usable)
    np.testing.assert_allclose(losses_by_row(tiny_model, None, columns, batch_size=3)["loss"], expected, rtol=1e-5)
    assert len(taken) > 1


def test_row_losses_that_differ_are_not_taken(tiny_model: Path, columns: TokenColumns, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses_by_row(tiny_model, None, columns)["loss"]
    gathered = losses.gathered_row_losses
    monkeypatch.setattr(losses, "gathered_row_losses", lambda model, batch: gathered(model, batch) * 1.01)
    np.testing.assert_allclose(losses_by_row(tiny_model, None, columns)["loss"], expected, rtol=1e-5)

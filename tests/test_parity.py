"""Twenty updates of the fit against a plain loop over single rows, written here without any of the fit's code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from finetune_dataflow.engine import training
from finetune_dataflow.engine.batches import epoch_order
from finetune_dataflow.engine.starting_weights import read_weights
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from tests.fit_values import history, settings_of

UPDATES, SEED, BATCH = 20, 7, 4
PLAIN: dict[str, Any] = {"fine_tune_type": "lora", "grad_accumulation_steps": 1, "max_grad_norm": None}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"fine_tune_type": "dora"},
    "full": {"fine_tune_type": "full", "num_layers": -1},
    "full, one block": {"fine_tune_type": "full", "num_layers": 1},
    "accumulation": {"grad_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.05},
    "gradient checkpointing": {"grad_checkpoint": True},
}


@pytest.fixture(scope="module")
def rows() -> TokenColumns:
    """Thirty rows of 5 to 60 tokens, 1 to 25 of them learned."""
    draw = np.random.default_rng(3)
    return token_columns(
        [
            EncodedRow(n, *(draw.integers(0, 256, draw.integers(*sizes)).tolist() for sizes in ((3, 36), (1, 25))))
            for n in range(1, 31)
        ]
    )  # fmt: skip


def plain_model(directory: Path, case: dict[str, Any]) -> nn.Module:
    """The model as mlx-lm's own trainer prepares it; with full and -1 all of it is trained."""
    model, _ = load_model(directory)
    model.freeze()
    if case["fine_tune_type"] == "full":
        for part in [model] if case["num_layers"] == -1 else model.layers[-case["num_layers"] :]:
            part.unfreeze()
    else:
        mx.random.seed(SEED)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0}, case["fine_tune_type"] == "dora")
    mx.eval(model.parameters())
    return model


def windows(rows: TokenColumns, accumulation: int) -> Iterator[list[int]]:
    """The rows of each update: whole windows of batches, a shorter one at an epoch's end."""
    epoch = 0
    while True:
        order = epoch_order(rows, BATCH, SEED, epoch)
        for start in range(0, len(order), accumulation):
            yield [index for batch in order[start : start + accumulation] for index in batch]
        epoch += 1


def row_loss(model: nn.Module, ids: mx.array, labels: list[int]) -> mx.array:
    """The summed loss of one row alone, from log-probabilities."""
    logits = model(ids[None, :-1])[0].astype(mx.float32)
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    learned = [place for place, label in enumerate(labels[1:]) if label != -100]
    return -sum((log_probabilities[place, labels[place + 1]] for place in learned), mx.array(0.0))


def plain_fit(directory: Path, rows: TokenColumns, case: dict[str, Any], rate: float, updates: int) -> dict[str, Any]:
    """Gradient descent, a row at a time."""
    model = plain_model(directory, case)
    gradient_of = nn.value_and_grad(model, row_loss)
    losses, first = [], None
    for _, chosen in zip(range(updates), windows(rows, case["grad_accumulation_steps"]), strict=False):
        total, loss, learned = None, 0.0, 0
        for index in chosen:
            labels = rows.row_labels(index).tolist()
            value, gradient = gradient_of(model, mx.array(rows.row_ids(index)), labels)
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            loss += value.item()
            learned += sum(label != -100 for label in labels[1:])
            mx.eval(total)
        gradient = flat(tree_map(lambda each, learned=learned: each / learned, total))
        norm = math.sqrt(sum(float((np.array(each, np.float64) ** 2).sum()) for each in gradient.values()))
        first = first or gradient
        limit = case["max_grad_norm"]
        factor = rate if limit is None else rate * min(1.0, limit / norm)
        moved = {name: each - factor * gradient[name] for name, each in flat(model.trainable_parameters()).items()}
        model.update(tree_unflatten(list(moved.items())))
        mx.eval(model.parameters())
        losses.append(loss / learned)
    return {"losses": losses, "gradient": first, "parameters": flat(model.trainable_parameters())}


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def distance(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """How far two sets of parameters are apart, as a share of the second's norm."""
    assert one.keys() == other.keys()
    apart = sum(float(((np.array(one[name], np.float64) - np.array(other[name], np.float64)) ** 2).sum()) for name in one)
    return math.sqrt(apart / sum(float((np.array(each, np.float64) ** 2).sum()) for each in other.values()))


def fitted(
    directory: Path, rows: TokenColumns, case: dict[str, Any], rate: float, updates: int, out: Path
) -> dict[str, mx.array]:
    """The parameters after so many updates of the fit by plain gradient descent at a constant rate."""
    constant = {"learning_schedule": {"type": "constant", "max_lr": rate}, "learning_rate": rate, "optimizer": "sgd"}
    iters = batches_of(len(rows), updates, case["grad_accumulation_steps"])
    settings = settings_of(**case, **constant, epochs=None, iters=iters, random_state=SEED, weight_decay=None)
    training.fit(directory, rows, rows, settings, out, {})
    return read_weights(out / "adapters-last" / "adapters.safetensors")


def batches_of(rows: int, updates: int, accumulation: int) -> int:
    """The batches in so many updates."""
    per_epoch = math.ceil(rows / BATCH)
    sizes = [min(accumulation, per_epoch - start) for start in range(0, per_epoch, accumulation)]
    return sum(sizes[number % len(sizes)] for number in range(updates))


@pytest.mark.parametrize("name", CASES)
def test_twenty_updates_agree_with_a_plain_loop(tiny_model: Path, rows: TokenColumns, name: str, tmp_path: Path) -> None:
    case = {**PLAIN, **CASES[name]}
    plain = plain_fit(tiny_model, rows, case, rate=0.05, updates=UPDATES)
    ours = fitted(tiny_model, rows, case, 0.05, UPDATES, tmp_path)
    losses = [each["loss"] for each in history(tmp_path, "train")]
    assert losses == pytest.approx(plain["losses"], rel=1e-5) and len(losses) == UPDATES
    assert distance(ours, plain["parameters"]) < 1e-5
    before = flat(plain_model(tiny_model, case).trainable_parameters())
    moved, plainly_moved = ({each: after[each] - before[each] for each in before} for after in (ours, plain["parameters"]))
    assert distance(moved, plainly_moved) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_first_gradient_agrees_with_a_plain_loop(tiny_model: Path, rows: TokenColumns, name: str, tmp_path: Path) -> None:
    """One update at so high a rate that the parameters before it round away: what is left is the gradient."""
    case, rate = {**PLAIN, **CASES[name], "max_grad_norm": None}, 1e4
    plain = plain_fit(tiny_model, rows, case, rate=rate, updates=1)
    before = flat(plain_model(tiny_model, case).trainable_parameters())
    after = fitted(tiny_model, rows, case, rate, 1, tmp_path)
    gradient = {name: (before[name] - after[name]) / rate for name in before}
    assert distance(gradient, plain["gradient"]) < 1e-5

"""Exponentials as powers of two: values and gradients against float64 and against MLX's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations, llama

from finetune_dataflow.engine import exponentials
from finetune_dataflow.engine.batches import batch, widths
from finetune_dataflow.engine.exponentials import as_powers, attention, cross_entropy, gelu_approx, silu, swiglu
from finetune_dataflow.engine.losses import PLAIN
from finetune_dataflow.engine.methods import make_trainable
from finetune_dataflow.engine.models import load_model
from tests.architectures import ARCHITECTURES, write_architecture
from tests.fit_values import rows_of, settings_of

DRAW = np.random.default_rng(5)
VALUES = np.concatenate([DRAW.normal(0, 4, 4000), [0.0, -0.0, 90.0, -90.0, 200.0, -200.0]]).astype(np.float32)


def slope_of(function: Callable[[mx.array], mx.array], values: np.ndarray) -> np.ndarray:
    return np.array(mx.grad(lambda x: function(x).sum())(mx.array(values)))


def joined(tree: Any) -> np.ndarray:
    return np.concatenate([np.array(each).ravel() for _, each in cast(list[tuple[str, mx.array]], tree_flatten(tree))])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_silu_and_its_slope_are_those_of_float64() -> None:
    x = VALUES.astype(np.float64)
    np.testing.assert_allclose(np.array(silu(mx.array(VALUES))), x * sigmoid(x), rtol=2e-6, atol=1e-30)
    expected = sigmoid(x) * (1 + x * (1 - sigmoid(x)))
    np.testing.assert_allclose(slope_of(silu, VALUES), expected, rtol=1e-5, atol=1e-6)


def test_swiglu_gives_both_its_gradients() -> None:
    gate, x = DRAW.normal(size=(2, 6, 10)).astype(np.float32)
    by_gate, by_x = mx.grad(lambda gate, x: swiglu(gate, x).sum(), argnums=(0, 1))(mx.array(gate), mx.array(x))
    np.testing.assert_allclose(np.array(by_gate), x * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(by_x), gate * sigmoid(gate), rtol=1e-5, atol=1e-6)


def test_gelu_and_its_slope_are_those_of_mlx() -> None:
    near = VALUES[np.abs(VALUES) < 20]
    np.testing.assert_allclose(
        np.array(gelu_approx(mx.array(near))), np.array(nn.gelu_approx(mx.array(near))), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(slope_of(gelu_approx, near), slope_of(nn.gelu_approx, near), rtol=1e-4, atol=1e-5)


def masks(lines: int, heads: int, length: int, seen: int) -> dict[str, str | mx.array | None]:
    hidden = mx.array(DRAW.random((lines, 1, length, seen)) < 0.7) | (mx.arange(seen) == 0)
    return {
        "none": None,
        "causal": "causal",
        "of the line": hidden,
        "of the head": mx.array(DRAW.random((1, heads, length, seen)) < 0.7) | (mx.arange(seen) == 0),
        "flat": hidden[0, 0],
        "added": mx.where(hidden, 0.0, -1e9),
    }


@pytest.mark.parametrize("kind", ["none", "causal", "of the line", "of the head", "flat", "added"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_mlx_s_whatever_the_mask(kind: str, groups: int) -> None:
    lines, heads, length, seen, size = 3, 4, 5, 9, 8
    mask = masks(lines, heads, length, seen)[kind]
    q = mx.array(DRAW.normal(size=(lines, heads, length, size)).astype(np.float32))
    k, v = (mx.array(DRAW.normal(size=(lines, groups, seen, size)).astype(np.float32)) for _ in range(2))
    pull = mx.array(DRAW.normal(size=q.shape).astype(np.float32))

    def gradients(function: Callable[..., mx.array]) -> list[np.ndarray]:
        given = mx.grad(lambda *qkv: (function(*qkv, scale=0.3, mask=mask) * pull).sum(), argnums=(0, 1, 2))(q, k, v)
        return [np.array(function(q, k, v, scale=0.3, mask=mask)), *(np.array(each) for each in given)]

    for ours, theirs in zip(gradients(attention), gradients(mx.fast.scaled_dot_product_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_label_and_its_gradient_are_those_of_float64() -> None:
    logits, labels = DRAW.normal(0, 5, (7, 50)).astype(np.float32), DRAW.integers(0, 50, 7)
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True)
    weights = mx.array(DRAW.random(7).astype(np.float32))
    with as_powers():
        found = cross_entropy(mx.array(logits), mx.array(labels))
        gradient = mx.grad(lambda each: (cross_entropy(each, mx.array(labels)) * weights).sum())(mx.array(logits))
    np.testing.assert_allclose(np.array(found), -np.log(shares[np.arange(7), labels]), rtol=1e-5)
    shares[np.arange(7), labels] -= 1
    np.testing.assert_allclose(np.array(gradient), shares * np.array(weights)[:, None], rtol=1e-4, atol=1e-6)


def test_the_functions_are_exchanged_for_the_block_alone_even_where_it_fails() -> None:
    before = nn.silu, activations.swiglu, llama.swiglu, mx.fast.scaled_dot_product_attention
    with pytest.raises(KeyError), as_powers():
        with as_powers():
            assert llama.swiglu is swiglu
        assert (nn.silu, activations.swiglu, llama.swiglu) == (silu, swiglu, swiglu)
        assert mx.fast.scaled_dot_product_attention is attention
        raise KeyError
    assert (nn.silu, activations.swiglu, llama.swiglu, mx.fast.scaled_dot_product_attention) == before
    with as_powers(wanted=False):
        assert llama.swiglu is before[2]


def test_while_mlx_compiles_and_in_half_precision_the_plain_formula_is_computed() -> None:
    x = mx.array(VALUES[:100])
    np.testing.assert_allclose(np.array(mx.compile(silu)(x)), np.array(nn.silu(x)), rtol=1e-5)
    assert silu(x.astype(mx.bfloat16)).dtype == mx.bfloat16
    q = mx.ones((1, 2, 3, 4), mx.bfloat16)
    assert attention(q, q, q, scale=1.0, mask="causal").dtype == mx.bfloat16


def test_a_function_that_a_model_has_compiled_takes_any_shape() -> None:
    compiled = mx.compile(lambda gate, x: nn.silu(gate) * x, shapeless=True)
    with as_powers():
        for shape in ((2, 3), (4, 5), (2, 3, 4)):
            gate = mx.random.normal(shape)
            np.testing.assert_allclose(np.array(compiled(gate, gate)), np.array(swiglu(gate, gate)), rtol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradient_of_a_model_stay_the_same(name: str, tmp_path: Path) -> None:
    model = load_model(write_architecture(tmp_path / name, name))
    make_trainable(model, settings_of(num_layers=-1).method)
    rows = rows_of(6, 1)
    current = batch(rows, range(6), 6, widths(rows.lengths))
    plain, plain_gradient = nn.value_and_grad(model, PLAIN.mean_loss)(model, current)
    mx.eval(plain, plain_gradient)
    with as_powers(exponentials.usable()):
        found, gradient = nn.value_and_grad(model, PLAIN.mean_loss)(model, current)
        mx.eval(found, gradient)
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    ones, others = (joined(tree) for tree in (gradient, plain_gradient))
    assert np.linalg.norm(ones - others) < 1e-4 * np.linalg.norm(others)

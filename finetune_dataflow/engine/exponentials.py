"""Exponentials on a CPU as powers of two.

MLX's CPU backend computes `exp`, and with it softmax, sigmoid and SiLU, one number after another with a polynomial that calls
the C library for every product: 15 nanoseconds a number, half of a training step of a small model. Its `power` takes a third
of that and is as exact (1e-6, relative). Within a block of `as_powers` the functions of `mlx` and `mlx_lm` that models call
for gated activations and attention, and the cross-entropy here, take their exponentials from it; all the rest stays as it is.
Gradients are given by formula, so that no exponential is computed twice where once will do.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

_LOG2_E = math.log2(math.e)
_SIGMOID_OF_TANH = math.sqrt(2 / math.pi)  # as GELU's approximation has it
_CUBE = 0.044715
_TINY = 1e-30  # beside the square of any value that matters
_active = False


@contextmanager
def as_powers(wanted: bool = True) -> Iterator[None]:
    """Within the block models and `cross_entropy` compute exponentials as powers of two, in the whole process.

    Blocks may be nested. Functions that models have compiled by MLX run as they are written: a compiled one would keep what it
    was compiled from, and fuses little on a CPU.
    """
    global _active
    if not wanted or _active:
        yield
        return
    places = _places()
    _active = True
    mx.disable_compile()
    try:
        for owner, name, _, instead in places:
            setattr(owner, name, instead)
        yield
    finally:
        _active = False
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
        for owner, name, original, _ in places:
            setattr(owner, name, original)


def usable() -> bool:
    """Whether MLX computes on a CPU, where its exponentials are slow."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    """The loss of each label, float32 [n], from logits float32 [n, vocabulary] and labels int32 [n]."""
    if _active and logits.dtype == mx.float32:
        return cast(tuple[mx.array, ...], _cross_entropy(logits, labels))[0]
    return nn.losses.cross_entropy(logits, labels)


def _places() -> list[tuple[Any, str, Any, Any]]:
    """Where a function is looked up by its name, what stands there, and what is put there: (owner, name, original, other)."""
    instead = {
        id(activations.swiglu): swiglu,
        id(nn.silu): silu,
        id(nn.gelu_approx): gelu_approx,
    }
    modules = [each for name, each in [*sys.modules.items()] if name.startswith("mlx_lm.models.") and each is not None]
    found = [
        (module, name, value, instead[id(value)])
        for module in [nn, *modules]
        for name, value in [*vars(module).items()]
        if id(value) in instead
    ]
    return [*found, (mx.fast, "scaled_dot_product_attention", _PLAIN_ATTENTION, attention)]


def _exp(x: mx.array) -> mx.array:
    """exp(x), float32; its gradient is not to be asked for."""
    return mx.power(2.0, x * _LOG2_E)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, as `mlx_lm.models.activations.swiglu`."""
    return silu(gate) * x


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), as `mlx.nn.silu`."""
    return cast(mx.array, _silu(x) if x.dtype == mx.float32 else x * mx.sigmoid(x))


@mx.custom_function
def _silu(x: mx.array) -> mx.array:
    return x * mx.reciprocal(1 + _exp(-x))


@_silu.vjp
def _silu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    share = _share(x, output)
    return cotangent * (share + output * (1 - share))


def _share(x: mx.array, output: mx.array) -> mx.array:
    """output / x, and a half where x is 0: the factor that a gate passes, without another exponential or an array kept for it."""
    return (output * x + 0.5 * _TINY) / (mx.square(x) + _TINY)


def gelu_approx(x: mx.array) -> mx.array:
    """GELU by its tanh approximation, as `mlx.nn.gelu_approx`."""
    if x.dtype != mx.float32:
        return 0.5 * x * (1 + mx.tanh(_SIGMOID_OF_TANH * (x + _CUBE * x**3)))
    return cast(mx.array, _gelu(x))


@mx.custom_function
def _gelu(x: mx.array) -> mx.array:
    # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
    return x * mx.reciprocal(1 + _exp(-2 * _SIGMOID_OF_TANH * x * (1 + _CUBE * mx.square(x))))


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    share = _share(x, output)
    slope = _SIGMOID_OF_TANH * (1 + 3 * _CUBE * mx.square(x))
    return cotangent * (share + 2 * x * share * (1 - share) * slope)


@mx.custom_function
def _softmax(scores: mx.array) -> mx.array:
    powers = _exp(scores - scores.max(axis=-1, keepdims=True))
    return powers * mx.reciprocal(powers.sum(axis=-1, keepdims=True))


@_softmax.vjp
def _softmax_vjp(scores: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    weighted = output * cotangent
    return weighted - output * weighted.sum(axis=-1, keepdims=True)


_PLAIN_ATTENTION: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **others: Any,
) -> mx.array:
    """Attention as `mlx.core.fast.scaled_dot_product_attention`: q [lines, heads, L, d], k and v [lines, groups, S, d]."""
    lines, heads, length, _ = q.shape
    groups, seen = k.shape[1], k.shape[2]
    known = mask is None or mask == "causal" if isinstance(mask, str | None) else mask.ndim <= 4
    if sinks is not None or others or not known or {q.dtype, k.dtype, v.dtype} != {mx.float32}:
        return _PLAIN_ATTENTION(q, k, v, scale=scale, mask=mask, sinks=sinks, **others)
    shared = heads // groups
    grouped = (q * scale).reshape(lines, groups, shared, length, q.shape[-1])
    scores = grouped @ mx.expand_dims(k, 2).swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)[None]
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        by_head = (groups, shared) if mask.shape[1] > 1 else (1, 1)
        mask = mask.reshape(mask.shape[0], *by_head, *mask.shape[2:])
        lowest = mx.array(mx.finfo(mx.float32).min, mx.float32)
        scores = mx.where(mask, scores, lowest) if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
    return (cast(mx.array, _softmax(scores)) @ mx.expand_dims(v, 2)).reshape(lines, heads, length, v.shape[-1])


@mx.custom_function
def _cross_entropy(logits: mx.array, labels: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The losses, and for the gradient: powers [n, vocabulary], each e to a logit less the highest, and their sums [n]."""
    highest = logits.max(axis=-1)
    powers = _exp(logits - highest[:, None])
    totals = powers.sum(axis=-1)
    losses = mx.log(totals) + highest - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return losses, powers, totals


@_cross_entropy.vjp
def _cross_entropy_vjp(primals: tuple[mx.array, mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Any:
    (_, labels), (cotangent, *_), (_, powers, totals) = primals, cotangents, outputs
    shares = powers * (cotangent / totals)[:, None]
    return shares.at[mx.arange(len(labels)), labels].add(-cotangent), mx.zeros_like(labels)

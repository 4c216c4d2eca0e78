"""Gradient checkpointing: activations of a layer are computed again in the backward pass instead of being kept.

Only the input of each layer stays in memory from the forward to the backward pass, for one more forward pass of time. Each
layer's class is exchanged for a subclass, for the time of a block; afterwards the class, its attributes and every other
model in the process are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from finetune_dataflow.errors import UserError


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within the block each of `model.layers` recomputes its activations in the backward pass; loss and gradient stay equal.

    Dropout draws the same numbers in both passes. A layer that is called with a cache is computed plainly, since a second
    pass would write to the cache twice. Blocks may be nested; the outermost counts. Gradients reach a layer's arguments and
    its own trainable parameters: no layer may use an array of the model by another way.
    Raises UserError where the model has no list of layers.
    """
    exchanged: list[tuple[nn.Module, type[nn.Module]]] = []
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        for layer in _layers(model):
            original = type(layer)
            if not issubclass(original, _Recomputing):  # it is one where a layer is listed twice, or the block nested
                layer.__class__ = subclasses.setdefault(original, _subclass(original))
                exchanged.append((layer, original))
        yield
    finally:
        for layer, original in exchanged:
            layer.__class__ = original


class _Recomputing:
    """Marks the subclasses made here."""


def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `original` whose call is recomputed in the backward pass."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _repeatable((args, kwargs)):
            return original.__call__(self, *args, **kwargs)
        return _recomputed(self, original.__call__, args, kwargs)

    return type(original.__name__, (original, _Recomputing), {"__call__": call, "__module__": original.__module__})


def _recomputed(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `forward` gives for the layer, with none of its intermediate arrays kept for the backward pass."""
    start = _random_state()
    first = True

    def run(parameters: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal first
        if first:
            first = False
            with _holding(layer, parameters):
                return forward(layer, *args, **kwargs)
        with _holding(layer, parameters), _drawing_from(start):
            return forward(layer, *args, **kwargs)

    return mx.checkpoint(run)(layer.trainable_parameters(), args, kwargs)


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    found = list(layers) if isinstance(layers, list | tuple) else []
    if not found or not all(isinstance(each, nn.Module) for each in found):
        raise UserError(
            f"grad_checkpoint=True needs a model with a list of layers; {type(model).__module__}.{type(model).__name__} "
            "has none. Expected grad_checkpoint=False for it."
        )
    return found


def _repeatable(arguments: Any) -> bool:
    """Whether a second call with these arguments finds them as the first did: arrays and plain values, no cache."""
    leaves = cast(list[tuple[str, Any]], tree_flatten(arguments))
    plain = mx.array | str | int | float | None
    return all(isinstance(leaf, plain) or getattr(leaf, "stateless", False) for _, leaf in leaves)


@contextmanager
def _holding(layer: nn.Module, parameters: dict[str, Any]) -> Iterator[None]:
    """Within the block the layer's trainable parameters are `parameters`."""
    own = layer.trainable_parameters()
    layer.update(parameters)
    try:
        yield
    finally:
        layer.update(own)


@contextmanager
def _drawing_from(state: mx.array) -> Iterator[None]:
    """Within the block random numbers are drawn from `state` on; afterwards as if none had been."""
    before = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _random_state() -> mx.array:
    """A copy of the state of MLX's generator: uint32 [2], not evaluated."""
    return mx.array(mx.random.state[0])  # type: ignore[index]  # a list, whatever its stub says


def _set_random_state(state: mx.array) -> None:
    # In place: the generator's list of states cannot be assigned to.
    mx.random.state[0][...] = state  # type: ignore[index]

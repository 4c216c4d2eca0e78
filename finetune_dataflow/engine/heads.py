"""The output head on supervised positions only: most of a batch's logits are never looked at.

A model's last step turns every position's hidden state into a score for each word of the vocabulary: for SmolLM2 a fifth of
its arithmetic, and nearly all of its exponentials. The loss needs the supervised positions alone. Here the head module's
class is exchanged, for one call, for a subclass that first gathers those positions; what the model does to its logits
afterwards (scaling, soft caps) is its own. Nothing of the model is rewritten, and its parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


def output_head(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that makes the logits and the method that does it: `lm_head`, or the embedding of tied models."""
    for owner in (model, getattr(model, "language_model", None)):
        if owner is None:
            continue
        if "lm_head" in owner:
            return owner.lm_head, "__call__"
        inner = owner.get("model")
        if isinstance(inner, nn.Module) and "embed_tokens" in inner:
            return inner.embed_tokens, "as_linear"
    return None


@contextmanager
def gathering(head: tuple[nn.Module, str], positions: mx.array) -> Iterator[None]:
    """Within the block the head sees `positions` (int32 [n], into the flattened batch) and gives logits [1, n, vocabulary]."""
    module, method = head
    original = type(module)

    def gathered(self: nn.Module, hidden: mx.array) -> mx.array:
        chosen = hidden.reshape(1, -1, hidden.shape[-1])[:, positions]
        return getattr(original, method)(self, chosen)

    module.__class__ = type(original.__name__, (original,), {method: gathered})
    try:
        yield
    finally:
        module.__class__ = original

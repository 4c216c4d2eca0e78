"""The two small matrices by which an adapter changes a layer, and many layers of unlike rank and scale brought under one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one layer: scale * a @ b, as mlx-lm has them.

    a: (in, rank) and b: (rank, out); of an embedding in is the number of its rows; of experts (experts, rank, in) and
    (experts, out, rank). magnitudes: DoRA's (out,), or None.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitudes: mx.array | None = None

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self.a.shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the matrices belong to a change of this shape: (out, in) or (experts, out, in)."""
        if self.a.ndim != len(shape) or self.b.ndim != len(shape) or self.rank < 1:
            return False
        if len(shape) == 3:
            experts, out, width = shape
            return self.a.shape == (experts, self.rank, width) and self.b.shape == (experts, out, self.rank)
        sizes = (self.b.shape[1], self.a.shape[0])
        whole = self.magnitudes is None or self.magnitudes.shape == shape[:1]
        return sizes == shape and self.b.shape[0] == self.rank and whole

    def widened(self, rank: int) -> LowRank:
        """The same change with more directions, all of them zeros."""
        missing = rank - self.rank
        if missing == 0:
            return self
        of_b = 0 if self.b.ndim == 2 else 2
        return replace(self, a=_with_zeros(self.a, 1, missing), b=_with_zeros(self.b, of_b, missing))

    def under(self, scale: float) -> LowRank:
        """The same change under another scale: `b` takes the factor between them, rounded once, to float32."""
        if self.scale == scale:
            return self
        exact = np.array(self.b.astype(mx.float32)).astype(np.float64) * (self.scale / scale)
        return replace(self, b=mx.array(exact.astype(np.float32)), scale=scale)


def common(layers: Mapping[str, LowRank]) -> tuple[dict[str, mx.array], int, float]:
    """The arrays under mlx-lm's names, and the one rank and the one scale that all layers then have.

    The rank is the highest; layers of a lower one get zeros. The scale is that of the most layers; where another one was, the
    factor between the two goes into `lora_b`.
    """
    rank = max(each.rank for each in layers.values())
    counts = Counter(each.scale for each in layers.values() if each.scale)
    scale = min(counts, key=lambda each: (-counts[each], each)) if counts else 1.0
    arrays: dict[str, mx.array] = {}
    for name, layer in layers.items():
        same = layer.under(scale).widened(rank)
        arrays |= {f"{name}.lora_a": same.a, f"{name}.lora_b": same.b}
        if same.magnitudes is not None:
            arrays[f"{name}.m"] = same.magnitudes
    return arrays, rank, scale


def _with_zeros(array: mx.array, axis: int, count: int) -> mx.array:
    shape = list(array.shape)
    shape[axis] = count
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=axis)

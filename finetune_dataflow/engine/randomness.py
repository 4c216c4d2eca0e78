"""MLX's one global random generator, borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed MLX's generator for the block, then put it back as it was: nothing outside notices that numbers were drawn."""
    high, low = (int(each) for each in np.array(mx.random.state[0]))  # type: ignore[index]  # a list, whatever its stub says
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed

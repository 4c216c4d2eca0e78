"""The arithmetic of a LoRA step, the exponent of a growth, and the spread of some measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder whose layers are those of Llama's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Decoder:
        """The sizes in a model's config.json."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_heads=config.get("num_key_value_heads", heads),
            head_size=config.get("head_dim", config["hidden_size"] // heads),
            vocabulary=config["vocab_size"],
        )

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the query, key and value projections of a layer, which see the same hidden states."""
        keys = self.key_heads * self.head_size
        return (self.hidden, self.heads * self.head_size), (self.hidden, keys), (self.hidden, keys)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of every matrix of a layer."""
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return *self.projections, (self.heads * self.head_size, self.hidden), up, up, down


@dataclass(frozen=True)
class Work:
    """What some rows ask of a step, padding left out.

    positions: inputs, one less than a row's tokens. pairs: of a position and one it attends to, itself included.
    supervised: positions whose loss is taken.
    """

    positions: int
    pairs: int
    supervised: int


def step_operations(model: Decoder, work: Work, tuned: int, rank: int, first_epoch: bool) -> int:
    """The floating-point operations that steps over `work` must do, LoRA of `rank` on all matrices of the last `tuned` layers.

    Counted are matrix products alone, two operations for a multiplication and an addition. Forward: all layers in the first
    epoch, the tuned ones later, when what the frozen ones give is known. Backward: what the gradients of the adapters
    need, so no gradient of frozen weights, and none for what enters the lowest tuned layer. The output head, forward and
    backward, runs on supervised positions.
    """
    matrices = 2 * work.positions * sum(inner * outer for inner, outer in model.matrices)
    adapters = 2 * work.positions * rank * sum(inner + outer for inner, outer in model.matrices)
    attention = 2 * 2 * model.heads * model.head_size * work.pairs
    forward = (model.layers if first_epoch else tuned) * (matrices + attention) + tuned * adapters
    # Scores and mixing each have two operands that need a gradient; a LoRA pair has its own weights' and its input's.
    backward = tuned * (matrices + 2 * attention + 2 * adapters)
    unneeded = 2 * work.positions * sum(inner * outer + rank * inner for inner, outer in model.projections)
    head = 2 * 2 * work.supervised * model.hidden * model.vocabulary
    return forward + backward - unneeded + head


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The b of cost = a * size ** b, by least squares on the logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some measurements, to four significant digits."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}

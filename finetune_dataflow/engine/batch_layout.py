"""How the rows of a batch lie in lines: a row to a line, or packed, whichever computes less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from finetune_dataflow.engine.batches import Batch, batch, widths
from finetune_dataflow.engine.packing import arranged, packed
from finetune_dataflow.engine.tokens import TokenColumns

PACKED_WIDTHS = 2  # the longest row's, and twice that
MOST_PACKED = 2048  # tokens of a line of several rows
PART_TOKENS = 384  # of a part, at least: with half of that a BLAS spends a tenth more on rearranging the weights
PART_GRADIENT = 2**26  # bytes; a thread adds up the gradients of its parts, so that larger ones outweigh what parts save


@dataclass(frozen=True)
class BatchLayout:
    """The widths of lines, and when rows share them.

    ladder: widths of lines that hold one row. packed_widths: of those that hold several; empty where rows never share.
    even_width: the width of a line at which a token's attention costs as much as the rest of its layer.
    """

    ladder: tuple[int, ...]
    packed_widths: tuple[int, ...]
    even_width: float

    def cost(self, lines: int, width: int) -> float:
        """What so many lines cost, in tokens without attention."""
        return lines * width * (1 + width / self.even_width)

    def made(self, columns: TokenColumns, indices: Sequence[int], lines: int) -> Batch:
        """The batch of the rows at `indices`, in `lines` lines of a row each or in fewer that rows share."""
        width = self.shared_width(columns, indices, lines)
        return batch(columns, indices, lines, self.ladder) if width is None else packed(columns, indices, width)

    def shared_width(self, columns: TokenColumns, indices: Sequence[int], lines: int) -> int | None:
        """The width at which these rows cost least where they share lines; None where a row to a line costs no more."""
        lengths = [int(columns.lengths[index]) - 1 for index in indices]
        alone = next(each for each in self.ladder if each >= max(lengths))
        least, chosen = self.cost(lines, alone), None
        for width in self.packed_widths:
            if width >= max(lengths) and (found := self.cost(len(arranged(lengths, width)), width)) < least:
                least, chosen = found, width
        return chosen


def batch_layout(model: nn.Module, columns: TokenColumns, packing: bool) -> BatchLayout:
    """The layout for the rows of `columns` on this model."""
    ladder = widths(columns.lengths)
    wide = [ladder[-1] * (number + 1) for number in range(PACKED_WIDTHS)] if packing else []
    return BatchLayout(ladder, tuple(each for each in wide if each <= max(MOST_PACKED, ladder[-1])), even_width(model))


def even_width(model: nn.Module) -> float:
    """The width of a line at which attention costs a token as much as the rest of its layer.

    For a token a layer of P weights takes 2 P operations, and its attention over a line of `width` tokens at most 4 width
    times the heads' size together, which is taken to be the model's width.
    """
    layers = getattr(model, "layers", None) or [model]
    leaves = cast(list[tuple[str, mx.array]], tree_flatten(layers[-1].parameters()))
    matrices = [each for _, each in leaves if each.ndim == 2 and each.size > 0]
    weights = sum(each.size for each in matrices)
    hidden = max((min(each.shape) for each in matrices), default=1)
    return max(1.0, weights / (2 * hidden))


def part_count(tokens: int, rows: int, threads: int, gradient_bytes: int) -> int:
    """In how many parts `threads` threads compute a batch of so many tokens and rows.

    One for each thread, and more where these would be large: a thread's parts follow one another, and only the one that it
    is at has its activations in memory.
    """
    each = tokens // (threads * PART_TOKENS) if threads > 1 and gradient_bytes <= PART_GRADIENT else 1
    return min(threads * max(each, 1), rows)


def shared_out(columns: TokenColumns, indices: Sequence[int], parts: int) -> list[list[int]]:
    """The rows at `indices` in at most `parts` parts of about equally many tokens, each in ascending order; none is empty."""
    found: list[list[int]] = [[] for _ in range(min(parts, len(indices)))]
    tokens = [0] * len(found)
    for index in sorted(indices, key=lambda index: (-int(columns.lengths[index]), index)):
        place = min(range(len(found)), key=lambda place: (len(found[place]), tokens[place]))
        found[place].append(int(index))
        tokens[place] += int(columns.lengths[index])
    return [sorted(each) for each in found]

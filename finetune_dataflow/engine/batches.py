"""Rows in batches of few fixed shapes, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune_dataflow.engine.tokens import IGNORED, TokenColumns

if TYPE_CHECKING:
    import mlx.core as mx

SHAPES = 6  # the most widths that one set of rows is padded to
STEP = 8  # widths are multiples of this
CAPACITY_STEP = 32  # the number of gathered targets is a multiple of this
WINDOW = 16  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class Batch:
    """Some rows in lines of one width: a row to a line, or, where `segments` is given, several one after another.

    indices: the rows' places in the token columns, at most `batch_size` of them.
    placements: line and first column of each of these rows.
    inputs: int32 [lines, width]; zero where padded.
    targets: int32 [lines, width]; the next token's label, -100 where it is not learned or padded.
    segments: int32 [lines, width]; 1, 2, … for the rows of a line, 0 where padded. None where every line is one row.
    states: [lines, width, hidden], what the frozen layers give for the inputs, where that is known.
    positions: int32 [capacity]; the supervised targets' places in the flattened batch, filled up with 0.
    labels: int32 [capacity]; their labels, filled up with -100.
    """

    indices: tuple[int, ...]
    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    positions: NDArray[np.int32]
    labels: NDArray[np.int32]
    placements: tuple[tuple[int, int], ...]
    segments: NDArray[np.int32] | None = None
    states: mx.array | None = None

    @property
    def supervised(self) -> int:
        """Targets that are learned."""
        return int((self.targets != IGNORED).sum())


def widths(lengths: NDArray[np.int64]) -> tuple[int, ...]:
    """At most six widths that every row fits one of, spread over the lengths' quantiles; inputs are one shorter than rows."""
    quantiles = np.quantile(lengths - 1, np.linspace(0, 1, SHAPES + 1)[1:], method="higher")
    return tuple(sorted({int(-(-max(each, 1) // STEP) * STEP) for each in quantiles}))


def batch(columns: TokenColumns, indices: Sequence[int], batch_size: int, ladder: tuple[int, ...]) -> Batch:
    """The rows at `indices`, padded to the narrowest width of `ladder` they fit and to `batch_size` rows."""
    longest = max(int(columns.lengths[index]) for index in indices) - 1
    width = next(each for each in ladder if each >= longest)
    inputs = np.zeros((batch_size, width), np.int32)
    targets = np.full((batch_size, width), IGNORED, np.int32)
    for line, index in enumerate(indices):
        ids, labels = columns.row_ids(index), columns.row_labels(index)
        inputs[line, : len(ids) - 1] = ids[:-1]
        targets[line, : len(ids) - 1] = labels[1:]
    columns.release()
    return of_lines(indices, inputs, targets, [(line, 0) for line in range(len(indices))])


def of_lines(
    indices: Sequence[int],
    inputs: NDArray[np.int32],
    targets: NDArray[np.int32],
    placements: Sequence[tuple[int, int]],
    segments: NDArray[np.int32] | None = None,
) -> Batch:
    """The batch of rows that are already laid out; the supervised targets are found here."""
    supervised = np.flatnonzero(targets != IGNORED)
    capacity = max(-(-len(supervised) // CAPACITY_STEP), 1) * CAPACITY_STEP
    positions, gathered = np.zeros(capacity, np.int32), np.full(capacity, IGNORED, np.int32)
    positions[: len(supervised)] = supervised
    gathered[: len(supervised)] = targets.reshape(-1)[supervised]
    return Batch(tuple(int(index) for index in indices), inputs, targets, positions, gathered, tuple(placements), segments)


def in_parts(whole: Batch, parts: int) -> list[Batch]:
    """A batch of a row to a line as at most `parts` batches of about equally many lines, of the same width."""
    cut = np.array_split(np.arange(len(whole.inputs)), min(parts, len(whole.inputs)))
    spans = [(int(lines[0]), int(lines[-1]) + 1) for lines in cut]
    return [
        of_lines(whole.indices[start:end], whole.inputs[start:end], whole.targets[start:end], whole.placements[: end - start])
        for start, end in spans
    ]


def epoch_order(columns: TokenColumns, batch_size: int, random_state: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as row indices: every row exactly once, the last partial batch too.

    Rows are shuffled, sorted by length within windows of sixteen batches so that little is padded, and the batches are
    shuffled again. The order depends on the seed and the epoch alone.
    """
    generator = np.random.default_rng([random_state, epoch])
    shuffled = generator.permutation(len(columns))
    window = np.arange(len(shuffled)) // (WINDOW * batch_size)
    by_length = shuffled[np.lexsort((columns.lengths[shuffled], window))].tolist()
    cut = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return [cut[place] for place in generator.permutation(len(cut))]


def padded_places(columns: TokenColumns, batch_size: int) -> int:
    """The places of all batches of `in_order`, padding included."""
    if not len(columns):
        return 0
    batch_size = min(batch_size, len(columns))
    longest = np.sort(columns.lengths)[[*range(batch_size - 1, len(columns) - 1, batch_size), len(columns) - 1]] - 1
    ladder = np.array(widths(columns.lengths))
    return int(ladder[np.searchsorted(ladder, longest)].sum()) * batch_size


def in_order(columns: TokenColumns, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Every row once, sorted by length: for losses that no order changes. Of several ranks each gets its share of the rows."""
    by_length = np.argsort(columns.lengths, kind="stable")[rank::ranks]
    if not len(by_length):
        return
    batch_size = min(batch_size, len(by_length))
    ladder = widths(columns.lengths)
    for start in range(0, len(by_length), batch_size):
        yield batch(columns, by_length[start : start + batch_size].tolist(), batch_size, ladder)

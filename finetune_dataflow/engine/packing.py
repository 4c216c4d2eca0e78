"""Rows packed one after another into lines, each row blind to the others of its line.

A batch of short rows is mostly padding. Here several rows share a line, and every layer attends within a row only: the model
is called with caches that keep nothing and give it such a mask, so nothing of the model is rewritten. Rotary positions are
relative, so a row may begin anywhere in a line. Models whose positions are absolute (learned ones, scales that grow with the
position) give other values, and nothing here notices: whoever packs compares with the plain batch first, on two lines or more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from finetune_dataflow.engine.batches import Batch, of_lines
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns


class NotPackable(Exception):
    """Rows of one line would see each other in this model; the message says why."""


def arranged(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which rows share a line of `width` tokens, as places in `lengths` (input tokens of each row): best fit, longest first.

    Rows of a line are in ascending order, and lines in that of their first row. Equal arguments give equal lines.
    Raises ValueError for a row longer than a line.
    """
    if max(lengths, default=0) > width:
        raise ValueError(f"A row of {max(lengths)} tokens does not fit a line of {width}.")
    lines: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens left and the line's place in `lines`, ascending
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tightest = bisect_left(rooms, (lengths[row], 0))
        if tightest < len(rooms):
            room, line = rooms.pop(tightest)
        else:
            room, line = width, len(lines)
            lines.append([])
        lines[line].append(row)
        insort(rooms, (room - lengths[row], line))
    return sorted(sorted(line) for line in lines)


def packed(columns: TokenColumns, indices: Sequence[int], width: int, lines: int | None = None) -> Batch:
    """The rows at `indices`, all of them and no others, packed into lines of `width` tokens.

    lines: at least so many, those that are not needed only pad: a fixed number of them keeps the batch's shape the same.
    Raises ValueError for a row whose inputs are longer than a line.
    """
    arrangement = arranged([int(columns.lengths[index]) - 1 for index in indices], width)
    shape = (max(len(arrangement), lines or 1), width)
    inputs, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets = np.full(shape, IGNORED, np.int32)
    placements = [(0, 0)] * len(indices)
    for line, rows in enumerate(arrangement):
        end = 0
        for segment, row in enumerate(rows, start=1):
            ids, labels = columns.row_ids(indices[row]), columns.row_labels(indices[row])
            start, end = end, end + len(ids) - 1
            inputs[line, start:end] = ids[:-1]
            targets[line, start:end] = labels[1:]
            segments[line, start:end] = segment
            placements[row] = (line, start)
    columns.release()
    return of_lines(indices, inputs, targets, placements, segments)


def forward(model: nn.Module, inputs: mx.array, segments: mx.array | None = None) -> mx.array:
    """What the model gives for `inputs` (int32 [lines, width]), each row seen by itself alone where `segments` is given.

    Both as in `Batch`. Raises NotPackable where the model has layers that would mix rows.
    """
    return cast(mx.array, model(inputs) if segments is None else model(inputs, cache=segment_caches(model, segments)))


def segment_caches(model: nn.Module, segments: mx.array) -> list[SegmentCache]:
    """What the model is called with as its cache, so that attention stays within a row: an entry where its own has one.

    segments: int32 [lines, width], as in `Batch`. The entries share their masks. Raises NotPackable, with the layer and the
    reason, where a layer keeps anything but keys and values of single tokens.
    """
    if not hasattr(model, "layers"):
        raise NotPackable("the model has no list of layers, so what they keep from token to token is not known")
    entries = make_prompt_cache(model)
    for place, entry in enumerate(entries):
        who = f"layer {place}" if len(entries) == len(model.layers) else "a layer"
        if (obstacle := _obstacle(entry)) is not None:
            raise NotPackable(f"{who} {obstacle}")
    masks = _Masks(segments, _groups_heads(model))
    return [SegmentCache(masks) for _ in entries]


class SegmentCache:
    """A layer's cache that keeps nothing: a line's keys and values go through, and masks end at the edges of its rows.

    offset: the position of a line's first token, always 0.
    stateless: True; a layer may be called with it any number of times.
    """

    offset = 0
    stateless = True

    def __init__(self, masks: _Masks) -> None:
        """Masks are made once for all entries."""
        self._masks = masks

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values as they are."""
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """What each token sees: bool [lines, 1, N, N], True for the tokens of its row up to itself, at most `window_size`.

        Always an array. Raises ValueError where N is not the width of the segments.
        """
        return self._masks.of(N, window_size)


class _Masks:
    """The masks of one batch by window, each made once."""

    def __init__(self, segments: mx.array, grouped_heads: bool) -> None:
        self._width = segments.shape[1]
        places = mx.arange(self._width)
        self._distances = places[:, None] - places
        own = (segments[:, :, None] == segments[:, None]) & (self._distances >= 0)  # a pad's own are the pads before it
        self._own = own[:, None, None] if grouped_heads else own[:, None]
        self._made: dict[int, mx.array] = {self._width: self._own}

    def of(self, width: int, window: int | None) -> mx.array:
        """The mask for lines of `width` and a window; None or 0 for no window."""
        if width != self._width:
            raise ValueError(f"The model asks for a mask of {width} tokens; the segments have {self._width}.")
        window = min(window or width, width)
        if window not in self._made:
            self._made[window] = self._own & (self._distances < window)
        return self._made[window]


def _obstacle(entry: object) -> str | None:
    """What a layer with this entry does that mixes rows, or None."""
    kinds = [type(each) for each in (entry.caches if isinstance(entry, CacheList) else [entry])]
    if any(issubclass(kind, ArraysCache) for kind in kinds):
        return "keeps a recurrent state, which would leak from row to row"
    if any(issubclass(kind, ChunkedKVCache) for kind in kinds):
        return "attends in chunks counted from the start of a line, where a row begins anywhere"
    # A rotating one holds a window, which the model asks its mask for.
    if type(entry) not in (KVCache, RotatingKVCache):
        return f"keeps a {type(entry).__name__}, of which it is not known whether it mixes rows"
    return None


def _groups_heads(model: nn.Module) -> bool:
    """Whether attention scores have an axis for groups of heads, [lines, groups, heads of a group, width, width].

    Gemma 2 alone makes them so. A mask of four axes would there lay the lines along the groups.
    """
    modules = model.layers[0].modules()
    return any(hasattr(each, "attn_logit_softcapping") and getattr(each, "repeats", 1) > 1 for each in modules)

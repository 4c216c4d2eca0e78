"""The hold-out rows that an export is scored on: spread evenly over all of them, the same for every export of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from finetune_dataflow.engine.chat import Conversation
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns


@dataclass(frozen=True)
class GateRow:
    """One row: its tokens, and the text that a reply is scored against.

    ids: prompt, reply and end of turn. places: those tokens that are learned. prompt: the ids that generation is fed; empty
    where rows have no prompt. whole: whether `conversation` was tokenised without a cut.
    """

    row: int
    ids: tuple[int, ...]
    places: tuple[int, ...]
    prompt: tuple[int, ...]
    reference: str
    conversation: Conversation
    whole: bool


def gate_rows(tokens: TokenColumns, conversations: Sequence[Conversation], references: pd.DataFrame, count: int) -> list[GateRow]:
    """At most `count` rows, evenly spread, in their order; references: row and output_text of the rows in `tokens`."""
    by_row = {each.row: each for each in conversations}
    texts = dict(zip(references["row"], references["output_text"], strict=True))
    places = np.unique(np.linspace(0, len(tokens) - 1, min(count, len(tokens))).round().astype(int))
    prompts = int(tokens.prompt_lengths.max()) > 1
    return [_row(tokens, int(place), by_row, texts, prompts) for place in places]


def _row(tokens: TokenColumns, place: int, by_row: dict[int, Conversation], texts: dict[int, str], prompts: bool) -> GateRow:
    start, end = int(tokens.offsets[place]), int(tokens.offsets[place + 1])
    ids, row = tokens.input_ids[start:end].tolist(), int(tokens.rows[place])
    learned = np.flatnonzero(tokens.labels[start:end] != IGNORED)
    return GateRow(
        row,
        tuple(ids),
        tuple(int(each) for each in learned if each > 0),
        tuple(int(each) for each in tokens.prompt(place)) if prompts else (),
        texts[row],
        by_row[row],
        not bool(tokens.truncated[place]),
    )

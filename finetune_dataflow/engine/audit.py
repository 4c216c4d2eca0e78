"""The labels looked at before anything is trained: what is learned, what is not, and whether that can be right."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from finetune_dataflow.engine.batches import padded_places
from finetune_dataflow.engine.chat import ChatEncoder, Conversation
from finetune_dataflow.engine.quality import shown
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns
from finetune_dataflow.errors import UserError

EXAMPLES = 3  # rows that are shown token by token
COMPARED = 1000  # rows of a set whose prompt is rendered again as generation does it
LEARNED, MASKED, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class SetAudit:
    """The labels of one set. Shares are of its tokens; `padded` is of the places in its batches."""

    rows: int
    tokens: int
    supervised: float
    padded: float
    truncated_rows: int
    joint_differs: int
    skipped_turns: int
    longest: int


@dataclass(frozen=True)
class Piece:
    """Some tokens of a row, decoded, and whether they are learned."""

    text: str
    learned: bool


@dataclass(frozen=True)
class LabelAudit:
    """The audit of some sets, and a few rows of the first decoded."""

    sets: dict[str, SetAudit]
    examples: tuple[tuple[int, tuple[Piece, ...]], ...]

    def lines(self) -> list[str]:
        """The figures for a terminal, a line a set."""
        lines = []
        for name, each in self.sets.items():
            notes = [
                f"{count} {what}"
                for count, what in (
                    (each.truncated_rows, "rows with a shortened prompt"),
                    (each.joint_differs, "rows whose joint tokenisation would differ"),
                    (each.skipped_turns, "earlier replies not learned"),
                )
                if count
            ]
            lines.append(
                f"{name.replace('_', '-')}: {each.rows} rows, {each.tokens} tokens (longest row {each.longest}), "
                f"{each.supervised:.1%} learned, {each.padded:.1%} of the batches padding"
                + "".join(f", {note}" for note in notes)
            )
        return lines

    def coloured(self) -> str:
        """The example rows for a terminal: green is learned, dim is not."""
        rows = []
        for row, pieces in self.examples:
            marked = (f"{LEARNED if each.learned else MASKED}{shown(each.text, 2000)}{PLAIN}" for each in pieces)
            rows.append(f"row {row}: " + "".join(marked))
        return "\n".join(rows)

    def plain(self) -> str:
        """The example rows where colours cannot be shown: what is learned stands in [[double brackets]]."""
        return "\n".join(
            f"row {row}: "
            + "".join(f"[[{shown(each.text, 2000)}]]" if each.learned else shown(each.text, 2000) for each in pieces)
            for row, pieces in self.examples
        )

    def html(self) -> str:
        """The example rows as a fragment of HTML, everything from the data escaped."""
        rows = []
        for row, pieces in self.examples:
            spans = "".join(
                f'<span class="{"learned" if each.learned else "masked"}">{html.escape(each.text)}</span>' for each in pieces
            )
            rows.append(f'<pre class="audited-row" data-row="{row}">{spans}</pre>')
        figures = "".join(f"<li>{html.escape(line)}</li>" for line in self.lines())
        style = ".learned{background:#c8f0d0;color:#063}.masked{color:#777}.audited-row{white-space:pre-wrap}"
        return f"<style>{style}</style>\n<ul>{figures}</ul>\n" + "\n".join(rows) + "\n"


def label_audit(
    encoder: ChatEncoder, sets: Mapping[str, tuple[Sequence[Conversation], TokenColumns]], batch_size: int = 4
) -> LabelAudit:
    """The audit of each set. Raises UserError naming the rows where labels cannot be right.

    Every row must have a supervised token, must learn the token that ends its turn, and must have the prompt that
    generation is fed (compared anew on the first thousand rows of a set).
    """
    problems = []
    for name, (conversations, columns) in sets.items():
        ends = columns.offsets[1:] - 1
        problems += _problem(name, "have no supervised token", columns.rows[columns.row_supervised == 0])
        stops = np.zeros(len(columns), np.bool_)
        for start, end in columns.parts():
            stops[start:end] = columns.labels[ends[start:end]] == encoder.end_of_turn_ids[-1]
            columns.release()
        problems += _problem(name, "do not learn the token that ends a turn", columns.rows[~stops])
        other = _other_prompts(encoder, conversations, columns)
        problems += _problem(name, "have another prompt than generation is fed", other)
    if problems:
        raise UserError("The label audit refuses to train: " + "; ".join(problems) + ".")
    _, train = next(iter(sets.values()))
    chosen = np.linspace(0, len(train) - 1, min(EXAMPLES, len(train))).astype(int)
    examples = tuple((int(train.rows[index]), _pieces(encoder, train, int(index))) for index in chosen)
    return LabelAudit({name: _set_audit(columns, batch_size) for name, (_, columns) in sets.items()}, examples)


def _problem(name: str, what: str, rows: np.ndarray) -> list[str]:
    if not len(rows):
        return []
    named = ", ".join(map(str, rows[:10].tolist())) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    return [f"{len(rows)} rows of the {name.replace('_', '-')} set {what} (rows {named})"]


def _other_prompts(encoder: ChatEncoder, conversations: Sequence[Conversation], columns: TokenColumns) -> np.ndarray:
    by_row = _by_row(conversations, columns.rows[:COMPARED].tolist())
    other = [
        int(columns.rows[index])
        for index in range(min(len(columns), COMPARED))
        if not columns.truncated[index]
        and columns.prompt(index) != encoder.start_ids
        and (conversation := by_row.get(int(columns.rows[index]))) is not None
        and encoder.prompt_ids(conversation.prompt, conversation.tools) != columns.prompt(index)
    ]
    return np.array(other, np.int64)


def _by_row(conversations: Sequence[Conversation], rows: Sequence[int]) -> dict[int, Conversation]:
    """The conversations of some rows. Rows are in the order of their conversations, so these stand at the beginning."""
    found: dict[int, Conversation] = {}
    for start in range(0, len(conversations), COMPARED):
        if all(row in found for row in rows):
            break
        found |= {each.row: each for each in conversations[start : start + COMPARED]}
    return found


def _set_audit(columns: TokenColumns, batch_size: int) -> SetAudit:
    places = padded_places(columns, batch_size)
    used = int((columns.lengths - 1).sum())
    return SetAudit(
        rows=len(columns),
        tokens=len(columns.input_ids),
        supervised=columns.supervised / max(len(columns.input_ids), 1),
        padded=1 - used / places if places else 0.0,
        truncated_rows=int(columns.truncated.sum()),
        joint_differs=int(columns.joint_differs.sum()),
        skipped_turns=int(columns.skipped_turns.sum()),
        longest=int(columns.lengths.max()) if len(columns) else 0,
    )


def _pieces(encoder: ChatEncoder, columns: TokenColumns, index: int) -> tuple[Piece, ...]:
    ids, learned = columns.row_ids(index), columns.row_labels(index) != IGNORED
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    return tuple(Piece(encoder.decode(ids[start:end].tolist()), bool(learned[start])) for start, end in pairwise(borders))

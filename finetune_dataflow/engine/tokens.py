"""Token ids and labels of many rows as flat columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token that is not learned, as in transformers


@dataclass(frozen=True)
class DroppedRow:
    """A row that is not used, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class TokenColumns:
    """The tokens of n rows, one after another, in flat columns.

    rows: int64 [n], each row's number in the data file.
    offsets: int64 [n + 1]; row i holds the tokens offsets[i]:offsets[i + 1].
    input_ids: int32 [total]; prompt, reply and end of turn.
    labels: int32 [total]; the token's own id where it is learned, -100 elsewhere (not shifted).
    prompt_lengths: int32 [n]; the first tokens of a row are exactly those that generation is fed.
    truncated: bool [n]; True where the input text was cut to fit `max_seq_length`.
    joint_differs: bool [n]; True where tokenising prompt and reply as one text would give other ids.
    skipped_turns: int32 [n]; earlier replies that could not be learned.
    dropped: the rows that were left out.
    """

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    joint_differs: NDArray[np.bool_]
    skipped_turns: NDArray[np.int32]
    dropped: tuple[DroppedRow, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything in the columns."""
        digest = hashlib.sha256(repr(self.dropped).encode())
        for each in (self.rows, self.offsets, self.input_ids, self.labels, self.prompt_lengths, self.truncated):
            digest.update(f"{each.dtype}{each.shape}".encode() + each.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """The number of rows that are used."""
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def supervised(self) -> int:
        """Tokens that are learned, over all rows."""
        return int((self.labels != IGNORED).sum())

    def row_ids(self, index: int) -> NDArray[np.int32]:
        """The token ids of the row at `index`, int32 [length]."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    def row_labels(self, index: int) -> NDArray[np.int32]:
        """The labels of the row at `index`, int32 [length]."""
        return self.labels[self.offsets[index] : self.offsets[index + 1]]

    def prompt(self, index: int) -> list[int]:
        """The prompt of the row at `index`, as generation is fed it."""
        return self.row_ids(index)[: self.prompt_lengths[index]].tolist()

    def take(self, indices: Sequence[int]) -> TokenColumns:
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        places = [np.arange(self.offsets[index], self.offsets[index + 1]) for index in chosen]
        flat = np.concatenate(places) if places else np.zeros(0, np.int64)
        return TokenColumns(
            rows=self.rows[chosen],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[chosen])]).astype(np.int64),
            input_ids=self.input_ids[flat],
            labels=self.labels[flat],
            prompt_lengths=self.prompt_lengths[chosen],
            truncated=self.truncated[chosen],
            joint_differs=self.joint_differs[chosen],
            skipped_turns=self.skipped_turns[chosen],
        )


@dataclass(frozen=True)
class EncodedRow:
    """One row's tokens before they join the columns.

    prompt: the ids that generation is fed. prompt_labels: what is learned of them, -100 everywhere where not given.
    reply: the ids of the last reply with the tokens that end its turn; all are learned.
    joint_differs: True where tokenising prompt and reply as one text would give other ids.
    skipped_turns: earlier replies that should be learned, but that the template writes otherwise than a last one.
    """

    row: int
    prompt: Sequence[int]
    reply: Sequence[int]
    truncated: bool = False
    prompt_labels: Sequence[int] | None = None
    joint_differs: bool = False
    skipped_turns: int = 0

    @property
    def length(self) -> int:
        """Tokens of the row, prompt and reply together."""
        return len(self.prompt) + len(self.reply)


def token_columns(encoded: Sequence[EncodedRow], dropped: Sequence[DroppedRow] = ()) -> TokenColumns:
    """The columns of some encoded rows: labels as the rows say, and every token of the last reply its own label."""
    lengths = [each.length for each in encoded]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    input_ids = np.zeros(offsets[-1], np.int32)
    labels = np.full(offsets[-1], IGNORED, np.int32)
    for each, start, end in zip(encoded, offsets[:-1], offsets[1:], strict=True):
        reply_start = start + len(each.prompt)
        input_ids[start:reply_start] = each.prompt
        if each.prompt_labels is not None:
            labels[start:reply_start] = each.prompt_labels
        input_ids[reply_start:end] = each.reply
        labels[reply_start:end] = each.reply
    return TokenColumns(
        rows=np.array([each.row for each in encoded], np.int64),
        offsets=offsets,
        input_ids=input_ids,
        labels=labels,
        prompt_lengths=np.array([len(each.prompt) for each in encoded], np.int32),
        truncated=np.array([each.truncated for each in encoded], np.bool_),
        joint_differs=np.array([each.joint_differs for each in encoded], np.bool_),
        skipped_turns=np.array([each.skipped_turns for each in encoded], np.int32),
        dropped=tuple(dropped),
    )

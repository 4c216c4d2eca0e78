"""Token ids and labels of many rows as flat columns."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**20  # values that are hashed together
PART = 2**15  # rows that are looked at together
IGNORED = -100  # the label of a token that is not learned, as in transformers


@dataclass(frozen=True)
class DroppedRow:
    """A row that is not used, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Stored:
    """Where columns are kept as files: their directory, the memory maps of the large ones, and the fingerprint of all."""

    directory: Path
    maps: tuple[mmap.mmap, ...]
    fingerprint: str


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
    stored: the files that `input_ids` and `labels` are memory maps of; None where they are in memory.
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
    stored: Stored | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Columns that are files are pickled as the name of their directory."""
        if self.stored is not None:
            from finetune_dataflow.engine.shards import opened

            return opened, (self.stored.directory,)
        return type(self), tuple(getattr(self, each.name) for each in fields(self))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything in the columns."""
        return self.stored.fingerprint if self.stored is not None else self.content_hash

    @cached_property
    def content_hash(self) -> str:
        """The fingerprint, computed from the content wherever it stands."""
        digest = hashlib.sha256(repr(self.dropped).encode())
        for each in (self.rows, self.offsets, self.input_ids, self.labels, self.prompt_lengths, self.truncated):
            digest.update(f"{each.dtype}{each.shape}".encode())
            for start in range(0, len(each), BLOCK):
                digest.update(np.ascontiguousarray(each[start : start + BLOCK]).data)
                self.release()
        return digest.hexdigest()

    def release(self) -> None:
        """Let the system take back the memory of what was read; where the columns are files, they are read again if needed."""
        if self.stored is not None:
            for each in self.stored.maps:
                each.madvise(mmap.MADV_DONTNEED)

    def __len__(self) -> int:
        """The number of rows that are used."""
        return len(self.rows)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> int:
        """Tokens that are learned, over all rows."""
        return int(self.row_supervised.sum())

    @cached_property
    def row_supervised(self) -> NDArray[np.int64]:
        """Tokens that are learned of each row, int64 [n]."""
        counts = np.zeros(len(self), np.int64)
        for start, end in self.parts():
            learned = self.labels[self.offsets[start] : self.offsets[end]] != IGNORED
            before = np.concatenate([[0], np.cumsum(learned)])
            counts[start:end] = np.diff(before[self.offsets[start : end + 1] - self.offsets[start]])
            self.release()
        return counts

    def parts(self) -> Iterator[tuple[int, int]]:
        """The rows as ranges of some thousand, for what looks at all of them: (first, end)."""
        return ((start, min(start + PART, len(self))) for start in range(0, len(self), PART))

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
        chosen = np.asarray(indices, np.int64)
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        return TokenColumns(
            rows=self.rows[chosen],
            offsets=offsets,
            input_ids=self.input_ids[flat],
            labels=self.labels[flat],
            prompt_lengths=self.prompt_lengths[chosen],
            truncated=self.truncated[chosen],
            joint_differs=self.joint_differs[chosen],
            skipped_turns=self.skipped_turns[chosen],
        )


@dataclass(slots=True)  # not frozen: millions are made
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
    prompts = np.array([len(each.prompt) for each in encoded], np.int64)
    replies = np.array([len(each.reply) for each in encoded], np.int64)
    offsets = np.concatenate([[0], np.cumsum(prompts + replies)]).astype(np.int64)
    texts = (text for each in encoded for text in (each.prompt, each.reply))
    input_ids = np.fromiter(chain.from_iterable(texts), np.int32, int(offsets[-1]))
    in_reply = np.tile([False, True], len(encoded)).repeat(np.stack([prompts, replies], axis=1).reshape(-1))
    labels = np.where(in_reply, input_ids, np.int32(IGNORED))
    for each, start in zip(encoded, offsets[:-1], strict=True):
        if each.prompt_labels is not None:
            labels[start : start + len(each.prompt)] = each.prompt_labels
    return TokenColumns(
        rows=np.array([each.row for each in encoded], np.int64),
        offsets=offsets,
        input_ids=input_ids,
        labels=labels,
        prompt_lengths=prompts.astype(np.int32),
        truncated=np.array([each.truncated for each in encoded], np.bool_),
        joint_differs=np.array([each.joint_differs for each in encoded], np.bool_),
        skipped_turns=np.array([each.skipped_turns for each in encoded], np.int32),
        dropped=tuple(dropped),
    )


def joined(parts: Sequence[TokenColumns]) -> TokenColumns:
    """The columns of some columns one after another."""
    if len(parts) == 1:
        return parts[0]
    parts = parts or [token_columns([])]
    return TokenColumns(
        rows=np.concatenate([each.rows for each in parts]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([each.lengths for each in parts]))]).astype(np.int64),
        input_ids=np.concatenate([each.input_ids for each in parts]),
        labels=np.concatenate([each.labels for each in parts]),
        prompt_lengths=np.concatenate([each.prompt_lengths for each in parts]),
        truncated=np.concatenate([each.truncated for each in parts]),
        joint_differs=np.concatenate([each.joint_differs for each in parts]),
        skipped_turns=np.concatenate([each.skipped_turns for each in parts]),
        dropped=tuple(row for each in parts for row in each.dropped),
    )

"""Records as a table, which any user can replace by a table of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from finetune_dataflow.engine.many_rows import CHUNK, lines_fingerprint, paused
from finetune_dataflow.engine.shapes import Record, ShapedRows

OPTIONAL: dict[str, Any] = {"contexts": (), "messages": (), "tools": (), "columns": {}, "group": None, "side": None}


@paused()
def table(shaped: ShapedRows) -> pd.DataFrame:
    """The records, a line each."""
    columns: dict[str, Any] = {"row": np.fromiter((record.row for record in shaped.records), np.int64, len(shaped.records))}
    for name in ("input_text", "output_text", *OPTIONAL):
        columns[name] = _objects([getattr(record, name) for record in shaped.records])
    columns["identity"] = _objects([_identity(record) for record in shaped.records])
    return pd.DataFrame(columns)


def _objects(values: list[Any]) -> np.ndarray[Any, np.dtype[np.object_]]:
    """The values as a column, those that are lists themselves, too."""
    column = np.empty(len(values), object)
    column[:] = values
    return column


def identities(rows: pd.DataFrame) -> pd.Series:
    """The text by which each row is dealt to a set: `identity`, or `input_text` in a table of a user's own."""
    return rows["identity"] if "identity" in rows else rows["input_text"]


def each_record(rows: pd.DataFrame) -> Iterator[Record]:
    """The lines of a table as records; columns that a table of a user's own lacks are empty."""
    for start in range(0, len(rows), CHUNK):
        part = rows.iloc[start : start + CHUNK]
        columns = [part[name].tolist() if name in part else [default] * len(part) for name, default in OPTIONAL.items()]
        numbers = map(int, part["row"].tolist())
        for row, input_text, output_text, *optional in zip(
            numbers, part["input_text"].tolist(), part["output_text"].tolist(), *columns, strict=True
        ):
            yield Record(row, input_text, output_text, *optional)


def fingerprint(rows: pd.DataFrame) -> str:
    """SHA-256 (hex) of the records in their order."""
    names = [name for name in ("input_text", "output_text", "contexts", "messages", "tools", "group", "side") if name in rows]
    return lines_fingerprint(lines(rows, names))


def lines(rows: pd.DataFrame, names: Sequence[str]) -> Iterator[list[Any]]:
    """Some columns of a table line by line."""
    for start in range(0, len(rows), CHUNK):
        yield from rows[list(names)].iloc[start : start + CHUNK].to_numpy().tolist()


def _identity(record: Record) -> str:
    """The input: the last question, the whole conversation before the last reply, or a text without one itself."""
    if record.messages:
        said = [str(message.get("content") or "") for message in record.messages[:-1] if message["role"] != "system"]
        return "\n".join(said)
    return record.input_text or record.output_text

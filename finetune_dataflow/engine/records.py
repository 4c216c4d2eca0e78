"""Records as a table, which any user can replace by a table of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from finetune_dataflow.engine.files import fingerprint as json_fingerprint
from finetune_dataflow.engine.shapes import Record, ShapedRows

OPTIONAL: dict[str, Any] = {"contexts": (), "messages": (), "tools": (), "columns": {}, "group": None, "side": None}


def table(shaped: ShapedRows) -> pd.DataFrame:
    """The records, a line each."""
    names = ["row", "input_text", "output_text", *OPTIONAL]
    columns = {name: [getattr(record, name) for record in shaped.records] for name in names}
    columns["identity"] = [_identity(record) for record in shaped.records]
    return pd.DataFrame({name: pd.Series(values, dtype=None if name == "row" else object) for name, values in columns.items()})


def identities(rows: pd.DataFrame) -> pd.Series:
    """The text by which each row is dealt to a set: `identity`, or `input_text` in a table of a user's own."""
    return rows["identity"] if "identity" in rows else rows["input_text"]


def each_record(rows: pd.DataFrame) -> Iterator[Record]:
    """The lines of a table as records; columns that a table of a user's own lacks are empty."""
    for line in rows.to_dict("records"):
        optional = {name: line.get(name, default) for name, default in OPTIONAL.items()}
        yield Record(row=int(line["row"]), input_text=line["input_text"], output_text=line["output_text"], **optional)


def fingerprint(rows: pd.DataFrame) -> str:
    """SHA-256 (hex) of the records in their order."""
    names = [name for name in ("input_text", "output_text", "contexts", "messages", "tools", "group", "side") if name in rows]
    return json_fingerprint(rows[names].to_numpy().tolist())


def _identity(record: Record) -> str:
    """The input: the last question, the whole conversation before the last reply, or a text without one itself."""
    if record.messages:
        said = [str(message.get("content") or "") for message in record.messages[:-1] if message["role"] != "system"]
        return "\n".join(said)
    return record.input_text or record.output_text

"""From a data file to records: one row a question and its reply, every row accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from finetune_dataflow import engine
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import checked_start


@dataclass(frozen=True)
class DataSource:
    """Where the rows come from, and which keys hold the texts."""

    data_path: str
    input_text_key: str
    output_text_key: str


@checked_start
def data_source(data_path: str, input_text_key: str, output_text_key: str) -> DataSource:
    """The data file and the two keys that hold the input text and the output text of a row.

    Inputs:
        data_path: The data file: a JSON list of objects, or JSON lines.
        input_text_key: The key of the text that the model is given.
        output_text_key: The key of the text that the model learns to reply.
    """
    if input_text_key == output_text_key:
        raise UserError(f"input_text_key and output_text_key are both {input_text_key!r}. Expected two different keys.")
    return DataSource(data_path, input_text_key, output_text_key)


def records(data_source: DataSource) -> pd.DataFrame:
    """Every row of the data file: `row` (its number, from 1), `input_text`, `output_text`.

    Raises UserError naming the file and the rows that are no objects, lack a key, or hold no text under it.
    """
    path = engine.files.user_path(data_source.data_path)
    pairs = engine.rows.text_pairs(path, engine.rows.read_rows(path), data_source.input_text_key, data_source.output_text_key)
    return pd.DataFrame(pairs, columns=["row", "input_text", "output_text"])


def dataset_fingerprint(records: pd.DataFrame) -> str:
    """The SHA-256 of the records' texts in their order; the file's formatting does not count."""
    return engine.files.fingerprint(records[["input_text", "output_text"]].to_numpy().tolist())

"""From a data source to records: one row a question and its reply, every row accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.shapes import ShapedRows, ShapeSettings
from finetune_dataflow.engine.sources import Source
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import checked_start


@dataclass(frozen=True)
class DataSource:
    """Where the rows come from, and how a row is read."""

    data_path: str
    input_text_key: str
    output_text_key: str
    context_key: str
    group_key: str
    row_shape: str
    object_format: str


@checked_start
def data_source(
    data_path: str,
    input_text_key: str = "",
    output_text_key: str = "",
    context_key: str = "",
    group_key: str = "",
    row_shape: str = "auto",
    object_format: str = "json",
) -> DataSource:
    """Where the rows come from, and how a row is read.

    Inputs:
        data_path: The data: a JSON, JSON lines, CSV or Parquet file, a directory with train/valid/test files or a saved
            Hugging Face dataset, a dataset of the hub (owner/name), or a URL of fsspec (s3://, https://, ...).
        input_text_key: The key of the text that the model is given; empty where the rows' shape says it.
        output_text_key: The key of the text that the model learns to reply; empty where the rows' shape says it.
        context_key: The key of further text for the prompt, a text or a list of texts.
        group_key: The key of what must stay on one side of the split: a customer, a thread.
        row_shape: The shape of the rows: auto (found out), key_mapping, prompt_completion, messages, text, input_output,
            context_response, sharegpt or alpaca.
        object_format: How an input that is itself an object becomes text: json, or labelled.
    """
    if input_text_key and input_text_key == output_text_key:
        raise UserError(f"input_text_key and output_text_key are both {input_text_key!r}. Expected two different keys.")
    return DataSource(data_path, input_text_key, output_text_key, context_key, group_key, row_shape, object_format)


@computed_anew
def source_content(data_source: DataSource) -> str:
    """The fingerprint of the data's bytes; of what lies elsewhere another one each time, because only reading it can tell."""
    return engine.path_contents.source_content(data_source.data_path)


def source_rows(data_source: DataSource, source_content: str) -> Source:
    """Every row of the data as it stands there, with its number, and its set where the data says one.

    Raises UserError naming the file and the place where it cannot be read, or where it changed while it was read.
    """
    rows = engine.sources.read_source(data_source.data_path)
    engine.path_contents.check_unchanged(data_source.data_path, source_content)
    return rows


def shaped_rows(source_rows: Source, data_source: DataSource) -> ShapedRows:
    """Every row read as a record of one shape: texts, contexts, messages. What was left out is named with its reason.

    Raises UserError naming the rows that lack a key, hold no text under it, or are of another shape than the others.
    """
    source = data_source
    settings = ShapeSettings(
        source.row_shape,
        source.input_text_key,
        source.output_text_key,
        source.context_key,
        source.group_key,
        source.object_format,
    )
    return engine.shapes.records(source_rows, settings)


def records(shaped_rows: ShapedRows) -> pd.DataFrame:
    """A row a record: `row` (its number, from 1), `input_text`, `output_text`, `identity` (what the split goes by), and
    `contexts`, `messages`, `tools`, `columns`, `group`, `side` where the data has them.
    """
    return engine.records.table(shaped_rows)


def dataset_fingerprint(records: pd.DataFrame) -> str:
    """The SHA-256 of the records in their order; the file's formatting does not count."""
    return engine.records.fingerprint(records)

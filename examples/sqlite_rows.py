"""Rows from an SQLite database: `python run.py plan --data support.db --module examples/sqlite_rows.py`.

The function takes the place of the node `source_rows`. Everything after it stays: shapes, split, tokens, fit, verdict.
The database has a table `support` with the columns `question` and `reply`.
"""

import sqlite3
from contextlib import closing

from finetune_dataflow.dataset import DataSource
from finetune_dataflow.engine.sources import Source, SourceRow


def source_rows(data_source: DataSource) -> Source:
    """Every row of the table `support`, as an object of its columns."""
    with closing(sqlite3.connect(f"file:{data_source.data_path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        found = [dict(row) for row in connection.execute("SELECT question, reply FROM support ORDER BY rowid")]
    rows = tuple(SourceRow(number, row, None, f"row {number}") for number, row in enumerate(found, start=1))
    return Source(rows, kind="SQLite table support", has_sides=False, location=data_source.data_path)

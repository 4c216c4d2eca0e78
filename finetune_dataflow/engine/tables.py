"""The rows of tables: CSV and TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import math
from collections import Counter
from typing import TYPE_CHECKING

from finetune_dataflow.engine.parsing import ParsedFile, ParsedRow, checked
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]


def separated_rows(name: str, text: str, suffix: str) -> ParsedFile:
    """The records of CSV or TSV: every cell is text as it stands, an empty one null; a row's place is its first line.

    Raises UserError naming the line of a row that has not a cell for each column or has a quote out of place.
    """
    first_line = text.lstrip("\r\n").splitlines()[0]
    delimiter = "\t" if suffix == ".tsv" else ";" if ";" in first_line and "," not in first_line else ","
    told = {"\t": "TSV", ";": "CSV (separated by ';')", ",": "CSV"}[delimiter]
    rows: list[ParsedRow] = []
    header: list[str] | None = None
    line = 1
    limit = csv.field_size_limit(len(text) + 1)  # the module's default refuses fields above 128 KiB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(name, start, cells)
            elif len(cells) != len(header):
                raise UserError(
                    f"{name}: line {start}: {_counted(len(cells), 'cell')}, but {_counted(len(header), 'column')} in the header. "
                    f"A cell that contains {delimiter!r}, a quote or a line break must stand in double quotes."
                )
            else:
                value = {key: cell or None for key, cell in zip(header, cells, strict=True)}
                rows.append(ParsedRow(len(rows) + 1, value, f"line {start}"))
    except csv.Error as error:
        raise UserError(
            f"{name}: line {line}: not {told} ({error}). The row that begins there has a quote out of place."
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise UserError(f"{name} has a header and no rows.")
    return ParsedFile(tuple(rows), told)


def _header(name: str, line: int, cells: list[str]) -> list[str]:
    twice, count = Counter(cells).most_common(1)[0]
    if count > 1:
        named = f"the column {twice!r} is there twice" if twice else "two columns have no name"
        raise UserError(f"{name}: line {line}: {named}. Expected a header with a name of its own for each column.")
    return cells


def parquet_rows(name: str, data: bytes) -> ParsedFile:
    """The rows of a Parquet file as JSON values; UserError where it is none or is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    if not data:
        raise UserError(f"{name} is empty. Expected a Parquet file.")
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: not readable as Parquet ({error}).") from error
    if not table.num_rows:
        raise UserError(f"{name} has no rows.")
    rows, remark = table_rows(name, table)
    return ParsedFile(rows, f"Parquet{remark}")


def table_rows(name: str, table: pa.Table) -> tuple[tuple[ParsedRow, ...], str]:
    """The rows of an Arrow table as JSON values, and a remark on the columns left out because they hold bytes.

    Dates become ISO text, decimals their text, and a number that is none (NaN, infinity) is null.
    """
    import pyarrow as pa

    names = table.column_names
    twice, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise UserError(f"{name}: the column {twice!r} is there twice.")
    binary = [field.name for field in table.schema if _holds_bytes(field.type)]
    try:
        values = table.drop_columns(binary).to_pylist() if len(binary) < len(names) else [{}] * table.num_rows
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{name}: a value cannot be read: {error}") from error
    rows = tuple(
        ParsedRow(number, checked(f"{name}: row {number}", _plain(value)), f"row {number}")
        for number, value in enumerate(values, start=1)
    )
    return rows, f", without the columns of bytes {', '.join(map(repr, binary))}" if binary else ""


def _holds_bytes(arrow_type: pa.DataType) -> bool:
    import pyarrow.types as types  # type: ignore[import-untyped]

    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    if any(test(arrow_type) for test in tests):
        return True
    if types.is_dictionary(arrow_type):
        return _holds_bytes(arrow_type.value_type)
    return any(_holds_bytes(arrow_type.field(index).type) for index in range(arrow_type.num_fields))


def _plain(value: object) -> object:
    """A value of Arrow's as JSON has it."""
    match value:
        case str() | bool() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | datetime.timedelta():
            return str(value)
    return str(value)  # an extension type's (a UUID, …)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

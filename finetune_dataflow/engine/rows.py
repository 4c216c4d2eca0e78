"""Reading the rows of a JSON list or of JSON lines, with every mistake named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finetune_dataflow.errors import UserError, nearest

SHOWN = 10  # row numbers named in one message


@dataclass(frozen=True)
class Row:
    """One row of a data file. `number` counts from 1; in JSON lines it is the line's number."""

    number: int
    value: object


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON list (`.json`) or of JSON lines (`.jsonl`, or objects one after another).

    Raises UserError where the file is missing, empty, not UTF-8, not JSON, or JSON but not a list.
    """
    text = _text(path)
    if path.suffix.lower() in {".jsonl", ".ndjson"}:
        return _line_rows(path, text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _line_rows(path, text)
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}). "
            "Expected a JSON list of objects, or one JSON object a line."
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: not readable as JSON: nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}.") from error
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {_kind(value)}.")
    if not value:
        raise UserError(f"{path}: the list is empty. Expected a JSON list of objects.")
    return [Row(number, each) for number, each in enumerate(value, start=1)]


def text_pairs(path: Path, rows: list[Row], input_text_key: str, output_text_key: str) -> list[tuple[int, str, str]]:
    """(row number, input text, output text) of every row; one UserError names all rows that have not both texts."""
    not_objects = [row.number for row in rows if not isinstance(row.value, dict)]
    if not_objects:
        found = _kind(next(row.value for row in rows if row.number == not_objects[0]))
        raise UserError(f"{path}: expected an object in every row, found {found} in {_rows_named(not_objects)}.")
    objects = [(row.number, row.value) for row in rows if isinstance(row.value, dict)]
    problems = []
    for key in dict.fromkeys((input_text_key, output_text_key)):
        missing = [number for number, value in objects if key not in value]
        if missing:
            keys = sorted(next(value for number, value in objects if number == missing[0]))
            problems.append(
                f"the key {key!r} is missing in {_rows_named(missing)}. "
                f"Row {missing[0]} has the keys {', '.join(map(repr, keys)) or 'none'}.{nearest(key, keys)}"
            )
        not_text = [number for number, value in objects if key in value and not isinstance(value[key], str)]
        if not_text:
            found = _kind(next(value[key] for number, value in objects if number == not_text[0]))
            problems.append(f"{key!r} must be text; found {found} in {_rows_named(not_text)}.")
        empty = [number for number, value in objects if isinstance(value.get(key), str) and not value[key].strip()]
        broken = [number for number, value in objects if isinstance(value.get(key), str) and not _encodable(value[key])]
        if broken:
            problems.append(f"{key!r} has half a character (a lone surrogate) in {_rows_named(broken)}.")
        if empty:
            problems.append(f"{key!r} is empty in {_rows_named(empty)}.")
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return [(number, value[input_text_key], value[output_text_key]) for number, value in objects]


def _text(path: Path) -> str:
    if not path.exists():
        siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"The data file {path} does not exist.{nearest(path.name, siblings)}")
    if path.is_dir():
        raise UserError(f"The data file {path} is a directory. Expected a JSON or JSONL file.")
    try:
        # utf-8-sig drops the byte order mark that some editors put in front.
        text = path.read_bytes().decode("utf-8-sig")
    except PermissionError as error:
        raise UserError(f"The data file {path} cannot be read: permission denied.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}). "
            "Save the file as UTF-8."
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty. Expected a JSON list of objects, or one JSON object a line.")
    return text


def _line_rows(path: Path, text: str) -> list[Row]:
    rows, problems = [], []
    # Only line feeds end a line: str.splitlines would also cut at U+2028, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row(number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            found = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problems.append(f"{path}: line {number}: not JSON ({found}).")
    if problems:
        more = [f"… and {len(problems) - SHOWN} lines more."] if len(problems) > SHOWN else []
        raise UserError("\n".join(problems[:SHOWN] + more) + "\nExpected one JSON object a line.")
    return rows


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    kinds = {bool: "a true/false value", int: "a number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


def _rows_named(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"

"""The rows of JSON lists and JSON lines. JSON as RFC 8259 has it: no NaN, no key twice, no half characters."""

from __future__ import annotations

import codecs
import json
import math
import re
from sys import intern
from typing import NoReturn

from finetune_dataflow.engine.parsing import EXPECTED, SHOWN, ParsedFile, ParsedRow, checked, kind, line_of
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.errors import UserError

PIECE = 2**22  # bytes that are decoded together
BYTES_WITH_BAR = 50_000_000  # below, reading takes about a second

_NESTED = frozenset({dict, list})
_BLANK = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """A value that is JSON to Python's reader and no good to us."""


def json_rows(name: str, text: str) -> ParsedFile:
    """The rows of a JSON list, or of JSON lines where the text is several objects one after another.

    Raises UserError naming the line and column, or the row, of what is not JSON or not allowed.
    """
    start = _after_blanks(text, 0)
    if text[start] == "[":
        return _list_rows(name, text, start + 1)
    value, end = _value(name, text, start, "")
    rest = _after_blanks(text, end)
    if rest < len(text):
        if text[start] == "{":
            return line_rows(name, text)
        _not_json(name, json.JSONDecodeError("Extra data", text, rest))
    raise UserError(f"{name}: expected a JSON list of objects, found {kind(value)}.")


def _list_rows(name: str, text: str, start: int) -> ParsedFile:
    """The elements of a JSON list, read one by one so that a mistake can name its row."""
    rows: list[ParsedRow] = []
    position = _after_blanks(text, start)
    if text[position : position + 1] == "]":
        raise UserError(f"{name}: the list is empty. Expected a JSON list of objects.")
    suspicious = bool(_SURROGATE.search(text))
    while True:
        place = f"row {len(rows) + 1}"
        value, end = _value(name, text, position, f"{place} ")
        rows.append(ParsedRow(len(rows) + 1, checked(f"{name}: {place}", value, suspicious), place))
        position = _after_blanks(text, end)
        mark = text[position : position + 1]
        position = _after_blanks(text, position + 1) if mark in {",", "]"} else position
        if mark == "]":
            break
        if mark != ",":
            _not_json(name, json.JSONDecodeError("Expecting ',' delimiter", text, position))
    if position < len(text):
        _not_json(name, json.JSONDecodeError("Extra data", text, position))
    return ParsedFile(tuple(rows), "JSON list")


def _value(name: str, text: str, position: int, row: str) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        _not_json(name, error)
    except RecursionError as error:
        raise UserError(f"{name}: {row}not readable as JSON: nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{name}: {row}(line {line_of(text, position)}) not readable as JSON: {_reason(error)}.") from error


def _not_json(name: str, error: json.JSONDecodeError) -> NoReturn:
    page = " It looks like a web page." if error.doc.lstrip().startswith("<") else ""
    raise UserError(f"{name}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}).{page} {EXPECTED}") from error


def line_rows(name: str, text: str) -> ParsedFile:
    """The rows of JSON lines, numbered by line; one UserError names all lines that are not JSON or not allowed."""
    rows: list[ParsedRow] = []
    problems: list[str] = []
    suspicious = bool(_SURROGATE.search(text))
    # str.splitlines would also cut at U+2028, which JSON allows inside strings. A raw carriage return it does not.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        stripped = line.strip()
        if not stripped:
            continue
        try:
            value, end = _DECODER.raw_decode(stripped)
            if end < len(stripped):
                raise json.JSONDecodeError("Extra data", stripped, end)
            rows.append(ParsedRow(number, checked(f"{name}: line {number}", value, suspicious), f"line {number}"))
        except json.JSONDecodeError as error:
            problems.append(f"{name}: line {number}: not JSON ({error.msg}).")
        except RecursionError:
            problems.append(f"{name}: line {number}: not JSON (nested too deeply).")
        except UserError as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"{name}: line {number}: {_reason(error)}.")
    if problems:
        more = [f"… and {len(problems) - SHOWN} lines more."] if len(problems) > SHOWN else []
        hint = " The file looks like a JSON list; give it a name that ends in .json." if text.lstrip().startswith("[") else ""
        raise UserError("\n".join(problems[:SHOWN] + more) + f"\nExpected one JSON object a line.{hint}")
    return ParsedFile(tuple(rows), "JSON lines")


def plain_line_rows(data: bytes) -> ParsedFile | None:
    """The rows of JSON lines in UTF-8, read a few megabytes at a time; None where anything is wrong, or nothing is there.

    What is wrong is told by `decoded` and `line_rows`, which look at the whole text.
    """
    rows: list[ParsedRow] = []
    position = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    number = 0
    bar = Bar(len(data), "bytes read") if len(data) >= BYTES_WITH_BAR else None
    try:
        while position < len(data):
            end = data.find(b"\n", position + PIECE) + 1 or len(data)
            text = str(memoryview(data)[position:end], "utf-8")
            number = _add_plain_rows(rows, text, number)
            if bar:
                bar.advance(end - position)
            position = end
    except (ValueError, RecursionError, UserError):
        return None
    if bar:
        bar.close()
    return ParsedFile(tuple(rows), "JSON lines") if rows else None


def _add_plain_rows(rows: list[ParsedRow], text: str, number: int) -> int:
    """Add the rows of whole lines that come after `number` others; the number of the last. ValueError where one is wrong."""
    suspicious = bool(_SURROGATE.search(text))
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=number + 1):  # noqa: B020 -- it goes on where the piece before ended
        stripped = line.strip()
        if not stripped:
            continue
        value, end = _DECODER.raw_decode(stripped)
        if end < len(stripped):
            raise _RefusedError("more than one value")
        nested = type(value) is not dict or not _NESTED.isdisjoint(map(type, value.values()))
        if suspicious or nested:
            checked("", value, suspicious)
        rows.append(ParsedRow(number, value, f"line {number}"))
    return number


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = {intern(key): value for key, value in pairs}  # each row would have keys of its own
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"the key {_cut(twice)!r} is there twice in one object")
    return values


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {_cut(literal)} is no number that JSON allows or a computer holds")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_finite, parse_float=_finite)


def _reason(error: ValueError) -> str:
    # The one other ValueError of the reader is Python's limit on the digits of a whole number.
    return str(error) if isinstance(error, _RefusedError) else "a whole number with thousands of digits"


def _after_blanks(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"

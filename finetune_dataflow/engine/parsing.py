"""What all data files have in common: rows with a place, text in UTF-8, values that can be walked."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass

from finetune_dataflow.errors import UserError

SHOWN = 10  # rows, lines or keys named in one message
DEEPEST = 100  # levels of lists and objects in one row; more is a mistake, and would overflow whoever walks the row
EXPECTED = "Expected a JSON list of objects, or one JSON object a line."
FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")

_MAGIC = {
    b"\x1f\x8b": "compressed with gzip. Unpack it first (gunzip)",
    b"PK\x03\x04": "a ZIP archive (an Excel workbook is one, too). Unpack it, or save the sheet as CSV",
    b"BZh91AY&SY": "compressed with bzip2. Unpack it first (bunzip2)",
    b"\xfd7zXZ\x00": "compressed with xz. Unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it first (unzstd)",
    b"SQLite format 3\x00": "an SQLite database. Save the table as CSV or JSON lines",
    b"ARROW1\x00": "an Arrow file. Name the directory that save_to_disk wrote, or save the table as Parquet",
}
_WIDE_MARKS = {  # the longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(slots=True)  # not frozen: millions are made
class ParsedRow:
    """One row of a file: `number` counts from 1 (in JSON lines the line's), `place` is what an error calls it."""

    number: int
    value: object
    place: str


@dataclass(frozen=True)
class ParsedFile:
    """The rows of one file, and what it was found to be."""

    rows: tuple[ParsedRow, ...]
    kind: str


def decoded(name: str, data: bytes) -> str:
    """The text of a file in UTF-8, without its byte order mark; UserError names what else it is."""
    for magic, meaning in _MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"{name} is {meaning}.")
    if wide := _wide_encoding(data):
        raise UserError(f"{name} is encoded as {wide}. Save the file as UTF-8.")
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise UserError(
            f"{name}: line {line_of(data, offset)}: not UTF-8 (byte 0x{data[offset]:02x} at offset {offset}). "
            "Save the file as UTF-8."
        ) from error
    if (offset := data.find(b"\0")) >= 0:
        raise UserError(
            f"{name}: line {line_of(data, offset)}: a NUL byte at offset {offset}. Expected text; the file is binary or damaged."
        )
    if not text.strip():
        raise UserError(f"{name} is empty. {EXPECTED}")
    return text


def kind(value: object) -> str:
    """What a value is, in a user's words: "a number", "an object"."""
    kinds = {bool: "a true/false value", int: "a number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


def checked(where: str, value: object, suspicious: bool = False) -> object:
    """`value`, or a UserError where it is nested too deeply or (looked for where `suspicious`) holds half a character."""
    level: list[object] = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            break
    else:
        raise UserError(f"{where}: nested too deeply. Expected at most {DEEPEST} levels of lists and objects.")
    if suspicious:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: \\u{ord(error.object[error.start]):04x} is half a character (a lone surrogate). "
                "Expected both halves (\\ud83d\\ude00), or the character itself."
            ) from error
    return value


def _wide_encoding(data: bytes) -> str:
    """The name of a wide encoding, by its mark or by its pattern of NUL bytes, or nothing."""
    for mark, encoding in _WIDE_MARKS.items():
        if data.startswith(mark):
            return encoding
    head = data[:400]
    zeros = [head[phase::4].count(0) / max(1, len(head[phase::4])) for phase in range(4)]
    mostly = [share > 0.7 for share in zeros]
    if mostly in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32"
    return "UTF-16" if mostly in ([False, True, False, True], [True, False, True, False]) else ""


def line_of(data: str | bytes, offset: int) -> int:
    """The line, from 1, that holds the character or byte at `offset`."""
    return 1 + (data.count("\n", 0, offset) if isinstance(data, str) else data.count(b"\n", 0, offset))

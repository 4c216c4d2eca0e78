"""Malformed files and rows: each ends in a message that names the place, or in rows that are all accounted for."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from finetune_dataflow.engine.shapes import SHAPES, ShapedRows, ShapeSettings, records
from finetune_dataflow.engine.sources import Source, SourceRow, read_source
from finetune_dataflow.errors import UserError

GOOD = '{"prompt": "a", "completion": "b"}'


def read(location: str, **named: str) -> ShapedRows:
    source = read_source(location)
    found = records(source, ShapeSettings(**named))
    assert len(found.records) + len(found.dropped) == len(source.rows)
    return found


def table(columns: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink)
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.json", GOOD)
    return sink.getvalue()


# Name -> content, and a part of the message that names the place or the cause.
FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "is empty"),
    "empty.csv": (b"", "is empty"),
    "empty.parquet": (b"", "is empty. Expected a Parquet file"),
    "spaces.csv": (b" \n\r\n\t", "is empty"),
    "only-mark.json": (b"\xef\xbb\xbf", "is empty"),
    "utf8.jsonl": (f"{GOOD}\n".encode() + b'{"prompt": "\xff"}', "line 2: not UTF-8 (byte 0xff at offset 47)"),
    "utf8-mark.jsonl": (b"\xef\xbb\xbf" + f"{GOOD}\n".encode() + b'"\xfe', "line 2: not UTF-8 (byte 0xfe at offset 39)"),
    "utf8.csv": (b"prompt,completion\na,b\nc,\xe9\n", "line 3: not UTF-8 (byte 0xe9 at offset 24)"),
    "cut-character.json": (b'[{"prompt": "\xe2\x82', "line 1: not UTF-8 (byte 0xe2 at offset 13)"),
    "surrogate-bytes.json": (b'[{"prompt": "\xed\xa0\x80"}]', "line 1: not UTF-8 (byte 0xed at offset 13)"),
    "utf16.json": (f"[{GOOD}]".encode("utf-16"), "is encoded as UTF-16"),
    "utf16-big.csv": ("\ufeffa,b\n1,2".encode("utf-16-be"), "is encoded as UTF-16"),
    "utf16-unmarked.json": (f"[{GOOD}]".encode("utf-16-le"), "is encoded as UTF-16"),
    "utf16-big-unmarked.json": (f"[{GOOD}]".encode("utf-16-be"), "is encoded as UTF-16"),
    "utf32.json": (f"[{GOOD}]".encode("utf-32"), "is encoded as UTF-32"),
    "utf32-unmarked.json": (f"[{GOOD}]".encode("utf-32-be"), "is encoded as UTF-32"),
    "nul.json": (b'[{"prompt":\n "a\0b"}]', "line 2: a NUL byte at offset 15"),
    "nul.csv": (b"a,b\n1,\0\n", "line 2: a NUL byte at offset 6"),
    "zeros.json": (bytes(1000), "line 1: a NUL byte at offset 0"),
    "escaped-nul-key.json": (b'[{"a\\u0000b": 1}]', "Keys found: 'a\\x00b'"),
    "gzip.jsonl": (gzip.compress(GOOD.encode()), "compressed with gzip. Unpack it first"),
    "bzip.jsonl": (bz2.compress(GOOD.encode()), "compressed with bzip2"),
    "xz.jsonl": (lzma.compress(GOOD.encode()), "compressed with xz"),
    "excel.csv": (zipped(), "a ZIP archive (an Excel workbook is one, too)"),
    "database.csv": (b"SQLite format 3\0" + bytes(80), "an SQLite database"),
    "half-line.jsonl": (f'{GOOD}\n{{"prompt": "c", "comp'.encode(), "line 2: not JSON"),
    "half-list.json": (f"[{GOOD},\n{GOOD}".encode(), "line 2, column 35: not JSON (Expecting ',' delimiter)"),
    "half-string.json": (b'[{"prompt": "a', "line 1, column 13: not JSON (Unterminated string"),
    "just-a-bracket.json": (b"[", "line 1, column 2: not JSON"),
    "trailing-comma.json": (f"[{GOOD},]".encode(), "line 1, column 37: not JSON"),
    "missing-comma.json": (f"[{GOOD}\n{GOOD}]".encode(), "line 2, column 1: not JSON"),
    "two-lists.json": (f"[{GOOD}][{GOOD}]".encode(), "line 1, column 37: not JSON (Extra data)"),
    "after-the-list.json": (f"[{GOOD}] thanks".encode(), "column 38: not JSON (Extra data)"),
    "two-a-line.jsonl": (f"{GOOD}{GOOD}".encode(), "line 1: not JSON (Extra data)"),
    "comment.jsonl": (f"{GOOD}\n// a remark\n".encode(), "line 2: not JSON"),
    "many-bad-lines.jsonl": (b"x\n" * 25, "… and 15 lines more"),
    "single-quotes.jsonl": (b"{'prompt': 'a'}", "line 1: not JSON"),
    "tab-in-string.json": (b'[{"prompt": "a\tb"}]', "line 1, column 15: not JSON (Invalid control character"),
    "bad-escape.json": (b'[{"prompt": "\\x41"}]', "line 1, column 14: not JSON (Invalid \\escape"),
    "a-list.jsonl": (f"[\n{GOOD},\n{GOOD}\n]".encode(), "The file looks like a JSON list; give it a name that ends in .json"),
    "web-page.json": (b"<!DOCTYPE html><html>", "line 1, column 1: not JSON (Expecting value). It looks like a web page"),
    "duplicate-key.json": (
        f'[{GOOD},\n{{"prompt": "a", "prompt": "b"}}]'.encode(),
        "row 2 (line 2) not readable as JSON: the key 'prompt'",
    ),
    "duplicate-key.jsonl": (f'{GOOD}\n{{"a": 1, "a": 1}}'.encode(), "line 2: the key 'a' is there twice in one object"),
    "duplicate-inside.jsonl": (b'{"a": {"b": [{"c": 1, "c": 2}]}}', "line 1: the key 'c' is there twice"),
    "nan.jsonl": (b'{"prompt": NaN}', "line 1: the number NaN is no number"),
    "infinity.json": (b'[{"prompt": -Infinity}]', "row 1 (line 1) not readable as JSON: the number -Infinity"),
    "overflow.json": (b'[{"a": 1},\n {"a": 1e999}]', "row 2 (line 2) not readable as JSON: the number 1e999"),
    "digits.jsonl": (b'{"a": ' + b"1" * 5000 + b"}", "line 1: a whole number with thousands of digits"),
    "lone-surrogate.json": (f'[{GOOD}, {{"prompt": "\\ud800"}}]'.encode(), "row 2: \\ud800 is half a character"),
    "surrogate-key.jsonl": (f'{GOOD}\n{{"\\udc00": 1}}'.encode(), "line 2: \\udc00 is half a character"),
    "deep.jsonl": (f"{GOOD}\n".encode() + b"[" * 100_000, "line 2: not JSON (nested too deeply)"),
    "deep-object.json": (b'[{"a":' * 100_000, "row 1 not readable as JSON: nested too deeply"),
    "deep-but-closed.json": (b'[{"a": ' + b"[" * 200 + b"]" * 200 + b"}]", "row 1: nested too deeply. Expected at most 100"),
    "text.json": (b'"hello"', "expected a JSON list of objects, found text"),
    "null.json": (b"null", "expected a JSON list of objects, found null"),
    "nulls.json": (b"[null, null]", "expected an object in every row, found null in rows 1, 2"),
    "scalars.jsonl": (b"1\n\n2\n", "found a number in rows 1, 3"),
    "columns.json": (b'{"prompt": ["a"], "completion": ["b"]}', "expected a JSON list of objects, found an object"),
    "no-keys.json": (b"[{}]", "no known row shape. Keys found: none"),
    "null-values.json": (b'[{"prompt": null, "completion": null}]', "every value of every row is null or empty"),
    "header-only.csv": (b"prompt,completion\n", "has a header and no rows"),
    "header-twice.csv": (b"prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
    "unnamed-twice.csv": (b"a,,\n1,2,3\n", "line 1: two columns have no name"),
    "ragged-long.csv": (b"prompt,completion\na,b\nc,d,e\n", "line 3: 3 cells, but 2 columns in the header"),
    "ragged-short.csv": (b"prompt,completion\na\n", "line 2: 1 cell, but 2 columns in the header"),
    "ragged-after-quoted-lines.csv": (b'prompt,completion\n"a\nb\nc",d\ne\n', "line 5: 1 cell"),
    "open-quote.csv": (b'prompt,completion\na,b\n"c,d\ne,f\n', "line 3: not CSV (unexpected end of data)"),
    "quote-inside.csv": (b'prompt,completion\n"a"b,c\n', "line 2: not CSV"),
    "empty-cell.csv": (b"prompt,completion\na,\n", "'completion' must be text; found null in line 2"),
    "spaces-in-the-header.csv": (b"prompt, completion\na,b\n", "Did you mean 'completion' for ' completion'?"),
    "not.parquet": (f"[{GOOD}]".encode(), "not readable as Parquet"),
    "cut.parquet": (table({"text": ["a"] * 100})[:-20], "not readable as Parquet"),
    "scrambled.parquet": (b"PAR1" + bytes(range(256)) + b"PAR1", "not readable as Parquet"),
    "no-rows.parquet": (table({"text": pa.array([], pa.string())}), "has no rows"),
    "twice.parquet": (table(pa.table([["a"], ["b"]], names=["x", "x"])), "the column 'x' is there twice"),
    "only-bytes.parquet": (table({"raw": [b"a", b"b"]}), "no known row shape. Keys found: none"),
    "numbers.parquet": (table({"prompt": ["a"], "completion": [5]}), "'completion' must be text; found a number in row 1"),
    "far-time.parquet": (table({"text": ["a"], "t": pa.array([2**60], pa.timestamp("ms"))}), "a value cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_told_with_its_place(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(str(tmp_path / name))
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))


def turns(*roles: str) -> list[dict[str, object]]:
    return [{"role": role, "content": f"{role} speaks"} for role in roles]


def chat(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


USER, REPLY = turns("user", "assistant")

# Name -> a row that comes after a good one of its kind, and a part of the message.
ROWS: dict[str, tuple[object, str]] = {
    "a number as prompt": ({"prompt": 5, "completion": "b"}, "'prompt' must be text; found a number in row 2"),
    "a true value as completion": ({"prompt": "a", "completion": True}, "'completion' must be text; found a true/false value"),
    "a list as completion": ({"prompt": "a", "completion": ["b"]}, "'completion' must be text; found a list in row 2"),
    "a null completion": ({"prompt": "a", "completion": None}, "'completion' must be text; found null in row 2"),
    "an empty completion": ({"prompt": "a", "completion": " \n"}, "'completion' is empty in row 2"),
    "an empty object as prompt": ({"prompt": {}, "completion": "b"}, "'prompt' is empty in row 2"),
    "no completion": ({"prompt": "a"}, "the key 'completion' is missing in row 2"),
    "completion misspelt": ({"prompt": "a", "complettion": "b"}, "Did you mean 'complettion'?"),
    "another case": (
        {"Prompt": "a", "Completion": "b"},
        "the key 'prompt' is missing in row 2. Row 2 has the keys 'Completion', 'Prompt'.",
    ),
    "an empty object": ({}, "Row 2 has the keys none"),
    "text for a row": ("a", "expected an object in every row, found text in row 2"),
    "messages null": ({"messages": None, "id": 1}, "'messages' must be a list of messages; found null in row 2"),
    "messages as text": ({"messages": "hello"}, "'messages' must be a list of messages; found text in row 2"),
    "messages as an object": ({"messages": USER}, "'messages' must be a list of messages; found an object"),
    "messages empty": ({"messages": []}, "'messages' is empty in row 2. Expected messages that end with the assistant's"),
    "a message of text": (chat(USER, "hello"), "message 2 of 'messages' must be an object; found text in row 2"),
    "a null message": (chat(None), "message 1 of 'messages' must be an object; found null in row 2"),
    "nested nulls": (chat({"role": None, "content": None}), "message 1 of 'messages' has no 'role' in row 2"),
    "no role": (chat({"content": "a"}, REPLY), "message 1 of 'messages' has no 'role' in row 2. It has the keys 'content'."),
    "role misspelt": (chat({"rôle": "user", "content": "a"}, REPLY), "Did you mean 'rôle'?"),
    "an unknown role": (chat({**USER, "role": "usr"}, REPLY), "unknown role 'usr' in row 2. Expected one of 'system', 'user'"),
    "the nearest role": (chat({**USER, "role": "User"}, REPLY), "Did you mean 'user'?"),
    "a number as role": (chat({**USER, "role": 3}), "'role' must be text; found a number in row 2"),
    "a list as role": (chat({**USER, "role": ["user"]}), "'role' must be text; found a list in row 2"),
    "an endless role": (chat({**USER, "role": "x" * 100_000}), "unknown role 'xxxx"),
    "an assistant turn first": (chat(REPLY, USER, REPLY), "the first turn of 'messages' is the assistant's in row 2"),
    "an assistant after the system": (chat(*turns("system", "assistant")), "the first turn of 'messages' is the assistant's"),
    "a tool's turn first": (chat(*turns("tool", "assistant")), "the first turn of 'messages' is a tool's in row 2"),
    "a user turn last": (chat(USER, REPLY, USER), "'messages' ends with a turn of the role 'user' in row 2"),
    "a tool's turn last": (chat(USER, *turns("tool")), "'messages' ends with a turn of the role 'tool' in row 2"),
    "a system message alone": (chat(*turns("system")), "'messages' holds system messages alone in row 2"),
    "an empty question": (chat({**USER, "content": " "}, REPLY), "message 1 of 'messages' (user) is empty in row 2"),
    "an empty reply": (chat(USER, {**REPLY, "content": ""}), "message 2 of 'messages' (assistant) is empty in row 2"),
    "a null question": (chat({**USER, "content": None}, REPLY), "message 1 of 'messages' (user) must have text as its content"),
    "a null reply without a call": (chat(USER, {**REPLY, "content": None, "tool_calls": []}), "(assistant) must have text"),
    "a user's tool call": (chat({**USER, "content": None, "tool_calls": [{}]}, REPLY), "(user) must have text as its content"),
    "a number as content": (chat({**USER, "content": 5}, REPLY), "must have text as its content; found a number in row 2"),
    "an object as content": (chat({**USER, "content": {"a": 1}}, REPLY), "must have text as its content; found an object"),
    "an image": (
        chat({**USER, "content": [{"type": "image_url"}]}, REPLY),
        "message 1 of 'messages' holds a part of type 'image_url'",
    ),
    "a part without text": (chat({**USER, "content": [{"type": "text"}]}, REPLY), "holds a part of type 'text' in row 2"),
    "a number as a part": (chat({**USER, "content": [5]}, REPLY), "message 1 of 'messages' holds a number in row 2"),
    "no parts": (chat({**USER, "content": []}, REPLY), "message 1 of 'messages' (user) is empty in row 2"),
    "calls as text": (chat(USER, {**REPLY, "tool_calls": "f"}), "'tool_calls' must be a list of objects; found text in row 2"),
    "tools as an object": ({"messages": [USER, REPLY], "tools": {"a": 1}}, "'tools' must be a list of objects; found an object"),
    "tools as broken JSON": ({"messages": [USER, REPLY], "tools": "[{"}, "'tools' must be a list of objects; found text"),
    "conversations as text": ({"conversations": "a"}, "'conversations' must be a list of messages; found text in row 2"),
    "an unknown speaker": (
        {"conversations": [{"from": "humman", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "unknown role 'humman' in row 2. Expected one of",
    ),
    "gpt first": ({"conversations": [{"from": "gpt", "value": "b"}]}, "the first turn of 'conversations' is the assistant's"),
    "no value": ({"conversations": [{"from": "human"}]}, "message 1 of 'conversations' (user) must have text"),
    "no from": ({"conversations": [{"value": "a"}]}, "message 1 of 'conversations' has no 'from' in row 2"),
    "a call that is none": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
        "message 2 of 'conversations' (function_call) is no call in row 2",
    ),
    "two system messages": (
        {"system": "x", "conversations": [{"from": "system", "value": "a"}]},
        "'system' and the first turn of 'conversations' both give a system message in row 2",
    ),
    "system as a number": (
        {"system": 5, "conversations": [{"from": "human", "value": "a"}]},
        "'system' must be text; found a number",
    ),
    "an instruction of null": ({"instruction": None, "output": "b"}, "'instruction' must be text; found null in row 2"),
    "an alpaca input of a number": (
        {"instruction": "a", "input": 0, "output": "b"},
        "'input' must be text; found a number in row 2",
    ),
    "contexts of numbers": (
        {"input": "a", "response": "b", "contexts": [1]},
        "'contexts' must be text or a list of texts; found a number",
    ),
    "contexts with a null": ({"input": "a", "response": "b", "contexts": ["x", None]}, "found null in row 2"),
    "a context of an object": ({"input": "a", "response": "b", "context": {"a": 1}}, "'context' must be text or a list of texts"),
    "text as a list": ({"text": ["a"]}, "'text' must be text; found a list in row 2"),
    "text empty": ({"text": "\u00a0\u2003"}, "'text' is empty in row 2"),
    "another shape": ({"weather": "fine"}, "is missing in row 2. Row 2 has the keys 'weather'."),
}
GOOD_ROWS: list[dict[str, object]] = [
    {"messages": [USER, REPLY]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "output": "b"},
    {"input": "a", "response": "b"},
    {"text": "a"},
]


@pytest.mark.parametrize("name", ROWS)
def test_a_malformed_row_is_told_with_its_number(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    keys = set(row) if isinstance(row, dict) else set()
    before = next((good for good in GOOD_ROWS if next(iter(good)) in keys), json.loads(GOOD))
    location = tmp_path / "rows.json"
    location.write_text(json.dumps([before, row]))
    with pytest.raises(UserError) as caught:
        read(str(location))
    assert expected in str(caught.value) and "row 2" in str(caught.value)


BIG = "x" * 10_000_000
# Odd, and fine: name -> content, and the rows that come of it.
FINE: dict[str, tuple[Callable[[], bytes], int]] = {
    "ten-megabytes.json": (lambda: json.dumps([{"prompt": "a", "completion": BIG}]).encode(), 1),
    "ten-megabytes.jsonl": (lambda: json.dumps({"text": BIG}).encode(), 1),
    "ten-megabytes.csv": (lambda: f'prompt,completion\na,"{BIG}"\n'.encode(), 1),
    "ten-megabytes.parquet": (lambda: table({"text": [BIG]}), 1),
    "columns-50000.csv": (lambda: ("text," + ",".join(map(str, range(50_000))) + "\na" + ",b" * 50_000).encode(), 1),
    "columns-50000.json": (lambda: json.dumps([{"text": "a", **{str(n): n for n in range(50_000)}}]).encode(), 1),
    "columns-5000.parquet": (lambda: table({"text": ["a"], **{str(n): [n] for n in range(5_000)}}), 1),
    "mixed-newlines.jsonl": (lambda: f"{GOOD}\r\n{GOOD}\r{GOOD}\n\n{GOOD}".encode(), 4),
    "mixed-newlines.csv": (lambda: b"text\r\na\nb\rc", 3),
    "mixed-newlines.json": (lambda: f"\r\n[\r{GOOD},\n\t{GOOD}\r\n]\n\n".encode(), 2),
    "empty-lines-at-the-end.csv": (lambda: b"prompt,completion\na,b\n,\n,\n", 3),
    "control-characters.json": (lambda: rb'[{"text": "\u0000\u001b[31m\u200b"}]', 1),
    "huge-integer.json": (lambda: b'[{"text": "a", "n": ' + b"9" * 4000 + b"}]", 1),
    "nested-nulls.json": (lambda: b'[{"text": "a", "n": [null, {"m": null}]}]', 1),
    "pandas-index.csv": (lambda: b",text\n0,a\n1,b\n", 2),
}


@pytest.mark.parametrize("name", FINE)
def test_an_odd_file_is_read_with_every_row_accounted_for(name: str, tmp_path: Path) -> None:
    content, rows = FINE[name]
    (tmp_path / name).write_bytes(content())
    found = read(str(tmp_path / name))
    assert len(found.records) + len(found.dropped) == rows


def test_a_row_of_50000_columns_without_a_shape_gives_a_short_message(tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps([{f"column {n}": n for n in range(50_000)}]))
    with pytest.raises(UserError) as caught:
        read(str(tmp_path / "wide.json"))
    assert "and 49980 more" in str(caught.value) and len(str(caught.value)) < 2_000


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        read_source(str(tmp_path / "pipe.jsonl"))


def test_a_socket_is_refused() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")
        with pytest.raises(UserError, match="is a pipe, a socket or a device"):
            read_source(f"{short}/s")


def test_a_device_is_refused() -> None:
    with pytest.raises(UserError, match="/dev/zero is a pipe, a socket or a device"):
        read_source("/dev/zero")


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read everything
    with pytest.raises(UserError, match=r"a\.json cannot be read: permission denied"):
        read_source(str(tmp_path / "a.json"))


def test_a_link_to_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"a\.json cannot be read: No such file"):
        read_source(str(tmp_path / "a.json"))


def test_a_link_to_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json cannot be read: Too many levels"):
        read_source(str(tmp_path / "a.json"))


def test_an_empty_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data.*Found nothing"):
        read_source(str(tmp_path))


def test_a_directory_named_like_a_file_of_the_split_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(UserError, match=r"train\.jsonl is a directory\. Expected a file"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"_data_files": 5}', b"\xff"])
def test_a_saved_dataset_with_a_broken_state_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(content)
    (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(UserError, match="the Hugging Face dataset cannot be read"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"splits": 5}', b'{"splits": ["train"]}', b'{"splits": [null]}', b"{}"])
def test_a_dataset_dict_with_broken_splits_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_bytes(content)
    with pytest.raises(UserError):
        read_source(str(tmp_path))


@pytest.mark.parametrize(
    "location", ["", "  ", "a\0b", "://", "http://", "x" * 5000, "~nobodyhere/a.json", "zip://a::b", "a/b/c/d"]
)
def test_a_location_that_is_none_is_told(location: str) -> None:
    with pytest.raises(UserError):
        read_source(location)


# Random data: keys and roles that shapes look for, and everything else.
SHAPE_KEYS = ["messages", "conversations", "prompt", "completion", "input", "output", "response", "instruction", "text"]
OTHER_KEYS = ["role", "from", "content", "value", "context", "contexts", "tools", "tool_calls", "system", "type", "other"]
KEYS = st.sampled_from([*SHAPE_KEYS, *OTHER_KEYS])
WORDS = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "text", "hello", "", "{}", "[1]"]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS, st.text(max_size=5))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": WORDS, "content": VALUES}) | st.fixed_dictionaries({"from": WORDS, "value": VALUES}) | VALUES,
    max_size=4,
)
ROW_VALUES = st.dictionaries(KEYS, VALUES | TURNS, max_size=5) | VALUES
NAMED = st.fixed_dictionaries(
    {
        "row_shape": st.sampled_from(["auto", *SHAPES]),
        "input_text_key": st.just("") | KEYS,
        "output_text_key": st.just("") | KEYS,
        "context_key": st.just("") | KEYS,
        "group_key": st.just("") | KEYS,
        "object_format": st.sampled_from(["json", "labelled"]),
    }
)
RELAXED = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def is_told_or_accounted_for(content: bytes, suffix: str, **named: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"rows{suffix}"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            read(str(path), **named)


@RELAXED
@given(st.lists(ROW_VALUES, max_size=4), NAMED, st.booleans())
def test_random_rows_are_told_or_accounted_for(rows: list[object], named: dict[str, str], lines: bool) -> None:
    content = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    is_told_or_accounted_for(content.encode(), ".jsonl" if lines else ".json", **named)


def mostly(good: st.SearchStrategy[object], bad: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.integers(0, 24).flatmap(lambda drawn: bad if drawn == 0 else good)


TEXTS = mostly(st.text(min_size=1, max_size=9).filter(str.strip), VALUES)
OBJECTS = mostly(TEXTS, st.lists(TEXTS, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
CHATS = mostly(
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS}), min_size=1, max_size=2).flatmap(
        lambda asked: st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS}).map(lambda reply: [*asked, reply])
    ),
    TURNS,
)
ROWS_OF: dict[str, st.SearchStrategy[dict[str, object]]] = {
    "messages": st.fixed_dictionaries({"messages": CHATS}, optional={"tools": mostly(st.none(), VALUES)}),
    "sharegpt": st.fixed_dictionaries({"conversations": CHATS}, optional={"system": TEXTS}),
    "alpaca": st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": OBJECTS, "text": TEXTS}),
    "context_response": st.fixed_dictionaries({"input": OBJECTS, "response": TEXTS}, optional={"context": st.lists(TEXTS)}),
    "input_output": st.fixed_dictionaries({"input": OBJECTS, "output": TEXTS}),
    "prompt_completion": st.fixed_dictionaries({"prompt": OBJECTS, "completion": TEXTS}),
    "text": st.fixed_dictionaries({"text": TEXTS}),
}
NULL_ROW = st.just({"text": None, "prompt": None})
NEARLY_RIGHT = st.sampled_from(sorted(ROWS_OF)).flatmap(
    lambda shape: st.tuples(st.just(shape), st.lists(mostly(ROWS_OF[shape], NULL_ROW | ROW_VALUES), min_size=1, max_size=5))
)


@RELAXED
@given(NEARLY_RIGHT, st.sampled_from(["json", "labelled"]))
def test_rows_nearly_of_a_shape_are_told_or_accounted_for(drawn: tuple[str, list[object]], object_format: str) -> None:
    _, rows = drawn
    source = Source(tuple(SourceRow(n, row, None, f"row {n}") for n, row in enumerate(rows, start=1)), "a list", False)
    try:
        found = records(source, ShapeSettings(object_format=object_format))
    except UserError:
        return
    event("read")
    assert found.shape in SHAPES
    assert sorted([record.row for record in found.records] + [row.row for row in found.dropped]) == list(range(1, len(rows) + 1))
    assert all(isinstance(text, str) for record in found.records for text in (record.input_text, record.output_text))
    assert [record.columns for record in found.records] == [rows[record.row - 1] for record in found.records]
    assert all(all(each is None for each in rows[row.row - 1].values()) for row in found.dropped)  # type: ignore[attr-defined]


@RELAXED
@given(st.binary(max_size=200), st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ""]))
def test_random_bytes_are_told_or_accounted_for(content: bytes, suffix: str) -> None:
    is_told_or_accounted_for(content, suffix)


@RELAXED
@given(st.text(alphabet='ab{}[]":,;\t\n\r\\u0d8\ufeff\u2028 ', max_size=60), st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]))
def test_random_text_of_the_formats_marks_is_told_or_accounted_for(content: str, suffix: str) -> None:
    is_told_or_accounted_for(content.encode(), suffix)


@RELAXED
@given(st.data())
def test_a_damaged_file_is_told_or_accounted_for(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
    whole = {
        ".json": f"[{GOOD}, {GOOD}]".encode(),
        ".jsonl": f"{GOOD}\n{GOOD}\n".encode(),
        ".csv": b'prompt,completion\na,"b\nc"\n',
        ".parquet": table({"prompt": ["a"], "completion": ["b"]}),
    }[suffix]
    place = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.binary(max_size=3))
    is_told_or_accounted_for(whole[:place] + damage + whole[place + data.draw(st.integers(0, 3)) :], suffix)

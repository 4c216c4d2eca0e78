"""From source rows to records: the shape of the rows found out or named, every row read, every bad one told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from finetune_dataflow.engine.chat_rows import Chat, holds_messages, messages_chat, prompt_chat, sharegpt_chat
from finetune_dataflow.engine.many_rows import lines_fingerprint, paused, watched
from finetune_dataflow.engine.object_text import OBJECT_FORMATS, object_text
from finetune_dataflow.engine.parsing import SHOWN, kind
from finetune_dataflow.engine.row_problems import RowError, RowProblems, missing_key, quoted
from finetune_dataflow.engine.shape_detection import SHAPE_KEYS, SHAPES, Columns, shape_by_keys
from finetune_dataflow.engine.sources import Source, SourceRow, rows_named
from finetune_dataflow.engine.tokens import DroppedRow
from finetune_dataflow.errors import UserError, nearest

EMPTY_ROW = "empty_row"  # the reason of a row in which every value is null: a spreadsheet's trailing lines


@dataclass(frozen=True)
class ShapeSettings:
    """How rows are read.

    row_shape: a name in SHAPES, or "auto": found from the keys of the rows.
    input_text_key, output_text_key: the two keys of the shape "key_mapping".
    context_key: the key of further text for the prompt: text, or a list of texts.
    group_key: the key of what must not be split: a customer, a thread.
    object_format: how an input that is an object or a list becomes text: "json" or "labelled".
    """

    row_shape: str = "auto"
    input_text_key: str = ""
    output_text_key: str = ""
    context_key: str = ""
    group_key: str = ""
    object_format: str = "json"


@dataclass(slots=True)  # not frozen: millions are made
class Record:
    """One row, read: its texts, its whole conversation where it is one, and everything it came with.

    input_text: what the model is given; of a conversation the user's last message; of "text" nothing.
    output_text: what it learns to reply; of a conversation the assistant's last message.
    messages: of a conversation all messages, the last reply included; else ().
    columns: the row as it was read.
    group, side: what the row must stay together with, and the set it was given to; None where neither is said.
    """

    row: int
    input_text: str
    output_text: str
    contexts: tuple[str, ...]
    messages: tuple[dict[str, object], ...]
    tools: tuple[dict[str, object], ...]
    columns: Columns
    group: str | None
    side: str | None


@dataclass(frozen=True)
class ShapedRows:
    """The records of a source, the shape they were read as, the rows left out, and remarks to be said aloud."""

    records: tuple[Record, ...]
    shape: str
    dropped: tuple[DroppedRow, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything in the rows."""
        names = [each.name for each in fields(Record)]
        lines = ([getattr(each, name) for name in names] for each in self.records)
        return lines_fingerprint(lines, self.shape, [[each.row, each.reason] for each in self.dropped], [*self.notes])


@dataclass(slots=True)
class _Content:
    input_text: str
    output_text: str
    contexts: tuple[str, ...] = ()
    chat: Chat | None = None


class _Row:
    """A row being read. A fault is noted and reading goes on, so that all of a row's faults are told."""

    def __init__(self, source_row: SourceRow, columns: Columns, settings: ShapeSettings, problems: RowProblems) -> None:
        self.source_row, self.columns, self.settings, self._problems = source_row, columns, settings, problems

    def fault(self, error: RowError) -> None:
        self._problems.add(self.source_row, error)

    def text(self, key: str, *, objects: bool = False) -> str:
        """The text under `key`; an object or a list too, where `objects` allows them, rendered."""
        if key not in self.columns:
            self.fault(missing_key(key, self.source_row, self.columns))
            return ""
        value = self.columns[key]
        if objects and isinstance(value, dict | list):
            value = object_text(value, self.settings.object_format) if value else ""
        if not isinstance(value, str):
            self.fault(RowError(f"not text {key}", f"{key!r} must be text; found {kind(value)}"))
            return ""
        if not value.strip():
            self.fault(RowError(f"empty {key}", f"{key!r} is empty"))
        return value

    def contexts(self, key: str) -> tuple[str, ...]:
        """The texts under `key`, blank ones left out: none, one, or a list."""
        value = self.columns.get(key)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if wrong := [each for each in texts if not isinstance(each, str)]:
            self.fault(RowError(f"contexts {key}", f"{key!r} must be text or a list of texts; found {kind(wrong[0])}"))
        return tuple(each for each in texts if isinstance(each, str) and each.strip())

    def own_contexts(self) -> tuple[str, ...]:
        return self.contexts(self.settings.context_key) if self.settings.context_key else ()

    def group(self) -> str | None:
        """What the row belongs to under `group_key`: text or a number; null is a row of its own."""
        key = self.settings.group_key
        if not key:
            return None
        if key not in self.columns:
            self.fault(missing_key(key, self.source_row, self.columns))
            return None
        value = self.columns[key]
        if isinstance(value, bool | dict | list):
            self.fault(RowError(f"group {key}", f"{key!r} (group_key) must be text or a number; found {kind(value)}"))
        return None if value in (None, "") else str(value)

    def chat(self, key: str, read: Callable[[Columns], Chat]) -> _Content:
        if key not in self.columns:
            self.fault(missing_key(key, self.source_row, self.columns))
            return _Content("", "")
        try:
            chat = read(self.columns)
        except RowError as error:
            self.fault(error)
            return _Content("", "")
        return _Content(chat.input_text, chat.output_text, chat=chat)


def _key_mapping(row: _Row) -> _Content:
    keys = row.settings
    return _Content(row.text(keys.input_text_key, objects=True), row.text(keys.output_text_key), row.own_contexts())


def _prompt_completion(row: _Row) -> _Content:
    if holds_messages(row.columns.get("prompt")) and "completion" in row.columns and not row.settings.context_key:
        return row.chat("prompt", prompt_chat)
    return _Content(row.text("prompt", objects=True), row.text("completion"), row.own_contexts())


def _input_output(row: _Row) -> _Content:
    return _Content(row.text("input", objects=True), row.text("output"), row.own_contexts())


def _context_response(row: _Row) -> _Content:
    input_text, output_text = row.text("input", objects=True), row.text("response")
    if row.settings.context_key:
        return _Content(input_text, output_text, row.own_contexts())
    given = [key for key in ("context", "contexts") if row.columns.get(key) is not None]
    if len(given) > 1:
        row.fault(
            RowError("two contexts", "both 'context' and 'contexts' are given", ". Expected one, or name it in context_key.")
        )
    return _Content(input_text, output_text, row.contexts(given[0]) if given else ())


def _alpaca(row: _Row) -> _Content:
    instruction, output_text = row.text("instruction", objects=True), row.text("output")
    further = row.columns.get("input")
    blank = further in (None, [], {}) or (isinstance(further, str) and not further.strip())
    input_text = instruction if blank else f"{instruction}\n\n{row.text('input', objects=True)}"
    return _Content(input_text, output_text, row.own_contexts())


_READERS: dict[str, Callable[[_Row], _Content]] = {
    "key_mapping": _key_mapping,
    "messages": lambda row: row.chat("messages", messages_chat),
    "sharegpt": lambda row: row.chat("conversations", sharegpt_chat),
    "alpaca": _alpaca,
    "context_response": _context_response,
    "input_output": _input_output,
    "prompt_completion": _prompt_completion,
    "text": lambda row: _Content("", row.text("text")),
}
_WRITTEN = {"json": "JSON", "labelled": "labelled text"}
_WITHOUT_CONTEXTS = {"messages", "sharegpt", "text"}
_FURTHER_KEYS = {  # those that a shape uses where they are there
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input",),
    "context_response": ("context", "contexts"),
}


@paused()
def records(source: Source, settings: ShapeSettings) -> ShapedRows:
    """The records of a source's rows: every row is a record or is dropped with its reason.

    Raises UserError naming the source, the rows, what was found and what is expected: where rows are no objects, where
    their shapes are mixed, ambiguous or unknown, and for all rows at once that lack a key or a text or whose turns are wrong.
    """
    _check_settings(settings)
    used, dropped = _used(_objects(source))
    if not used:
        raise UserError(f"{source.location}: every value of every row is null or empty. Expected rows with texts.")
    shape = _shape(source.location, used, settings)
    problems = RowProblems(source.location)
    found: list[Record] = []
    repeating = 0
    for source_row, columns in watched(used, len(used), "shapes"):
        row = _Row(source_row, columns, settings, problems)
        content, group = _READERS[shape](row), row.group()
        messages, tools = (content.chat.messages, content.chat.tools) if content.chat else ((), ())
        repeating += content.chat is not None and content.chat.repeats_a_role
        texts = content.input_text, content.output_text, content.contexts
        found.append(Record(source_row.number, *texts, messages, tools, columns, group, source_row.side))
    problems.raise_if_any()
    return ShapedRows(tuple(found), shape, tuple(dropped), tuple(_notes(shape, found, len(dropped), repeating, settings)))


def _check_settings(settings: ShapeSettings) -> None:
    for name, value, known in (
        ("row_shape", settings.row_shape, ("auto", *SHAPES)),
        ("object_format", settings.object_format, OBJECT_FORMATS),
    ):
        if value not in known:
            raise UserError(f"{name}={value!r} is unknown. Expected one of {quoted(known)}.{nearest(value, known)}")
    keys = {"input_text_key": settings.input_text_key, "output_text_key": settings.output_text_key}
    given = [name for name, key in keys.items() if key]
    if len(given) == 1 or (not given and settings.row_shape == "key_mapping"):
        missing = next(name for name in keys if name not in given)
        raise UserError(f"{missing} is not given. Rows are mapped by two keys: input_text_key and output_text_key.")
    if given and settings.input_text_key == settings.output_text_key:
        raise UserError(f"input_text_key and output_text_key are both {settings.input_text_key!r}. Expected two different keys.")
    if given and settings.row_shape not in {"auto", "key_mapping"}:
        raise UserError(
            f"row_shape={settings.row_shape!r} and input_text_key={settings.input_text_key!r} both say where the texts are. "
            "Leave one of them out."
        )


def _objects(source: Source) -> list[tuple[SourceRow, Columns]]:
    objects = [(row, row.value) for row in source.rows if isinstance(row.value, dict)]
    if len(objects) < len(source.rows):
        others = [row for row in source.rows if not isinstance(row.value, dict)]
        found = kind(others[0].value)
        raise UserError(f"{source.location}: expected an object in every row, found {found} in {rows_named(others)}.")
    return objects


def _used(rows: Sequence[tuple[SourceRow, Columns]]) -> tuple[list[tuple[SourceRow, Columns]], list[DroppedRow]]:
    """The rows with something in them, and the others."""
    used, dropped = [], []
    for row, columns in rows:
        # An object without keys is not empty: it lacks those it should have.
        if columns and not any(each is not None for each in columns.values()):
            dropped.append(DroppedRow(row.number, EMPTY_ROW))
        else:
            used.append((row, columns))
    return used, dropped


def _shape(location: str, rows: Sequence[tuple[SourceRow, Columns]], settings: ShapeSettings) -> str:
    mapped = {settings.input_text_key, settings.output_text_key} - {""}
    shape = "key_mapping" if mapped else settings.row_shape
    if shape == "auto":
        shape = shape_by_keys(location, rows)
    if mapped and all(mapped.isdisjoint(columns) for _, columns in rows) and (other := _shape_or_none(location, rows)):
        raise UserError(
            f"{location}: no row has the key {settings.input_text_key!r} (input_text_key) or {settings.output_text_key!r} "
            f"(output_text_key). The rows have the shape {other}: leave the two keys out to read them so."
        )
    if settings.context_key:
        if shape in _WITHOUT_CONTEXTS:
            raise UserError(f"context_key={settings.context_key!r} has no meaning for rows of the shape {shape}. Leave it out.")
        if all(settings.context_key not in columns for _, columns in rows):
            keys = list(dict.fromkeys(key for _, columns in rows for key in columns))
            raise UserError(
                f"{location}: no row has the key {settings.context_key!r} (context_key). "
                f"Keys found: {quoted(keys)}.{nearest(settings.context_key, keys)}"
            )
    return shape


def _shape_or_none(location: str, rows: Sequence[tuple[SourceRow, Columns]]) -> str | None:
    try:
        return shape_by_keys(location, rows)
    except UserError:
        return None


def _notes(shape: str, found: Sequence[Record], dropped: int, repeating: int, settings: ShapeSettings) -> list[str]:
    """What a user should hear of how the rows were read."""
    mapped = (settings.input_text_key, settings.output_text_key)
    keys = mapped if shape == "key_mapping" else SHAPE_KEYS[shape]
    how = "found from the keys" if settings.row_shape == "auto" and shape != "key_mapping" else "as named by the keys"
    how = how if settings.row_shape == "auto" else "as row_shape says,"
    notes = [f"Row shape: {shape}, {how} {quoted(keys)}."]
    objects = sum(isinstance(each.columns.get(keys[0]), dict | list) and not each.messages for each in found)
    if objects:
        notes.append(f"The inputs of {_rows(objects)} are objects or lists, written as {_WRITTEN[settings.object_format]}.")
    if repeating:
        notes.append(f"In {_rows(repeating)} two turns of one role follow each other; some chat templates refuse that.")
    if dropped:
        notes.append(f"{_rows(dropped)} with no value at all left out ({EMPTY_ROW}).")
    read = {*keys, *_FURTHER_KEYS.get(shape, ()), settings.context_key, settings.group_key}
    if shape == "prompt_completion" and any(each.messages for each in found):
        read.add("tools")
    if unread := [key for key in dict.fromkeys(key for each in found for key in each.columns) if key not in read]:
        notes.append(f"Columns that are no part of the texts: {quoted(unread, SHOWN)}.")
    return notes


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"

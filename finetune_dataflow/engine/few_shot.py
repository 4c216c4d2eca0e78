"""Examples from a file, put into every prompt as earlier turns.

The file is a JSON list or JSON lines. An example is `{"input": …, "output": …}`, whose other keys are its columns, or
`{"messages": […]}`; a JSON list of messages alone is one example, as in mlx-tuning-fork's `--cot-source`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_dataflow.errors import UserError, nearest

_EXPECTED = 'Expected {"input": …, "output": …} or {"messages": […]}'


@dataclass(frozen=True)
class ExampleRow:
    """An example that is written like a row of the data. `where` names it in errors."""

    where: str
    input_text: str
    output_text: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class _Item:
    """A JSON value of the file, and where it stands."""

    where: str
    value: object


def few_shot_examples(path: Path, count: int) -> list[ExampleRow | list[dict[str, str]]]:
    """The first `count` examples of a file, 0 for all: rows, or messages that are taken as they are.

    Raises UserError naming every example that is none, and where the file has fewer.
    """
    examples: list[ExampleRow | list[dict[str, str]]] = []
    wrong: list[str] = []
    for item in _items(path):
        try:
            examples.append(_example(item))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(f"few_shot_file: {'; '.join(wrong[:10])}{more}.")
    if not examples:
        raise UserError(f"few_shot_file: {path} has no example. {_EXPECTED}.")
    if count > len(examples):
        raise UserError(f"few_shot_count is {count}, but {path} has {len(examples)} examples.")
    return examples[:count] if count else examples


def _items(path: Path) -> list[_Item]:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"few_shot_file: {path} is not UTF-8, at byte {error.start}.") from error
    except (OSError, ValueError, RuntimeError) as error:  # a null character; a home directory that is not there
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"few_shot_file: {path} cannot be read: {reason}.") from error
    if text.lstrip().startswith("["):
        values = _json(text, str(path))
        if values and all(isinstance(value, dict) and "role" in value for value in values):
            return [_Item(str(path), {"messages": values})]
        return [_Item(f"{path}, example {number}", value) for number, value in enumerate(values, 1)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_Item(f"{path}, line {number}", _json(line, f"{path}, line {number}")) for number, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"few_shot_file: {where} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise UserError(f"few_shot_file: {where} is JSON nested too deeply.") from error


def _example(item: _Item) -> ExampleRow | list[dict[str, str]]:
    value = item.value
    if not isinstance(value, dict):
        raise UserError(f"{item.where} is {json.dumps(value)[:40]}. {_EXPECTED}")
    if "messages" in value:
        return _messages(item.where, value["messages"])
    for key in ("input", "output"):
        if key not in value:
            raise UserError(f"{item.where} has no {key!r}.{nearest(key, value)} {_EXPECTED}")
        if not isinstance(value[key], str) or not value[key].strip():
            raise UserError(f"{item.where}: {key!r} is {json.dumps(value[key])[:40]}, expected a text")
    return ExampleRow(item.where, value["input"], value["output"], value)


def _messages(where: str, messages: object) -> list[dict[str, str]]:
    """Messages in turn, the user first and the assistant last."""
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise UserError(f"{where}: expected messages of user and assistant in turn, the user first and the assistant last")
    for number, message in enumerate(messages, 1):
        role = "assistant" if number % 2 == 0 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            found = message.get("role") if isinstance(message, dict) else message
            hint = "; a system message is given by system_prompt" if found == "system" else ""
            raise UserError(f"{where}: message {number} is of {json.dumps(found)[:40]}, expected {role!r}{hint}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise UserError(f"{where}: message {number} has no text as its 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]

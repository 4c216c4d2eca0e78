"""Conversations in rows: lists of messages with roles, and ShareGPT's turns, checked turn by turn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_dataflow.engine.parsing import kind
from finetune_dataflow.engine.row_problems import RowError, quoted
from finetune_dataflow.errors import nearest

Message = dict[str, object]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Chat:
    """A whole conversation, the assistant's last reply included, and the tools it may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()

    @property
    def input_text(self) -> str:
        """The user's last message."""
        return next(str(each["content"]) for each in reversed(self.messages) if each["role"] == "user")

    @property
    def output_text(self) -> str:
        """The assistant's last message: the reply. Empty where the reply is a tool call alone."""
        return str(self.messages[-1]["content"])

    @property
    def repeats_a_role(self) -> bool:
        """Whether two turns of the user, or of the assistant, follow each other, which some chat templates refuse."""
        roles = [each["role"] for each in self.messages]
        return any(one == other and one in {"user", "assistant"} for one, other in itertools.pairwise(roles))


def messages_chat(columns: dict[str, object], key: str = "messages") -> Chat:
    """The conversation of a row with messages of `role` and `content` under `key`; RowError names what is wrong."""
    return Chat(_checked(key, [_message(key, n, each) for n, each in _turns(columns[key], key)]), _tools(columns))


def prompt_chat(columns: dict[str, object]) -> Chat:
    """The conversation of a row whose `prompt` is a list of messages and whose `completion` is one too, or text."""
    prompt = [_message("prompt", n, each) for n, each in _turns(columns["prompt"], "prompt")]
    completion = columns["completion"]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    reply = [_message("completion", n, each) for n, each in _turns(completion, "completion")]
    return Chat(_checked("prompt and completion", prompt + reply), _tools(columns))


def sharegpt_chat(columns: dict[str, object]) -> Chat:
    """The conversation of a row with `conversations` of `from` and `value` (or `role` and `content`), and a `system` text."""
    key = "conversations"
    messages = [_sharegpt_message(key, n, each) for n, each in _turns(columns[key], key)]
    system = columns.get("system")
    if system not in (None, ""):
        if not isinstance(system, str):
            raise RowError("system not text", f"'system' must be text; found {kind(system)}")
        if messages[0]["role"] == "system":
            raise RowError("two systems", f"'system' and the first turn of {key!r} both give a system message", ". Expected one.")
        messages.insert(0, {"role": "system", "content": system})
    return Chat(_checked(key, messages), _tools(columns))


def holds_messages(value: object) -> bool:
    """Whether a value is a list of messages, not some other list."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def _turns(value: object, key: str) -> list[tuple[int, dict[str, object]]]:
    if not isinstance(value, list):
        raise RowError(f"{key} no list", f"{key!r} must be a list of messages; found {kind(value)}")
    if not value:
        raise RowError(f"{key} empty", f"{key!r} is empty", ". Expected messages that end with the assistant's.")
    for number, each in enumerate(value, start=1):
        if not isinstance(each, dict):
            raise RowError(f"{key} turn", f"message {number} of {key!r} must be an object; found {kind(each)}")
    # A table has every field in every message, null where there is none.
    return [(n, {name: part for name, part in each.items() if part is not None}) for n, each in enumerate(value, start=1)]


def _message(key: str, number: int, turn: dict[str, object]) -> Message:
    role = _role(key, number, turn, "role", {role: role for role in ROLES})
    calls = _tool_calls(key, number, turn) if role == "assistant" else []
    content = _content(key, number, role, turn.get("content"), called=bool(calls))
    others = {name: part for name, part in turn.items() if name not in {"role", "content", "tool_calls"}}
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **others}


def _sharegpt_message(key: str, number: int, turn: dict[str, object]) -> Message:
    if "role" in turn and "from" not in turn:
        return _message(key, number, turn)
    role = _role(key, number, turn, "from", SHAREGPT_ROLES)
    if turn["from"] == "function_call":
        return {"role": role, "content": "", "tool_calls": _function_calls(key, number, turn.get("value"))}
    return {"role": role, "content": _content(key, number, role, turn.get("value"), called=False)}


def _role(key: str, number: int, turn: dict[str, object], name: str, known: dict[str, str]) -> str:
    if name not in turn:
        has = f". It has the keys {quoted(sorted(turn)) or 'none'}.{nearest(name, turn)}"
        raise RowError(f"{key} no {name}", f"message {number} of {key!r} has no {name!r}", has)
    role = turn[name]
    if not isinstance(role, str):
        raise RowError(f"{key} {name} no text", f"message {number} of {key!r}: {name!r} must be text; found {kind(role)}")
    if role not in known:
        expected = f". Expected one of {', '.join(map(repr, known))}.{nearest(role[:60], known)}"
        raise RowError(f"{key} role {role}", f"message {number} of {key!r}: unknown role {quoted([role])}", expected)
    return known[role]


def _content(key: str, number: int, role: str, content: object, *, called: bool) -> str:
    """The text of a message; text parts are joined. Only a system message, a tool's answer or a call may be empty."""
    where = f"message {number} of {key!r}"
    if isinstance(content, list):
        content = "".join(_part(where, key, part) for part in content)
    if content is None and called:
        return ""
    if not isinstance(content, str):
        raise RowError(f"{key} content no text", f"{where} ({role}) must have text as its content; found {kind(content)}")
    if not content.strip() and role in {"user", "assistant"} and not called:
        raise RowError(f"{key} {role} blank", f"{where} ({role}) is empty")
    return content


def _part(where: str, key: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        found = f"a part of type {part['type']!r:.60}" if isinstance(part, dict) and part.get("type") else kind(part)
        expected = ". Expected parts of text: {'type': 'text', 'text': …}."
        raise RowError(f"{key} part", f"{where} holds {found}", expected)
    return str(part["text"])


def _checked(key: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, where the user speaks first (after any system message) and the assistant last."""
    first = next(((n, each["role"]) for n, each in enumerate(messages, start=1) if each["role"] != "system"), None)
    if first is None:
        raise RowError(f"{key} no turns", f"{key!r} holds system messages alone", ". Expected a user's and an assistant's turn.")
    if first[1] != "user":
        whose = {"assistant": "the assistant's", "tool": "a tool's"}[str(first[1])]
        raise RowError(f"{key} {first[1]} first", f"the first turn of {key!r} is {whose}", ". Expected the user's first.")
    if messages[-1]["role"] != "assistant":
        found = f"{key!r} ends with a turn of the role {messages[-1]['role']!r}"
        raise RowError(f"{key} end {messages[-1]['role']}", found, ". Expected the assistant's reply at the end.")
    return tuple(messages)


def _tool_calls(key: str, number: int, turn: dict[str, object]) -> list[dict[str, object]]:
    calls = turn.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(
            f"{key} calls", f"message {number} of {key!r}: 'tool_calls' must be a list of objects; found {kind(calls)}"
        )
    return calls


def _function_calls(key: str, number: int, value: object) -> list[dict[str, object]]:
    """ShareGPT's call: JSON text of one `{"name": …, "arguments": …}`, or of a list of them."""
    found = _from_json(value)
    given = found if isinstance(found, list) else [found]
    calls = [call for call in given if isinstance(call, dict) and isinstance(call.get("name"), str)]
    if not calls or len(calls) < len(given):
        expected = '. Expected JSON: {"name": …, "arguments": {…}}.'
        raise RowError(f"{key} function", f"message {number} of {key!r} (function_call) is no call", expected)
    return [{"type": "function", "function": {"name": each["name"], "arguments": each.get("arguments", {})}} for each in calls]


def _tools(columns: dict[str, object]) -> tuple[dict[str, object], ...]:
    """The tools of a row: a list of objects, or its JSON text, as tables hold it."""
    value = columns.get("tools")
    tools = _from_json(value) if isinstance(value, str) and value.strip() else value
    if tools in (None, ""):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools", f"'tools' must be a list of objects; found {kind(value)}")
    return tuple(tools)


def _from_json(value: object) -> object:
    """The value of a JSON text, or the text itself where it is none."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value

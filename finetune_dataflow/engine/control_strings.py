"""Control strings inside the data (`<|im_end|>`, …) replaced by placeholders while a template runs, and put back after it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # {"role": …, "content": …}, and "tool_calls" where a template knows them


class PlainText:
    """Messages whose control strings are placeholders, and the way from a text with placeholders to the original."""

    def __init__(self, control: re.Pattern[str], messages: Sequence[Message]) -> None:
        """Put placeholders for what `control` matches in the messages, their roles left alone."""
        self.found: list[str] = []
        texts = "".join(_strings(list(messages)))
        if not control.search(texts):
            self.protected: list[Message] = list(messages)
            return
        marker = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in texts)
        self._placeholder = re.compile(f"{marker}([0-9]+){marker}")

        def placeholder(match: re.Match[str]) -> str:
            self.found.append(match.group())
            return f"{marker}{len(self.found) - 1}{marker}"

        self.protected = [_with_strings(message, lambda text: control.sub(placeholder, text)) for message in messages]

    def __call__(self, text: str) -> str:
        """The text with every placeholder replaced by the control string it stands for."""
        return self._placeholder.sub(lambda each: self.found[int(each.group(1))], text) if self.found else text


def _strings(value: object) -> Iterator[str]:
    """Every text inside a message, its role left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if name != "role":
                yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed, roles left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each if name == "role" else _with_strings(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_strings(each, change) for each in value]
    return value


def pieces_are_apart(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer reads the text between two control strings as if nothing else were there."""
    plain = not tokenizer.get("normalizer")
    for added in tokenizer["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"] or (added["normalized"] and not plain):
            return False
    return '"prepend_scheme": "first"' not in json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])

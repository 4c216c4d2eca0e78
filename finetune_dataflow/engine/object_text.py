"""An input that is an object or a list, as text a model reads: JSON, or labelled lines."""

from __future__ import annotations

import json
import textwrap

OBJECT_FORMATS = ("json", "labelled")


def object_text(value: dict[str, object] | list[object], object_format: str) -> str:
    """`value` as one line of JSON, or as labelled text (`description: …`, `steps:`, `- …`) without its empty parts."""
    return json.dumps(value, ensure_ascii=False) if object_format == "json" else _labelled(value)


def _labelled(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(_entry(key, text, each) for key, each in value.items() if (text := _labelled(each)))
    if isinstance(value, list):
        # A point's further lines stand under its first, so that a list in a list can be told from it.
        return "\n".join(f"- {textwrap.indent(text, '  ')[2:]}" for each in value if (text := _labelled(each)))
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _entry(key: str, text: str, value: object) -> str:
    if isinstance(value, list):
        return f"{key}:\n{text}"
    if isinstance(value, dict) or "\n" in text:
        return f"{key}:\n{textwrap.indent(text, '  ')}"
    return f"{key}: {text}"

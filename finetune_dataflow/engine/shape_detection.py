"""Which shape the rows of a source have, by the keys under which they hold something."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune_dataflow.engine.parsing import SHOWN
from finetune_dataflow.engine.row_problems import quoted
from finetune_dataflow.engine.sources import SourceRow, rows_named
from finetune_dataflow.errors import UserError, nearest

Columns = dict[str, object]

SHAPE_KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "context_response": ("input", "response"),
    "input_output": ("input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
SHAPES = ("key_mapping", *SHAPE_KEYS)
# A shape gives way to those that say more: Alpaca files hold their rendered `text`, too.
_GIVES_WAY = {"text": set(SHAPE_KEYS) - {"text"}, "input_output": {"alpaca"}}


def shape_by_keys(location: str, rows: Sequence[tuple[SourceRow, Columns]]) -> str:
    """The one shape of all rows that have a known shape; a row without any is left to that shape's reader to refuse.

    Raises UserError with counts and an example where rows have different shapes, and with the shapes and the keys
    found where a row fits several or none fits any.
    """
    groups = _groups((row, (key for key, each in columns.items() if each is not None)) for row, columns in rows)
    if not any(groups):  # the keys may be right and every row lack a value, which the shape's reader says better
        groups = _groups(rows)
    fitting = [set(shapes) for shapes in groups if shapes]
    common = set.intersection(*fitting) if fitting else set()
    if len(common) == 1:
        return common.pop()
    if len(fitting) > 1:
        told = ", ".join(_group_told(shapes, alike) for shapes, alike in groups.items())
        raise UserError(
            f"{location}: the rows have different shapes: {told}. "
            "Expected one shape in a source: split it, or name the shape of all rows with row_shape."
        )
    found = list(dict.fromkeys(key for _, columns in rows for key in columns))
    if common:
        shapes = [shape for shape in SHAPES if shape in common]
        raise UserError(
            f"{location}: the rows fit more than one shape: {_listed(shapes)}. Keys found: {quoted(found)}. "
            f"Name one with row_shape ({', '.join(shapes)}), or name the keys with input_text_key and output_text_key."
        )
    raise UserError(
        f"{location}: no known row shape. Keys found: {quoted(found) or 'none'}.{_nearest_keys(found)} "
        f"Name the keys of the question and of the reply with input_text_key and output_text_key, "
        f"or give rows of one of these shapes: {_listed(SHAPE_KEYS)}."
    )


def _groups(rows: Iterable[tuple[SourceRow, Iterable[str]]]) -> dict[tuple[str, ...], list[SourceRow]]:
    """The rows by the shapes that their keys fit."""
    # Rows of one shape have few sets of keys between them, so each set is looked at once.
    alike: dict[frozenset[str], list[SourceRow]] = {}
    for row, keys in rows:
        alike.setdefault(frozenset(keys), []).append(row)
    groups: dict[tuple[str, ...], list[SourceRow]] = {}
    for found, members in alike.items():
        groups.setdefault(_candidates(found), []).extend(members)
    return groups


def _candidates(keys: frozenset[str]) -> tuple[str, ...]:
    fitting = [shape for shape, needed in SHAPE_KEYS.items() if keys.issuperset(needed)]
    return tuple(shape for shape in fitting if _GIVES_WAY.get(shape, set()).isdisjoint(fitting))


def _group_told(shapes: tuple[str, ...], rows: Sequence[SourceRow]) -> str:
    return f"{len(rows)} {' or '.join(shapes) or 'of no known shape'} ({rows_named(rows[:1])})"


def _listed(shapes: Iterable[str]) -> str:
    return "; ".join(f"{shape} ({', '.join(SHAPE_KEYS[shape])})" for shape in shapes)


def _nearest_keys(found: Sequence[str]) -> str:
    known = {key for keys in SHAPE_KEYS.values() for key in keys}
    short = [key for key in found[: 5 * SHOWN] if len(key) <= 60 and key not in known]
    return "".join(f"{hint[:-1]} for {key!r}?" for key in short if (hint := nearest(key, sorted(known))))

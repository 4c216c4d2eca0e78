"""Named markers in a text: `{name}` is replaced by a value, and by nothing else than a value.

`str.format` lets a text reach attributes and items (`{row.__class__}`, `{row[0]}`), and reads a value's own braces where it
is applied twice. Here a marker is a plain name, values are put in once and never read again, and `{{` and `}}` stand for braces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from finetune_dataflow.errors import UserError, nearest

_PIECE = re.compile(r"(?P<escaped>\{\{|\}\})|\{(?P<marker>[^{}]*)\}|(?P<stray>[{}])")
_NAME = re.compile(r"\w+(?:[ -]+\w+)*")


class _Piece(NamedTuple):
    literal: str  # comes before the marker
    marker: str | None  # None in the last piece


@dataclass(frozen=True)
class Template:
    """A text whose markers are found. `where` names it in errors: an option, or a table of a file."""

    where: str
    pieces: tuple[_Piece, ...]

    @property
    def markers(self) -> frozenset[str]:
        """The names of the markers."""
        return frozenset(piece.marker for piece in self.pieces if piece.marker is not None)

    def fill(self, values: Mapping[str, object]) -> str:
        """The text with every marker replaced by its value, which is put in as it is.

        Raises UserError where a marker has no value: none of its name, null, or not a number.
        """
        filled: list[str] = []
        for literal, marker in self.pieces:
            filled.append(literal)
            if marker is None:
                continue
            if marker not in values:
                known = ", ".join(sorted(values)) or "none"
                raise UserError(f"{self.where}: the marker {{{marker}}} has no value.{nearest(marker, values)} Known: {known}.")
            text = as_text(values[marker])
            if text is None:
                raise UserError(f"{self.where}: the marker {{{marker}}} is empty in this row. Expected a value.")
            filled.append(text)
        return "".join(filled)


def parsed(text: str, where: str) -> Template:
    """The template in `text`. Raises UserError for a lone brace, or a marker that is more than a plain name."""
    pieces: list[_Piece] = []
    literal: list[str] = []
    position = 0
    for match in _PIECE.finditer(text):
        literal.append(text[position : match.start()])
        position = match.end()
        if match["escaped"]:
            literal.append(match["escaped"][0])
        elif match["stray"]:
            line = text.count("\n", 0, match.start()) + 1
            raise UserError(
                f"{where}, line {line}: a lone {match['stray']!r}. Expected {{name}}; a brace itself is written twice."
            )
        elif not _NAME.fullmatch(match["marker"]):
            raise UserError(
                f"{where}: {match.group()!r} is no marker. Expected a plain name in braces, as in {{name}}: markers reach no "
                "attributes, items or formats. A brace itself is written twice."
            )
        else:
            pieces.append(_Piece("".join(literal), match["marker"]))
            literal = []
    literal.append(text[position:])
    return Template(where, (*pieces, _Piece("".join(literal), None)))


def as_text(value: object) -> str | None:
    """A column's value as it stands in a prompt: text as it is, anything else as JSON; None for null and not-a-number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)

"""What a page of a report may hold: sections of charts, tables, texts, drawings, and rows with two models' replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

if TYPE_CHECKING:
    import plotly.graph_objects as go

Tone = Literal["better", "worse", "unclear", "none"]
Kind = Literal["text", "number", "code", "diff"]
Value: TypeAlias = "str | float | Cell | None"


@dataclass(frozen=True)
class Cell:
    """A table's cell whose text is not its value: sorted by `value`, and coloured and called better or worse by `tone`."""

    text: str
    value: float | None = None
    tone: Tone = "none"

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown tone."""
        _known("tone", self.tone, get_args(Tone))


@dataclass(frozen=True)
class Chart:
    """A plotly figure (or its dict), drawn when it is scrolled to. `alt` says in words what it shows."""

    figure: go.Figure | Mapping[str, object]
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns. A column's kind, where none is given, is number if all its values are, else text.

    number and diff are right-aligned and sorted as numbers, a diff bears its sign; code is monospaced. Floats show four
    digits; what is no number shows as a dash and sorts last. From 100 rows on there are pages.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    caption: str = ""
    kinds: Sequence[Kind] = ()
    sortable: bool = True
    searchable: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a row or kinds of another length than the columns, or an unknown kind."""
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns")
        if self.kinds and len(self.kinds) != len(self.columns):
            raise ValueError(f"{len(self.kinds)} kinds for {len(self.columns)} columns")
        for kind in self.kinds:
            _known("kind", kind, get_args(Kind))


@dataclass(frozen=True)
class Facts:
    """Labels with their values, as small tiles."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Prose:
    """Paragraphs, parted by blank lines."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands or a file, monospaced, with a button that copies it."""

    text: str
    caption: str = ""


@dataclass(frozen=True)
class Drawing:
    """An SVG text of our own making, which is embedded as it is, in a box that scrolls and zooms. `alt` says what it shows."""

    svg: str
    caption: str
    alt: str


class Row(NamedTuple):
    """A row of the hold-out: its number, its texts, and the scores of two replies (None where there is none)."""

    number: int
    input: str
    reference: str
    base: str
    tuned: str
    base_score: float | None
    tuned_score: float | None


@dataclass(frozen=True)
class RowTable:
    """Rows of the hold-out with the replies of two models, each marked word by word against the reference.

    Searched, sorted and filtered by which reply scored better; scores equal to three digits are equal. `base` and `tuned`
    name the models, `score` their score, which is better when higher unless `higher_is_better` is false. A plain tuple
    will do for a `Row`.
    """

    rows: Sequence[Row | tuple[int, str, str, str, str, float | None, float | None]]
    caption: str = ""
    base: str = "Base"
    tuned: str = "Tuned"
    score: str = "score"
    higher_is_better: bool = True


Block: TypeAlias = Chart | Table | Facts | Prose | Code | Drawing | RowTable


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its index. A collapsed one shows its title until it is opened or printed."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""
    collapsed: bool = False


@dataclass(frozen=True)
class Page:
    """What a page says: a verdict of one sentence with its tone, warnings, facts, and sections."""

    title: str
    headline: str
    tone: Tone = "none"
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    footer: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown tone."""
        _known("tone", self.tone, get_args(Tone))


def _known(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")

"""Probabilities as colours on a terminal, and texts made safe for one."""

from __future__ import annotations

import bisect
import os
import re
from itertools import pairwise
from typing import TextIO

from finetune_dataflow.engine.quality import shown

# Each band of probability begins at its bound. Its background comes from the fixed part of the 256-colour palette, which
# every theme leaves alone, from dark violet over green to light yellow: lightness rises with every band, so that the
# order survives colour blindness. The text on it is black or white, whatever the terminal's own colours are.
BOUNDS = (0.0, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
BACKGROUNDS = (53, 56, 25, 30, 36, 77, 185, 227)
WHITE, BLACK = 231, 16
FIRST_WITH_BLACK_TEXT = 3
RESET = "\x1b[0m"

_LINE = re.compile("[^\n]+")
# All but newline, tab, the spaces of typography and the two joiners, which Persian, Hindi and emojis are written with.
_TO_CHECK = re.compile("[^\n\t\u00a0\u2000-\u200a\u200c\u200d\u202f\u3000]+")
_LONGEST_ESCAPE = len(r"\U0010ffff")


def colored(token_text: str, probability: float) -> str:
    """`token_text`, made safe by `plain_text`, on the colour of its probability (0 to 1; NaN counts as 0)."""
    return _painted(plain_text(token_text), max(bisect.bisect_right(BOUNDS, probability) - 1, 0) if probability > 0 else 0)


def legend() -> str:
    """One line that explains the colours, each band on its own: " <1% ", " 1-5% ", …, " 95-100% "."""
    limits = [f"{bound:.0%}"[:-1] for bound in (*BOUNDS, 1.0)]
    names = [f"<{limits[1]}%", *(f"{low}-{high}%" for low, high in pairwise(limits[1:]))]
    return "probability of each token: " + "".join(_painted(f" {name} ", band) for band, name in enumerate(names))


def plain_text(text: str) -> str:
    r"""`text` from a model or a data set, safe to print: what a terminal would obey or hide stands as an escape (`\x1b`).

    That is every control character but newline and tab, controls of the writing direction, separators of lines and
    paragraphs, halves of surrogate pairs, and what has no glyph: private-use and unassigned characters.
    """
    return _TO_CHECK.sub(lambda each: shown(each[0], _LONGEST_ESCAPE * len(each[0])), text)


def wants_color(stream: TextIO) -> bool:
    """Whether to write colours to `stream`: a terminal, unless NO_COLOR is set (and not empty) or TERM is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _painted(text: str, band: int) -> str:
    """`text` in the colours of a band, each line apart: a background that is on at a line's end may fill the next one."""
    letters = BLACK if band >= FIRST_WITH_BLACK_TEXT else WHITE
    return _LINE.sub(lambda line: f"\x1b[38;5;{letters};48;5;{BACKGROUNDS[band]}m{line[0]}{RESET}", text)

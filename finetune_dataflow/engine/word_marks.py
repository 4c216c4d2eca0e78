"""A reply compared with its reference word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Literal, TypeAlias

import numpy as np

Mark: TypeAlias = tuple[Literal["same", "extra", "missing"], str]

MOST_WORDS = 3000  # in a text whose differences are marked: the table of two such takes 18 MB
LEAST_SHARED = 0.4  # of the words of both: with fewer, a reply differs throughout
LONE_AMONG = 3
# Chinese and Japanese have no spaces: each character counts as a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s,.;:!?\"()\[\]{}<>、。\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\S"
)


def word_marks(reference: str, reply: str) -> list[Mark] | None:
    """A reply in pieces, compared with its reference word by word: a longest common subsequence; spaces are not compared.

    The "same" and "extra" pieces together are the reply; "missing" ones are words of the reference, where they would
    stand. A common word alone among three or more changed ones on both sides counts as changed, and a reply that shares
    fewer than 40 % of the words is one "extra" piece. None where a text has more than 3,000 words.
    """
    there, here = list(_WORD.finditer(reference)), list(_WORD.finditer(reply))
    if max(len(there), len(here)) > MOST_WORDS:
        return None
    common = _common([each[0] for each in there], [each[0] for each in here])
    around = list(pairwise([(-1, -1), *common, (len(there), len(here))]))
    wide = [max(after[0] - before[0], after[1] - before[1]) > LONE_AMONG for before, after in around]
    if 2 * len(common) < LEAST_SHARED * (len(there) + len(here)):
        return [("extra", reply)] if reply else []
    kept = [pair for place, pair in enumerate(common) if not (wide[place] and wide[place + 1])]
    marks: list[Mark] = []
    for (old, new), (next_old, next_new) in pairwise([(-1, -1), *kept, (len(there), len(here))]):
        start, end = here[new].end() if new >= 0 else 0, here[next_new].start() if next_new < len(here) else len(reply)
        marks.append(("same", here[new][0] if new >= 0 else ""))
        missed = there[old + 1 : next_old]
        missing: Mark = ("missing", reference[missed[0].start() : missed[-1].end()] if missed else "")
        attached = bool(missed) and old >= 0 and there[old].end() == missed[0].start()
        extra = reply[start:end].strip()
        before, after = reply[start:end].split(extra, 1) if extra else (reply[start:end], "")
        marks += [missing, ("same", before)] if attached else [("same", before), missing]
        marks += [("extra", extra), ("same", after)]
    return [
        (kind, "".join(text for _, text in group))
        for kind, group in groupby((each for each in marks if each[1]), key=lambda each: each[0])
    ]


def _common(there: Sequence[str], here: Sequence[str]) -> list[tuple[int, int]]:
    """The places of a longest common subsequence of two lists of words, in both."""
    numbers: dict[str, int] = {}
    old, new = (np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int32) for words in (there, here))
    lengths = np.zeros((len(old) + 1, len(new) + 1), np.int16)
    for row, word in enumerate(old, 1):
        extended = np.maximum(lengths[row - 1, 1:], lengths[row - 1, :-1] + (new == word))
        np.maximum.accumulate(extended, out=lengths[row, 1:])
    pairs, row, column = [], len(old), len(new)
    while row and column:
        if old[row - 1] == new[column - 1]:
            row, column = row - 1, column - 1
            pairs.append((row, column))
        elif lengths[row - 1, column] >= lengths[row, column - 1]:
            row -= 1
        else:
            column -= 1
    return pairs[::-1]

"""Dealing rows to sets by a hash of their own text."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterable

import pandas as pd

from finetune_dataflow.engine.settings import SplitSettings
from finetune_dataflow.errors import UserError

SIDES = ("train", "validation", "hold_out")


def normalised(text: str) -> str:
    """`text` with compatible characters, letter case and white space made equal: the identity of an input."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def position(text: str, random_state: int) -> float:
    """The place of a text in [0, 1), uniform over texts, fixed by the seed and the normalised text alone."""
    digest = hashlib.sha256(f"{random_state}\0{normalised(text)}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def identities(texts: Iterable[str]) -> frozenset[str]:
    """What stands for each text where the text itself need not be kept: 16 hexadecimal digits of its normalised form's hash."""
    return frozenset(hashlib.sha256(normalised(text).encode()).hexdigest()[:16] for text in texts)


def seen(texts: Iterable[str], used: frozenset[str]) -> int:
    """How many of the texts are among those used."""
    return sum(not identities([text]).isdisjoint(used) for text in texts)


def sides(texts: pd.Series, settings: SplitSettings) -> pd.Series:
    """The set of each text, by its position: train first, then validation, then hold-out.

    Raises UserError where a set would be empty, with the number of rows that would do.
    """
    train_end, validation_end = settings.train_size, settings.train_size + settings.validation_size

    def side(text: str) -> str:
        place = position(text, settings.random_state)
        return SIDES[(place >= train_end) + (place >= validation_end)]

    dealt = texts.map(side)
    counts = {name: int((dealt == name).sum()) for name in SIDES}
    if empty := [name for name, count in counts.items() if count == 0]:
        distinct = texts.map(normalised).nunique()
        smallest = min(settings.train_size, settings.validation_size, 1 - validation_end)
        # Each of n different inputs misses a set of share s with probability 1 - s.
        needed = math.ceil(math.log(0.01 / len(SIDES)) / math.log1p(-smallest))
        raise UserError(
            f"{len(texts)} rows ({distinct} different inputs) leave the {' and the '.join(_spoken(e) for e in empty)} "
            f"empty at train_size={settings.train_size}, validation_size={settings.validation_size}. With these shares "
            f"{max(needed, distinct + 1)} rows with different inputs are needed for all three sets to get rows; "
            "add rows, or make the smallest set larger."
        )
    return dealt


def _spoken(side: str) -> str:
    return {"train": "training set", "validation": "validation set", "hold_out": "hold-out set"}[side]

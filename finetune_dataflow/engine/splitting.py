"""Dealing rows to sets by a hash of their own text."""

from __future__ import annotations

import hashlib
import logging
import math
import unicodedata
from collections.abc import Iterable

import pandas as pd

from finetune_dataflow.engine.many_rows import watched
from finetune_dataflow.engine.records import identities
from finetune_dataflow.engine.settings import SplitSettings
from finetune_dataflow.engine.tokens import DroppedRow
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

MOST_SEARCHED = 200_000  # rows among which near-duplicates are looked for unasked
SIDES = ("train", "validation", "hold_out")


def normalised(text: str) -> str:
    """`text` with compatible characters, letter case and white space made equal: the identity of an input."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def position(text: str, random_state: int) -> float:
    """The place of a text in [0, 1), uniform over texts, fixed by the seed and the normalised text alone."""
    digest = hashlib.sha256(f"{random_state}\0{normalised(text)}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def hashes(texts: Iterable[str]) -> frozenset[str]:
    """What stands for each text where the text itself need not be kept: 16 hexadecimal digits of its normalised form's hash."""
    return frozenset(hashlib.sha256(normalised(text).encode()).hexdigest()[:16] for text in texts)


def seen(texts: Iterable[str], used: frozenset[str]) -> int:
    """How many of the texts are among those used."""
    return sum(not hashes([text]).isdisjoint(used) for text in texts)


def sides(rows: pd.DataFrame, settings: SplitSettings) -> pd.Series:
    """The set of each row: the side it was given, or by its position: train first, then validation, then hold-out.

    Where sides are given but one set has none, its share is carved from the rows given to training.
    Raises UserError where a set would be empty, with the number of rows that would do.
    """
    train_end, validation_end = settings.train_size, settings.train_size + settings.validation_size
    keys = identities(rows)
    if "group" in rows:
        keys = rows["group"].where(rows["group"].notna(), keys)

    def side(text: str) -> str:
        place = position(text, settings.random_state)
        return SIDES[(place >= train_end) + (place >= validation_end)]

    dealt = pd.Series([side(text) for text in watched(keys.tolist(), len(keys), "split")], keys.index, dtype=object)
    given = rows["side"] if "side" in rows else pd.Series(None, index=rows.index, dtype=object)
    if given.notna().any():
        lacking = [name for name in SIDES[1:] if not (given == name).any()]
        carved = dealt.isin(lacking) & (given == "train")
        if lacking:
            logger.info(
                "The data gives no %s: %d of its %d training rows are taken, by a hash of their inputs.",
                " and no ".join(_spoken(name) for name in lacking), int(carved.sum()), int((given == "train").sum()),
            )  # fmt: skip
        dealt = given.where(given.notna() & ~carved, dealt)
    _check_sizes(dealt, keys, settings)
    return dealt


def _check_sizes(dealt: pd.Series, keys: pd.Series, settings: SplitSettings) -> None:
    empty = [name for name in SIDES if not (dealt == name).any()]
    if not empty:
        return
    distinct = keys.map(normalised).nunique()
    smallest = min(settings.train_size, settings.validation_size, 1 - settings.train_size - settings.validation_size)
    # Each of n different inputs misses a set of share s with probability 1 - s.
    needed = math.ceil(math.log(0.01 / len(SIDES)) / math.log1p(-smallest))
    raise UserError(
        f"{len(dealt)} rows ({distinct} different inputs) leave the {' and the '.join(_spoken(each) for each in empty)} "
        f"empty at train_size={settings.train_size}, validation_size={settings.validation_size}. With these shares "
        f"{max(needed, distinct + 1)} rows with different inputs are needed for all three sets to get rows; "
        "add rows, or make the smallest set larger."
    )


def leaking_rows(rows: pd.DataFrame, dealt: pd.Series, settings: SplitSettings) -> list[DroppedRow]:
    """The rows to drop because they are nearly a row of a set that must be unseen; none where the search is off."""
    if settings.near_duplicates == "keep":
        return []
    if settings.near_duplicates == "auto" and len(rows) > MOST_SEARCHED:
        logger.warning(
            "Near-duplicates between the sets are not looked for: %d rows are more than %d. Set near_duplicates to drop.",
            len(rows), MOST_SEARCHED,
        )  # fmt: skip
        return []
    from finetune_dataflow.engine import near_duplicates

    texts = identities(rows)
    by_side = [list(zip(rows["row"][dealt == name], texts[dealt == name], strict=True)) for name in SIDES]
    return list(near_duplicates.leaking_rows(*by_side))


def one_side(rows: pd.DataFrame, dealt: pd.Series, dropped: list[DroppedRow], name: str) -> pd.DataFrame:
    """The rows of one set, less those that were dropped. Raises UserError where none is left."""
    chosen = rows[(dealt == name) & ~rows["row"].isin([each.row for each in dropped])].reset_index(drop=True)
    if chosen.empty:
        raise UserError(
            f"Every row of the {_spoken(name)} is nearly a row of another set, so none is left. Look at the data for "
            "repeated inputs, or set near_duplicates to keep."
        )
    return chosen


def _spoken(side: str) -> str:
    return {"train": "training set", "validation": "validation set", "hold_out": "hold-out set"}[side]

"""From records to train, validation and hold-out set: by a hash of each row's own input, so that no row moves."""

from __future__ import annotations

import pandas as pd

from finetune_dataflow import engine
from finetune_dataflow.engine.settings import SplitSettings
from finetune_dataflow.engine.tokens import DroppedRow


def split_settings(
    random_state: int = 42, train_size: float = 0.8, validation_size: float = 0.1, near_duplicates: str = "auto"
) -> SplitSettings:
    """The seed and the shares of the split, and whether rows that are nearly the same may stand on two sides.

    Inputs:
        random_state: The seed of every random draw: the split, the adapter's first weights, the order of the rows.
        train_size: The share of all rows to train on.
        validation_size: The share of all rows that choices are made on; what is left of 1 is the hold-out.
        near_duplicates: What becomes of a row whose input is nearly that of a row which must be unseen: drop, keep, or auto
            (drop, up to 200,000 rows).
    """
    return SplitSettings(random_state, train_size, validation_size, near_duplicates)


def row_sides(records: pd.DataFrame, split_settings: SplitSettings) -> pd.Series:
    """The set of every record, "train", "validation" or "hold_out", in the order of the records.

    A side that the data gives is kept. Else it is a hash of the seed and the row's group, or its own normalised input: rows
    with the same input stay together, and rows that are added later move none. Sizes are therefore approximate. A set that
    given sides lack is carved from the training rows by the same rule. Raises UserError where a set would be empty.
    """
    return engine.splitting.sides(records, split_settings)


def leaking_rows(records: pd.DataFrame, row_sides: pd.Series, split_settings: SplitSettings) -> list[DroppedRow]:
    """The rows that are dropped because their input is nearly that of a row on a side that must be unseen.

    Nearly: a Jaccard similarity of 0.9 or more of the inputs' 5-grams of characters. A training row near a hold-out row is
    dropped as near_hold_out, one near a validation row as near_validation, and a validation row near a hold-out row too.
    """
    return engine.splitting.leaking_rows(records, row_sides, split_settings)


def train_set(records: pd.DataFrame, row_sides: pd.Series, leaking_rows: list[DroppedRow]) -> pd.DataFrame:
    """The records that are trained on."""
    return engine.splitting.one_side(records, row_sides, leaking_rows, "train")


def validation_set(records: pd.DataFrame, row_sides: pd.Series, leaking_rows: list[DroppedRow]) -> pd.DataFrame:
    """The records that choices are made on: the best step, early stopping, sweeps."""
    return engine.splitting.one_side(records, row_sides, leaking_rows, "validation")


def hold_out_set(records: pd.DataFrame, row_sides: pd.Series, leaking_rows: list[DroppedRow]) -> pd.DataFrame:
    """The records that are looked at once, at the end, for the verdict."""
    return engine.splitting.one_side(records, row_sides, leaking_rows, "hold_out")

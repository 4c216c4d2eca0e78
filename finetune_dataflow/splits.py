"""From records to train, validation and hold-out set: by a hash of each row's own input, so that no row moves."""

from __future__ import annotations

import pandas as pd

from finetune_dataflow import engine
from finetune_dataflow.engine.settings import SplitSettings


def split_settings(random_state: int = 42, train_size: float = 0.8, validation_size: float = 0.1) -> SplitSettings:
    """The seed and the shares of the split.

    Inputs:
        random_state: The seed of every random draw: the split, the adapter's first weights, the order of the rows.
        train_size: The share of all rows to train on.
        validation_size: The share of all rows that choices are made on; what is left of 1 is the hold-out.
    """
    return SplitSettings(random_state, train_size, validation_size)


def row_sides(records: pd.DataFrame, split_settings: SplitSettings) -> pd.Series:
    """The set of every record, "train", "validation" or "hold_out", in the order of the records.

    A row's side is a hash of the seed and its own normalised input: rows with the same input stay together, and rows that
    are added later move none. Sizes are therefore approximate. Raises UserError where a set would be empty.
    """
    return engine.splitting.sides(records["input_text"], split_settings)


def train_set(records: pd.DataFrame, row_sides: pd.Series) -> pd.DataFrame:
    """The records that are trained on."""
    return records[row_sides == "train"].reset_index(drop=True)


def validation_set(records: pd.DataFrame, row_sides: pd.Series) -> pd.DataFrame:
    """The records that choices are made on: the best step, early stopping, sweeps."""
    return records[row_sides == "validation"].reset_index(drop=True)


def hold_out_set(records: pd.DataFrame, row_sides: pd.Series) -> pd.DataFrame:
    """The records that are looked at once, at the end, for the verdict."""
    return records[row_sides == "hold_out"].reset_index(drop=True)

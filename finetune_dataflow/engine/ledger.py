"""The account of every row: where it went, or why it was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from finetune_dataflow.engine.many_rows import lines_fingerprint
from finetune_dataflow.engine.tokens import DroppedRow, TokenColumns


def row_ledger(
    rows: pd.Series,
    sides: pd.Series,
    dropped: Sequence[DroppedRow],
    remarks: Mapping[int, Sequence[str]],
    sets: Mapping[str, tuple[pd.Series, TokenColumns]],
) -> pd.DataFrame:
    """One line for each row: its set, whether it is used, its tokens. Raises AssertionError where a row is lost.

    rows, sides: the numbers of the records and their sets. dropped: rows that were left out before tokens were made.
    """
    left_out = np.array([each.row for each in dropped], np.int64)
    concerned = rows.isin(left_out)
    side_of = dict(zip(rows[concerned], sides[concerned], strict=True))
    parts = [_dropped(dropped, [side_of.get(each.row, "") for each in dropped])]
    for name, (_, tokens) in sets.items():
        parts += [_used(name, tokens), _dropped(tokens.dropped, [name] * len(tokens.dropped))]
    # Where a user replaced a set by a table of their own, the rows it left out are told, too; no row goes unsaid.
    accounted = np.concatenate([each["row"].to_numpy() for each in parts])
    in_no_set = rows[~rows.isin(accounted)].tolist()
    parts.append(_dropped([DroppedRow(row, "in_no_set") for row in in_no_set], [""] * len(in_no_set)))
    ledger = pd.concat(parts, ignore_index=True).sort_values("row", kind="stable").reset_index(drop=True)
    ledger["remarks"] = [", ".join(remarks[row]) if row in remarks else "" for row in ledger["row"].tolist()]
    numbers = [rows.to_numpy(np.int64), left_out, *(each.to_numpy(np.int64) for each, _ in sets.values())]
    expected = np.unique(np.concatenate(numbers))
    used, unused = (int((ledger["status"] == status).sum()) for status in ("used", "dropped"))
    assert np.array_equal(np.unique(ledger["row"].to_numpy()), expected), "a row is neither used nor dropped"
    assert len(expected) == used + unused, f"rows_in={len(expected)} but used={used} and dropped={unused}"
    return ledger


def split_fingerprint(ledger: pd.DataFrame) -> str:
    """SHA-256 (hex) of which row is in which set, and whether it is used."""
    return lines_fingerprint(zip(*(ledger[name].tolist() for name in ("row", "set", "status")), strict=True))


def _used(name: str, tokens: TokenColumns) -> pd.DataFrame:
    columns = {
        "row": tokens.rows,
        "set": name,
        "status": "used",
        "reason": "",
        "truncated": tokens.truncated,
        "prompt_tokens": tokens.prompt_lengths.astype(np.int64),
        "reply_tokens": tokens.lengths - tokens.prompt_lengths,
    }
    return pd.DataFrame(columns, index=range(len(tokens)))


def _dropped(dropped: Sequence[DroppedRow], sides: Sequence[str]) -> pd.DataFrame:
    columns = {
        "row": np.array([each.row for each in dropped], np.int64),
        "set": np.array(sides, object),
        "status": "dropped",
        "reason": np.array([each.reason for each in dropped], object),
        "truncated": False,
        "prompt_tokens": 0,
        "reply_tokens": 0,
    }
    return pd.DataFrame(columns, index=range(len(dropped)))

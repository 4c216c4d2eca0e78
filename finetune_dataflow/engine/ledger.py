"""The account of every row: where it went, or why it was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

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
    side_of = dict(zip(rows, sides, strict=True))
    entries = [(each.row, side_of.get(each.row, ""), "dropped", each.reason, False, 0, 0) for each in dropped]
    for name, (_, tokens) in sets.items():
        prompts = tokens.prompt_lengths.tolist()
        replies = (tokens.lengths - tokens.prompt_lengths).tolist()
        for row, prompt, reply, cut in zip(tokens.rows.tolist(), prompts, replies, tokens.truncated.tolist(), strict=True):
            entries.append((row, name, "used", "", cut, prompt, reply))
        entries += [(each.row, name, "dropped", each.reason, False, 0, 0) for each in tokens.dropped]
    columns = ["row", "set", "status", "reason", "truncated", "prompt_tokens", "reply_tokens"]
    ledger = pd.DataFrame(entries, columns=columns).sort_values("row", kind="stable").reset_index(drop=True)
    ledger["remarks"] = [", ".join(remarks.get(row, ())) for row in ledger["row"]]
    expected = np.sort(np.concatenate([*(each.to_numpy() for each, _ in sets.values()), [each.row for each in dropped]]))
    assert ledger["row"].tolist() == expected.tolist(), "a row is neither used nor dropped"
    # Where nobody replaced a set, the three sets and the dropped rows are all rows there were.
    rows_in = len(set(rows) | {each.row for each in dropped})
    if len(expected) == rows_in:
        used, left_out = (int((ledger["status"] == status).sum()) for status in ("used", "dropped"))
        assert rows_in == used + left_out, f"rows_in={rows_in} but used={used} and dropped={left_out}"
    return ledger

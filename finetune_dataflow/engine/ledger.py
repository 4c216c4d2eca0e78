"""The account of every row: where it went, or why it was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    # Where a user replaced a set by a table of their own, the rows it left out are told, too; no row goes unsaid.
    accounted = {entry[0] for entry in entries}
    entries += [(row, "", "dropped", "in_no_set", False, 0, 0) for row in rows.tolist() if row not in accounted]
    columns = ["row", "set", "status", "reason", "truncated", "prompt_tokens", "reply_tokens"]
    ledger = pd.DataFrame(entries, columns=columns).sort_values("row", kind="stable").reset_index(drop=True)
    ledger["remarks"] = [", ".join(remarks.get(row, ())) for row in ledger["row"]]
    expected = {*rows.tolist(), *(each.row for each in dropped), *(row for each, _ in sets.values() for row in each.tolist())}
    used, left_out = (int((ledger["status"] == status).sum()) for status in ("used", "dropped"))
    assert set(ledger["row"]) == expected, "a row is neither used nor dropped"
    assert len(expected) == used + left_out, f"rows_in={len(expected)} but used={used} and dropped={left_out}"
    return ledger

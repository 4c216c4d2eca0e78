"""The account of every row: where it went, or why it was left out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from finetune_dataflow.engine.tokens import TokenColumns


def row_ledger(rows: pd.Series, sets: Mapping[str, tuple[pd.Series, TokenColumns]]) -> pd.DataFrame:
    """One line for each of `rows`: its set, whether it is used, its tokens. Raises AssertionError where a row is lost."""
    entries = []
    for name, (_, tokens) in sets.items():
        prompts = tokens.prompt_lengths.tolist()
        replies = (tokens.lengths - tokens.prompt_lengths).tolist()
        for row, prompt, reply, cut in zip(tokens.rows.tolist(), prompts, replies, tokens.truncated.tolist(), strict=True):
            entries.append((row, name, "used", "", cut, prompt, reply))
        entries += [(each.row, name, "dropped", each.reason, False, 0, 0) for each in tokens.dropped]
    columns = ["row", "set", "status", "reason", "truncated", "prompt_tokens", "reply_tokens"]
    ledger = pd.DataFrame(entries, columns=columns).sort_values("row", kind="stable").reset_index(drop=True)
    expected = np.sort(np.concatenate([each.to_numpy() for each, _ in sets.values()]))
    assert ledger["row"].tolist() == expected.tolist(), "a row is neither used nor dropped"
    # Where nobody replaced a set, the three sets are the records.
    if len(expected) == len(rows):
        used, dropped = (int((ledger["status"] == status).sum()) for status in ("used", "dropped"))
        assert len(rows) == used + dropped, f"rows_in={len(rows)} but used={used} and dropped={dropped}"
    return ledger

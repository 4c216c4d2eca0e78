"""Base against tuned on the same rows: scores, paired differences, one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from finetune_dataflow.engine import paired
from finetune_dataflow.engine.further_metrics import further_metric
from finetune_dataflow.engine.paired import Floats
from finetune_dataflow.engine.text_metrics import METRICS, TAKEN, Metric, row_mean, summed

if TYPE_CHECKING:
    from finetune_dataflow.engine.training import FitSummary

FEWEST_ROWS = 10  # below, an interval calls noise a clear difference more than one time in ten
MOST_ROWS_NAMED = 100_000  # a difference that so many rows would not make clear is none that matters
SHARE = (0.0, 1.0)
_KNOWN_TO_ROUGE = re.compile("[a-zA-Z0-9]+")


def _loss(sums: Floats) -> Floats:
    """The loss by token, in nats, from the summed losses and supervised tokens of rows."""
    return sums[..., 0] / sums[..., 1]


LOSS = Metric("loss", "loss (nats)", ("loss", "supervised_tokens"), _loss, "loss_by_token", higher_is_better=False)
TOKEN_LIMIT = row_mean("token_limit", "hit the token limit", higher_is_better=False)
LABELS = {each.name: each.label for each in (*METRICS.values(), TOKEN_LIMIT, LOSS)} | {"perplexity": "perplexity"}


def metrics_in(rows: pd.DataFrame) -> list[Metric]:
    """The metrics that a table of scores by row has the columns of, the user's own after ours, the loss last."""
    known = [each for each in (*METRICS.values(), TOKEN_LIMIT) if set(each.columns) <= {*rows.columns}]
    ours = TAKEN | {LOSS.row_column, "supervised_tokens", TOKEN_LIMIT.name}
    own = [further_metric(str(name)) for name in rows.columns if name not in ours]
    return [*known, *own, *([LOSS] if set(LOSS.columns) <= {*rows.columns} else [])]


def scored(losses: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """What `metrics_in` reads: the scores of replies, and beside them each row's loss (nats) and supervised tokens."""
    tokens = losses["supervised_tokens"].astype(np.float64)
    return scores.assign(loss=losses["loss"].to_numpy(), supervised_tokens=tokens, loss_by_token=losses["loss"] / tokens)


def scores(rows: pd.DataFrame) -> dict[str, float]:
    """The score of all rows by every metric, and the perplexity, which is e to the loss."""
    found = {each.name: float(each.statistic(summed(rows, each).sum(axis=0))) for each in metrics_in(rows)}
    return found | {"perplexity": math.exp(min(found["loss"], 700.0))}


def comparison(base: pd.DataFrame, tuned: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """`base` and `finetuned` scores, and how they differ, by metric; rows are paired (`engine.paired` for the methods).

    difference: tuned minus base with its 95 % interval, the p-value of a paired permutation test (two-sided), and how many
    rows would make a difference like this clear (null where there is none to be made). intervals: those of either score.
    outcomes: rows that the tuned model won, tied and lost, by the score of the row.
    """
    metrics = metrics_in(base)
    return {
        "base": scores(base),
        "finetuned": scores(tuned),
        "difference": {each.name: _difference(each, base, tuned) for each in metrics},
        "intervals": {each.name: {"base": _interval(each, base), "finetuned": _interval(each, tuned)} for each in metrics},
        "outcomes": {each.name: _outcomes(each, base, tuned) for each in metrics},
    }


def _difference(metric: Metric, base: pd.DataFrame, tuned: pd.DataFrame) -> dict[str, Any]:
    parts = summed(base, metric), summed(tuned, metric)
    return {
        **asdict(paired.difference_interval(*parts, metric.statistic)),
        "p_value": paired.permutation_p(*parts, metric.statistic),
        "rows_needed": paired.rows_needed(*parts, metric.statistic),
    }


def _interval(metric: Metric, rows: pd.DataFrame) -> dict[str, float]:
    share = (metric in METRICS.values() and metric.higher_is_better) or metric == TOKEN_LIMIT
    lowest = 0.0 if metric == LOSS else -math.inf
    return asdict(paired.interval(summed(rows, metric), metric.statistic, limits=SHARE if share else (lowest, math.inf)))


def _outcomes(metric: Metric, base: pd.DataFrame, tuned: pd.DataFrame) -> dict[str, int]:
    one, other = (each[metric.row_column].to_numpy(np.float64) for each in (base, tuned))
    return asdict(paired.outcomes(one, other, metric.higher_is_better is not False))


def deciding_metric(prompts: bool, references: Sequence[str]) -> str:
    """The metric that a verdict goes by: rougeL, chrf or loss.

    Rows without `prompts` have no reply to compare, so that the loss decides. ROUGE knows the letters a to z and digits only:
    where most letters of the references are others, chrF decides, which suits every script.
    """
    if not prompts:
        return LOSS.name
    letters = "".join(references)
    known, all_of_them = sum(map(len, _KNOWN_TO_ROUGE.findall(letters))), sum(map(str.isalnum, letters))
    return "rougeL" if known >= all_of_them / 2 else "chrf"


def verdict(
    differences: dict[str, dict[str, Any]],
    outcomes: dict[str, dict[str, int]],
    rows: int,
    seen_rows: int | None,
    judge: str = "rougeL",
) -> str:
    """One sentence on the difference by the metric `judge`: better, worse, no clear difference, or too few rows to tell.

    `seen_rows` of the rows were used to make the adapter; None where it does not say what it was made from. Where there is
    no clear difference, and more rows would show one as large as this, it says how many.
    """
    which = "it never saw" if seen_rows == 0 else f"of which its fit used {seen_rows}"
    if seen_rows is None:
        which = "(the adapter does not say which rows it was made from, so it may have seen them)"
    counted = f"{rows} row{'s' if rows != 1 else ''} {which}"
    if rows < FEWEST_ROWS:
        return f"No verdict: {counted} {'is' if rows == 1 else 'are'} too few to tell; at least {FEWEST_ROWS} are needed."
    name, sign = ("loss", -1) if judge == LOSS.name else (LABELS[judge], 1)
    difference, of_rows = differences[judge], outcomes[judge]
    figures = (
        f"its {name} is {abs(difference['mean']):.3f} {'higher' if difference['mean'] >= 0 else 'lower'} on {counted} "
        f"(95 % interval {difference['low']:+.3f} to {difference['high']:+.3f}, {said_p(difference['p_value'])}; "
        f"better on {of_rows['wins']}, equal on {of_rows['ties']}, worse on {of_rows['losses']})."
    )
    if seen_rows:
        return f"No verdict on unseen rows: {figures}"
    tone = tone_of(difference, sign)
    if tone != "unclear":
        return f"The tuned model is {tone} than the base model: {figures}"
    return f"There is no clear difference between the tuned and the base model: {figures}{_more_rows(difference, rows)}"


def tone_of(difference: dict[str, Any], sign: int = 1) -> str:
    """`better` or `worse` where the interval of a difference leaves 0 out, else `unclear`. sign: -1 where less is better."""
    if difference["low"] * sign > 0 and difference["high"] * sign > 0:
        return "better"
    return "worse" if difference["low"] * sign < 0 and difference["high"] * sign < 0 else "unclear"


def said_p(value: float) -> str:
    """A p-value for people, with its test's least value in mind."""
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _more_rows(difference: dict[str, Any], rows: int) -> str:
    needed = difference["rows_needed"]
    if needed is None or needed <= rows:
        return ""
    if needed > MOST_ROWS_NAMED:
        return f" A difference as small as this would not be clear on {MOST_ROWS_NAMED:,} rows either."
    return f" The hold-out is too small to tell: a difference like this would be clear on about {needed:,} rows."


def run_metrics(
    hold_out: dict[str, dict[str, Any]],
    validation: dict[str, dict[str, Any]],
    verdict: str,
    row_ledger: pd.DataFrame,
    evaluation: dict[str, Any],
    fit: FitSummary | None,
) -> dict[str, Any]:
    """The content of metrics.json. What only a fit knows is null where none was made."""
    used = row_ledger[row_ledger["status"] == "used"]["set"].value_counts()
    of_fit = ("trained_tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes", "device")
    return {
        **hold_out,
        "verdict": verdict,
        "validation": validation,
        "rows_in": len(row_ledger),
        "dropped_rows": int((row_ledger["status"] == "dropped").sum()),
        "truncated_rows": int(row_ledger["truncated"].sum()),
        "train_rows": int(used.get("train", 0)),
        "validation_rows": int(used.get("validation", 0)),
        "hold_out_rows": int(used.get("hold_out", 0)),
        **{name: getattr(fit, name) if fit else None for name in of_fit},
        "fit": asdict(fit) if fit else None,
        "evaluation": evaluation,
    }


def score_lines(metrics: dict[str, Any]) -> Iterator[tuple[str, float, float, dict[str, Any] | None]]:
    """The lines of a table of scores: label, base, tuned, and the difference where it has an interval of its own."""
    for name, base in metrics["base"].items():
        yield LABELS.get(name, name), base, metrics["finetuned"][name], metrics["difference"].get(name)

"""Base against tuned on the same rows: scores, paired differences, one sentence."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from finetune_dataflow.engine.statistics import weighted_mean_interval

if TYPE_CHECKING:
    from finetune_dataflow.engine.training import FitSummary

FEWEST_ROWS = 10  # below, an interval calls noise a clear difference more than one time in ten
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def scores(losses: pd.DataFrame, rouge: pd.DataFrame) -> dict[str, float]:
    """Mean ROUGE f-measures, the token-weighted mean loss in nats, and its perplexity."""
    loss = float(losses["loss"].sum() / losses["supervised_tokens"].sum())
    return {**{name: float(rouge[name].mean()) for name in ROUGE_TYPES}, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def comparison(
    base_losses: pd.DataFrame, tuned_losses: pd.DataFrame, base_rouge: pd.DataFrame, tuned_rouge: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """`base` and `finetuned` scores, and `difference`: tuned minus base, paired by row, mean with a 95 % interval."""
    difference = {
        name: asdict(weighted_mean_interval((tuned_rouge[name] - base_rouge[name]).to_numpy(np.float64))) for name in ROUGE_TYPES
    }
    weights = tuned_losses["supervised_tokens"].to_numpy(np.float64)
    by_token = ((tuned_losses["loss"] - base_losses["loss"]) / weights).to_numpy(np.float64)
    difference["loss"] = asdict(weighted_mean_interval(by_token, weights))
    return {
        "base": scores(base_losses, base_rouge),
        "finetuned": scores(tuned_losses, tuned_rouge),
        "difference": difference,
    }


def verdict(differences: dict[str, dict[str, float]], rows: int, seen_rows: int | None, by_loss: bool = False) -> str:
    """One sentence on the difference in ROUGE-L: better, worse, no clear difference, or too few rows to tell.

    `seen_rows` of the rows were used to make the adapter; None where it does not say what it was made from. `by_loss`: rows
    without a prompt have no reply to compare, so the loss decides.
    """
    which = "it never saw" if seen_rows == 0 else f"of which its fit used {seen_rows}"
    if seen_rows is None:
        which = "(the adapter does not say which rows it was made from, so it may have seen them)"
    counted = f"{rows} row{'s' if rows != 1 else ''} {which}"
    if rows < FEWEST_ROWS:
        return f"No verdict: {counted} {'is' if rows == 1 else 'are'} too few to tell; at least {FEWEST_ROWS} are needed."
    name, key, sign = ("loss", "loss", -1) if by_loss else ("ROUGE-L", "rougeL", 1)
    difference = differences[key]
    figures = (
        f"its {name} is {abs(difference['mean']):.3f} {'higher' if difference['mean'] >= 0 else 'lower'} on {counted} "
        f"(95 % interval {difference['low']:+.3f} to {difference['high']:+.3f})."
    )
    if seen_rows:
        return f"No verdict on unseen rows: {figures}"
    if difference["low"] * sign > 0 and difference["high"] * sign > 0:
        return f"The tuned model is better than the base model: {figures}"
    if difference["low"] * sign < 0 and difference["high"] * sign < 0:
        return f"The tuned model is worse than the base model: {figures}"
    return f"There is no clear difference between the tuned and the base model: {figures}"


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

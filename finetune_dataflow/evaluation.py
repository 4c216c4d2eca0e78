"""From replies to a verdict: losses and ROUGE of base and tuned model on the same rows, and whether they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from hamilton.function_modifiers import config, parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.fitting import FinishedFit


@parameterize(
    validation_base_losses={"tokens": source("validation_tokens")},
    hold_out_base_losses={"tokens": source("hold_out_tokens")},
)
def base_losses(tokens: TokenColumns, base_model_path: Path) -> pd.DataFrame:
    """The base model's loss on each row of {tokens}: row, loss (nats over the row), supervised_tokens."""
    return engine.losses.losses_by_row(base_model_path, None, tokens)


@parameterize(
    validation_tuned_losses={"tokens": source("validation_tokens")},
    hold_out_tuned_losses={"tokens": source("hold_out_tokens")},
)
def tuned_losses(tokens: TokenColumns, base_model_path: Path, evaluated_adapter: Path) -> pd.DataFrame:
    """The tuned model's loss on each row of {tokens}: row, loss (nats over the row), supervised_tokens."""
    return engine.losses.losses_by_row(base_model_path, evaluated_adapter, tokens)


@parameterize(
    validation_base_rouge={"rows": source("validation_rows"), "replies": source("validation_base_replies")},
    validation_tuned_rouge={"rows": source("validation_rows"), "replies": source("validation_tuned_replies")},
    hold_out_base_rouge={"rows": source("hold_out_rows"), "replies": source("hold_out_base_replies")},
    hold_out_tuned_rouge={"rows": source("hold_out_rows"), "replies": source("hold_out_tuned_replies")},
)
def rouge(rows: pd.DataFrame, replies: list[str]) -> pd.DataFrame:
    """The ROUGE f-measures, in [0, 1], of each reply of {replies}: rouge1, rouge2, rougeL, rougeLsum."""
    return engine.rouge.rouge_by_row(replies, rows["output_text"].tolist())


@config.when(start="base")
def training_and_validation_set_metrics__base(
    finished_fit: FinishedFit, validation_tuned_losses: pd.DataFrame, validation_tuned_rouge: pd.DataFrame
) -> dict[str, float]:
    """The tuned model's train_loss (mean of the last epoch), validation_loss, validation_perplexity and validation ROUGE."""
    scores = _validation_scores(validation_tuned_losses, validation_tuned_rouge)
    return {"train_loss": finished_fit.summary.train_loss, **scores}


@config.when(start="presaved")
def training_and_validation_set_metrics__presaved(
    validation_tuned_losses: pd.DataFrame, validation_tuned_rouge: pd.DataFrame
) -> dict[str, float]:
    """The tuned model's validation_loss, validation_perplexity and validation ROUGE."""
    return _validation_scores(validation_tuned_losses, validation_tuned_rouge)


def _validation_scores(losses: pd.DataFrame, rouge: pd.DataFrame) -> dict[str, float]:
    scores = engine.comparison.scores(losses, rouge)
    return {
        "validation_loss": scores["loss"],
        "validation_perplexity": scores["perplexity"],
        **{name: scores[name] for name in engine.comparison.ROUGE_TYPES},
    }


@parameterize(
    validation_comparison={
        "base_losses": source("validation_base_losses"),
        "tuned_losses": source("validation_tuned_losses"),
        "base_rouge": source("validation_base_rouge"),
        "tuned_rouge": source("validation_tuned_rouge"),
    },
    hold_out_comparison={
        "base_losses": source("hold_out_base_losses"),
        "tuned_losses": source("hold_out_tuned_losses"),
        "base_rouge": source("hold_out_base_rouge"),
        "tuned_rouge": source("hold_out_tuned_rouge"),
    },
)
def comparison(
    base_losses: pd.DataFrame, tuned_losses: pd.DataFrame, base_rouge: pd.DataFrame, tuned_rouge: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """The scores behind {base_rouge} and {tuned_rouge}: `base`, `finetuned`, and `difference` with its 95 % interval.

    Differences are tuned minus base over the same rows; perplexity has none of its own, since it is exp(loss).
    """
    return engine.comparison.comparison(base_losses, tuned_losses, base_rouge, tuned_rouge)


@config.when(start="base")
def seen_rows__base(used_inputs: frozenset[str] | None, hold_out_set: pd.DataFrame) -> int | None:
    """How many hold-out rows have an input that the fit used, or a fit before it; None where that cannot be told."""
    return None if used_inputs is None else engine.splitting.seen(engine.records.identities(hold_out_set), used_inputs)


@config.when(start="presaved")
def seen_rows__presaved(evaluated_adapter: Path, hold_out_set: pd.DataFrame) -> int | None:
    """How many hold-out rows have an input that the adapter's fit used; None where the adapter does not say."""
    used = engine.adapters.used_inputs(evaluated_adapter)
    return None if used is None else engine.splitting.seen(engine.records.identities(hold_out_set), used)


def verdict(hold_out_comparison: dict[str, dict[str, Any]], hold_out_tokens: TokenColumns, seen_rows: int | None) -> str:
    """One sentence: whether the tuned model is better than the base on rows it never saw, worse, or not clearly either."""
    return engine.comparison.verdict(
        hold_out_comparison["difference"], len(hold_out_tokens), seen_rows, by_loss=int(hold_out_tokens.prompt_lengths.max()) <= 1
    )


def hold_out_predictions(
    hold_out_rows: pd.DataFrame,
    hold_out_base_replies: list[str],
    hold_out_tuned_replies: list[str],
    hold_out_base_rouge: pd.DataFrame,
    hold_out_tuned_rouge: pd.DataFrame,
) -> pd.DataFrame:
    """Each hold-out row with both replies and their ROUGE-L: row, input, reference, base, finetuned, base_rougeL, …"""
    return pd.DataFrame(
        {
            "row": hold_out_rows["row"],
            "input": hold_out_rows["input_text"],
            "reference": hold_out_rows["output_text"],
            "base": hold_out_base_replies,
            "finetuned": hold_out_tuned_replies,
            "base_rougeL": hold_out_base_rouge["rougeL"],
            "finetuned_rougeL": hold_out_tuned_rouge["rougeL"],
        }
    )


@config.when(start="base")
def run_metrics__base(
    hold_out_comparison: dict[str, dict[str, Any]],
    validation_comparison: dict[str, dict[str, Any]],
    verdict: str,
    row_ledger: pd.DataFrame,
    evaluation_identity: dict[str, Any],
    finished_fit: FinishedFit,
) -> dict[str, Any]:
    """The content of metrics.json: scores of base and tuned model, the verdict, and what the fit took."""
    return engine.comparison.run_metrics(
        hold_out_comparison, validation_comparison, verdict, row_ledger, evaluation_identity, finished_fit.summary
    )


@config.when(start="presaved")
def run_metrics__presaved(
    hold_out_comparison: dict[str, dict[str, Any]],
    validation_comparison: dict[str, dict[str, Any]],
    verdict: str,
    row_ledger: pd.DataFrame,
    evaluation_identity: dict[str, Any],
) -> dict[str, Any]:
    """The content of metrics.json: scores of base and tuned model, and the verdict; no fit was made."""
    return engine.comparison.run_metrics(
        hold_out_comparison, validation_comparison, verdict, row_ledger, evaluation_identity, None
    )

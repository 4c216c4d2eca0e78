"""From replies to a verdict: losses and scores of base and tuned model on the same rows, and whether they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from hamilton.function_modifiers import config, parameterize, source

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.settings import MetricSettings, Scoring
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


@computed_anew
def metric_settings(metrics: list[str] | None = None, bleu_tokenizer: str = "13a") -> MetricSettings:
    """How replies are scored.

    Inputs:
        metrics: Further metrics: names of `evaluate` metrics, paths of their scripts, or FILE.py:function. Their code is run.
        bleu_tokenizer: How BLEU splits texts: 13a, zh (Chinese), intl, or char.
    """
    return MetricSettings(tuple(metrics or ()), bleu_tokenizer, engine.metric_code.of_files(metrics or ()))


def own_metrics() -> dict[str, Scoring]:
    """Metrics of the user's own, by name: functions of replies and references (lists of str) that give a score a row.

    None here; a node of this name in a module of the user's takes its place.
    """
    return {}


@parameterize(
    validation_base_scores={"rows": source("validation_rows"), "replies": source("validation_base_replies")},
    validation_tuned_scores={"rows": source("validation_rows"), "replies": source("validation_tuned_replies")},
    hold_out_base_scores={"rows": source("hold_out_rows"), "replies": source("hold_out_base_replies")},
    hold_out_tuned_scores={"rows": source("hold_out_rows"), "replies": source("hold_out_tuned_replies")},
)
def reply_scores(
    rows: pd.DataFrame, replies: pd.DataFrame, metric_settings: MetricSettings, own_metrics: dict[str, Scoring]
) -> pd.DataFrame:
    """The scores of each reply of {replies}, and the counts that corpus scores are made of: rouge1, …, token_limit.

    Scores are in [0, 1] but for the length ratio and the user's own. Raises UserError where a metric of the user's fails.
    """
    references, numbers = rows["output_text"].tolist(), rows["row"].tolist()
    given = replies["reply"].tolist()
    scores = engine.text_metrics.scores_by_row(given, references, metric_settings.bleu_tokenizer)
    further = engine.further_metrics.further_scores(metric_settings.metrics, given, references, numbers, own_metrics)
    limit = (~replies["ended"]).astype("float64").to_numpy()
    return pd.concat([scores.assign(token_limit=limit), further], axis=1)


@config.when(start="base")
def training_and_validation_set_metrics__base(
    finished_fit: FinishedFit, validation_tuned_losses: pd.DataFrame, validation_tuned_scores: pd.DataFrame
) -> dict[str, float]:
    """The tuned model's train_loss (mean of the last epoch), validation_loss, validation_perplexity and validation ROUGE."""
    scores = _validation_scores(validation_tuned_losses, validation_tuned_scores)
    return {"train_loss": finished_fit.summary.train_loss, **scores}


@config.when(start="presaved")
def training_and_validation_set_metrics__presaved(
    validation_tuned_losses: pd.DataFrame, validation_tuned_scores: pd.DataFrame
) -> dict[str, float]:
    """The tuned model's validation_loss, validation_perplexity and validation ROUGE."""
    return _validation_scores(validation_tuned_losses, validation_tuned_scores)


def _validation_scores(losses: pd.DataFrame, replies: pd.DataFrame) -> dict[str, float]:
    scores = engine.comparison.scores(engine.comparison.scored(losses, replies))
    return {
        "validation_loss": scores["loss"],
        "validation_perplexity": scores["perplexity"],
        **{name: scores[name] for name in engine.rouge.ROUGE_TYPES},
    }


@parameterize(
    validation_comparison={
        "base_losses": source("validation_base_losses"),
        "tuned_losses": source("validation_tuned_losses"),
        "base_scores": source("validation_base_scores"),
        "tuned_scores": source("validation_tuned_scores"),
    },
    hold_out_comparison={
        "base_losses": source("hold_out_base_losses"),
        "tuned_losses": source("hold_out_tuned_losses"),
        "base_scores": source("hold_out_base_scores"),
        "tuned_scores": source("hold_out_tuned_scores"),
    },
)
def comparison(
    base_losses: pd.DataFrame, tuned_losses: pd.DataFrame, base_scores: pd.DataFrame, tuned_scores: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """{base_scores} against {tuned_scores}: `base`, `finetuned`, `difference`, `intervals` and `outcomes`, by metric.

    Differences are tuned minus base over the same rows, each with a 95 % interval, a p-value and the rows that would make
    one like it clear; perplexity has none of its own, since it is exp(loss).
    """
    scored = engine.comparison.scored
    return engine.comparison.comparison(scored(base_losses, base_scores), scored(tuned_losses, tuned_scores))


@config.when(start="base")
def seen_rows__base(used_inputs: frozenset[str] | None, hold_out_set: pd.DataFrame) -> int | None:
    """How many hold-out rows have an input that the fit used, or a fit before it; None where that cannot be told."""
    return None if used_inputs is None else engine.splitting.seen(engine.records.identities(hold_out_set), used_inputs)


@config.when(start="presaved")
def seen_rows__presaved(evaluated_adapter: Path, hold_out_set: pd.DataFrame) -> int | None:
    """How many hold-out rows have an input that the adapter's fit used; None where the adapter does not say."""
    used = engine.adapters.used_inputs(evaluated_adapter)
    return None if used is None else engine.splitting.seen(engine.records.identities(hold_out_set), used)


def deciding_metric(hold_out_tokens: TokenColumns, hold_out_rows: pd.DataFrame) -> str:
    """The metric that the verdict goes by: rougeL; chrf where ROUGE knows few of the references' letters; loss without prompts.

    It depends on the hold-out's prompts and references alone, never on a reply.
    """
    prompts = int(hold_out_tokens.prompt_lengths.max()) > 1
    return engine.comparison.deciding_metric(prompts, hold_out_rows["output_text"].tolist())


def verdict(
    hold_out_comparison: dict[str, dict[str, Any]], hold_out_rows: pd.DataFrame, seen_rows: int | None, deciding_metric: str
) -> str:
    """One sentence: whether the tuned model is better than the base on rows it never saw, worse, or not clearly either."""
    differences, outcomes = hold_out_comparison["difference"], hold_out_comparison["outcomes"]
    return engine.comparison.verdict(differences, outcomes, len(hold_out_rows), seen_rows, deciding_metric)


def hold_out_predictions(
    hold_out_rows: pd.DataFrame,
    hold_out_base_replies: pd.DataFrame,
    hold_out_tuned_replies: pd.DataFrame,
    hold_out_base_scores: pd.DataFrame,
    hold_out_tuned_scores: pd.DataFrame,
) -> pd.DataFrame:
    """Each hold-out row with both replies, their ROUGE-L and chrF: row, input, reference, base, finetuned, base_rougeL, …"""
    return pd.DataFrame(
        {
            "row": hold_out_rows["row"],
            "input": hold_out_rows["input_text"],
            "reference": hold_out_rows["output_text"],
            "base": hold_out_base_replies["reply"],
            "finetuned": hold_out_tuned_replies["reply"],
            "base_rougeL": hold_out_base_scores["rougeL"],
            "finetuned_rougeL": hold_out_tuned_scores["rougeL"],
            "base_chrf": hold_out_base_scores["chrf"],
            "finetuned_chrf": hold_out_tuned_scores["chrf"],
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

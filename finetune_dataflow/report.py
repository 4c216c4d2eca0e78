"""From scores to what a person looks at: figures, and report.html, which opens anywhere and needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from hamilton import driver
from hamilton.function_modifiers import config

import finetune_dataflow
from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.audit import LabelAudit
from finetune_dataflow.engine.quality import QualityReport
from finetune_dataflow.engine.report_parts import ReportParts
from finetune_dataflow.engine.run_directory import RunIdentity
from finetune_dataflow.engine.settings import TokenizationSettings
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.fitting import FinishedFit


@computed_anew
@config.when(start="base")
def loss_figure__base(run_directory: Path, finished_fit: FinishedFit) -> go.Figure:
    """Did the fit learn, and when was it best? Training and validation losses by update, and the learning rate."""
    return engine.figures.loss_figure(engine.files.read_json_lines(run_directory / engine.run_directory.HISTORY))


@computed_anew
def rouge_figure(hold_out_comparison: dict[str, dict[str, Any]]) -> go.Figure:
    """The ROUGE scores of base and tuned model on the hold-out, with 95 % intervals."""
    return engine.report.scores_figure(hold_out_comparison, engine.rouge.ROUGE_TYPES, "ROUGE on the hold-out")


@computed_anew
def scores_figure(hold_out_comparison: dict[str, dict[str, Any]]) -> go.Figure:
    """Every score of base and tuned model on the hold-out, with 95 % intervals."""
    return engine.report.scores_figure(hold_out_comparison, [*hold_out_comparison["difference"]], "Scores on the hold-out")


@computed_anew
def difference_figure(hold_out_comparison: dict[str, dict[str, Any]], hold_out_rows: pd.DataFrame) -> go.Figure:
    """Tuned minus base on the same hold-out rows, score by score, with 95 % intervals: which are clear?"""
    return engine.report.difference_figure(hold_out_comparison, len(hold_out_rows))


@computed_anew
def score_distribution_figure(hold_out_predictions: pd.DataFrame, deciding_metric: str) -> go.Figure:
    """How the scores of single hold-out rows are spread, for base and tuned model."""
    name = engine.report.shown_metric(deciding_metric)
    label = engine.comparison.LABELS[name]
    base, tuned = (hold_out_predictions[f"{side}_{name}"] for side in ("base", "finetuned"))
    return engine.figures.score_distribution_figure(base, tuned, label, title=f"{label} of single rows")


@computed_anew
def row_scatter_figure(hold_out_predictions: pd.DataFrame, deciding_metric: str) -> go.Figure:
    """Each hold-out row's score under both models: which rows did the fit help, and which did it hurt?"""
    rows, name = hold_out_predictions, engine.report.shown_metric(deciding_metric)
    base, tuned, label = rows[f"base_{name}"], rows[f"finetuned_{name}"], engine.comparison.LABELS[name]
    return engine.figures.scatter_figure(base, tuned, rows["row"].tolist(), rows["input"].tolist(), label)


@computed_anew
def outcomes_figure(hold_out_comparison: dict[str, dict[str, Any]], deciding_metric: str) -> go.Figure:
    """On how many hold-out rows the tuned model is better, equal and worse."""
    counts, label = hold_out_comparison["outcomes"][deciding_metric], engine.comparison.LABELS[deciding_metric]
    return engine.figures.outcomes_figure(**counts, title=f"Rows won and lost, by {label}")


@computed_anew
def token_length_figure(
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    hold_out_tokens: TokenColumns,
    tokenization_settings: TokenizationSettings,
) -> go.Figure:
    """How many tokens the rows of each set have, and how near that is to max_seq_length."""
    sets = {"train": train_tokens, "validation": validation_tokens, "hold-out": hold_out_tokens}
    lengths = {name: tokens.lengths for name, tokens in sets.items()}
    return engine.figures.token_length_figure(lengths, tokenization_settings.max_seq_length)


@computed_anew
def label_figure(label_audit: LabelAudit, hold_out_audit: LabelAudit) -> go.Figure:
    """What share of each set's tokens is learned, and what is masked."""
    return engine.figures.label_figure({**label_audit.sets, **hold_out_audit.sets})


@computed_anew
def row_ledger_figure(row_ledger: pd.DataFrame) -> go.Figure:
    """Where every row of the data file went, and why some were left out."""
    return engine.figures.ledger_figure(row_ledger)


@computed_anew
@config.when(start="base")
def dag_drawing__base() -> str:
    """This graph as SVG text."""
    return _drawing("base")


@computed_anew
@config.when(start="presaved")
def dag_drawing__presaved() -> str:
    """This graph as SVG text."""
    return _drawing("presaved")


def _drawing(start: str) -> str:
    return engine.drawing.svg(
        graph_source(driver.Builder().with_config({"start": start}).with_modules(finetune_dataflow).build())
    )


def graph_source(dr: driver.Driver) -> str:
    """A driver's graph in Graphviz's DOT language, the same on every call."""
    look = {"graph_attr": {"ranksep": "0.4", "nodesep": "0.15"}}
    picture = dr.display_all_functions(deduplicate_inputs=True, show_legend=False, graphviz_kwargs=look)
    return engine.drawing.stable(picture.source)


@computed_anew
def report_parts(
    verdict: str,
    deciding_metric: str,
    hold_out_comparison: dict[str, dict[str, Any]],
    hold_out_predictions: pd.DataFrame,
    row_ledger: pd.DataFrame,
    data_quality: QualityReport,
    label_audit: LabelAudit,
    hold_out_audit: LabelAudit,
    run_identity: RunIdentity,
    run_directory: Path,
    config_file: Path,
    dag_drawing: str,
) -> ReportParts:
    """What the report says besides its figures."""
    return ReportParts(
        verdict, deciding_metric, hold_out_comparison, hold_out_predictions, row_ledger, data_quality.lines(), label_audit,
        hold_out_audit, run_identity, run_directory, config_file.read_text(encoding="utf-8"), dag_drawing,
    )  # fmt: skip


@computed_anew
def report_figures(
    scores_figure: go.Figure,
    difference_figure: go.Figure,
    score_distribution_figure: go.Figure,
    row_scatter_figure: go.Figure,
    outcomes_figure: go.Figure,
    token_length_figure: go.Figure,
    label_figure: go.Figure,
    row_ledger_figure: go.Figure,
) -> dict[str, go.Figure]:
    """The figures that both graphs' reports show, by name."""
    return dict(locals())


@computed_anew
@config.when(start="base")
def report_file__base(
    run_directory: Path,
    report_parts: ReportParts,
    report_figures: dict[str, go.Figure],
    loss_figure: go.Figure,
    finished_fit: FinishedFit,
) -> Path:
    """report.html: verdict, losses, scores, every hold-out row with both replies, data, graph, settings; one file."""
    page = engine.report.report_page(report_parts, {**report_figures, "loss_figure": loss_figure}, finished_fit.summary)
    return engine.report.write(run_directory, page)


@computed_anew
@config.when(start="presaved")
def report_file__presaved(run_directory: Path, report_parts: ReportParts, report_figures: dict[str, go.Figure]) -> Path:
    """report.html: verdict, scores, every hold-out row with both replies, data, graph, settings; one file."""
    return engine.report.write(run_directory, engine.report.report_page(report_parts, report_figures, None))

"""What made what: the settings of a run, and the fingerprints of what went into it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hamilton.function_modifiers import config

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.dataset import DataSource
from finetune_dataflow.engine.code_versions import package_version
from finetune_dataflow.engine.fit_settings import FitSettings
from finetune_dataflow.engine.reporting_settings import ReportingSettings
from finetune_dataflow.engine.run_directory import RunIdentity
from finetune_dataflow.engine.settings import (
    GenerationSettings,
    MetricSettings,
    PromptSettings,
    QuantizationSettings,
    Scoring,
    SplitSettings,
    TokenizationSettings,
)
from finetune_dataflow.engine.tokens import TokenColumns


def preparation_settings(
    data_source: DataSource,
    base_model_name: str,
    quantization_settings: QuantizationSettings,
    split_settings: SplitSettings,
    prompt_settings: PromptSettings,
    tokenization_settings: TokenizationSettings,
) -> dict[str, Any]:
    """Every input that the prepared data depends on, by name."""
    stages = (data_source, quantization_settings, split_settings, prompt_settings, tokenization_settings)
    return {"model_id": base_model_name, **{name: value for stage in stages for name, value in asdict(stage).items()}}


def rendering_fingerprints(base_model_path: Path, chat_template: str, prompt_settings: PromptSettings) -> dict[str, str]:
    """What made text into tokens, by fingerprints: `tokenizer`, `chat_template` (the one in use), and `prompt`."""
    return engine.rendering.fingerprints(base_model_path, chat_template, prompt_settings)


@config.when(start="base")
def run_identity__base(
    preparation_settings: dict[str, Any],
    fit_settings: FitSettings,
    base_model_fingerprint: str,
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    rendering_fingerprints: dict[str, str],
    starting_weights: Path | None,
    reporting_settings: ReportingSettings,
) -> RunIdentity:
    """What makes a fit this fit and no other: its settings, and the fingerprints of what it is given.

    Generation is not part of it: the same adapter may be evaluated again with other settings.
    """
    return engine.run_directory.run_identity(
        {**preparation_settings, **fit_settings.values},
        {
            "base_model": base_model_fingerprint,
            "train_set": train_tokens.fingerprint(),
            "validation_set": validation_tokens.fingerprint(),
            **rendering_fingerprints,
            **engine.starting_weights.fingerprints(starting_weights),
        },
        {**fit_settings.unbinding, **engine.starting_weights.named(starting_weights), **reporting_settings.named},
    )


@config.when(start="presaved")
def run_identity__presaved(
    preparation_settings: dict[str, Any],
    evaluated_adapter: Path,
    dataset_fingerprint: str,
    base_model_fingerprint: str,
) -> RunIdentity:
    """What makes an evaluation this one and no other: its settings, and the fingerprints of data, base model and adapter."""
    return engine.run_directory.run_identity(
        preparation_settings,
        {
            "dataset": dataset_fingerprint,
            "base_model": base_model_fingerprint,
            "adapter": engine.adapters.adapter_fingerprint(evaluated_adapter),
        },
    )


@computed_anew
@config.when(start="presaved")
def run_directory__presaved(run_identity: RunIdentity, output_dir: str = "") -> Path:
    """The directory of the evaluation's files.

    Inputs:
        output_dir: The directory of the run; empty for runs/<name of the data file>-<8 digits of the run's fingerprint>.

    Raises UserError where the directory holds another run.
    """
    with engine.run_directory.held(output_dir, run_identity) as directory:
        return directory


def evaluation_identity(
    generation_settings: GenerationSettings,
    metric_settings: MetricSettings,
    own_metrics: dict[str, Scoring],
    validation_tokens: TokenColumns,
    hold_out_tokens: TokenColumns,
) -> dict[str, Any]:
    """What makes an evaluation this one and no other: how replies are generated and scored, and the rows that are answered."""
    return {
        **asdict(generation_settings),
        **_metric_values(metric_settings),
        "code_of_metrics": [*metric_settings.code],
        "own_metrics": engine.metric_code.of_functions(own_metrics),
        "validation_set": validation_tokens.fingerprint(),
        "hold_out_set": hold_out_tokens.fingerprint(),
    }


def _metric_values(settings: MetricSettings) -> dict[str, Any]:
    return {"metrics": list(settings.metrics), "bleu_tokenizer": settings.bleu_tokenizer}


@computed_anew
def config_file(
    run_directory: Path,
    run_identity: RunIdentity,
    generation_settings: GenerationSettings,
    metric_settings: MetricSettings,
    evaluated_adapter: Path,
) -> Path:
    """config.yaml: every input of the run with its value, defaults included, as `-c` takes it."""
    presaved = "adapter" in run_identity.fingerprints
    start = {"start": "presaved", "adapter_path": str(evaluated_adapter)} if presaved else {"start": "base"}
    of_run = {**run_identity.names, **run_identity.settings, **run_identity.unbinding}
    of_replies = {**asdict(generation_settings), **_metric_values(metric_settings)}
    values = {**start, **of_replies, **of_run}  # the seed is the run's, which that of greedy replies is not
    return engine.files.write_if_changed(
        run_directory / "config.yaml",
        yaml.safe_dump(values, sort_keys=False),
        invalidated=run_directory / engine.run_directory.METRICS,
    )


@computed_anew
def lineage_file(
    run_directory: Path,
    run_identity: RunIdentity,
    rendering_fingerprints: dict[str, str],
    evaluation_identity: dict[str, Any],
    evaluated_adapter: Path,
    dataset_fingerprint: str,
    row_ledger: pd.DataFrame,
    metrics_file: Path,
) -> Path:
    """lineage.json: what made this adapter and these scores, by fingerprints, settings, code and versions."""
    return engine.files.write_json(
        run_directory / engine.run_directory.LINEAGE,
        {
            **asdict(run_identity),
            "dataset": dataset_fingerprint,
            "split": engine.ledger.split_fingerprint(row_ledger),
            **rendering_fingerprints,
            "adapter": engine.adapters.adapter_fingerprint(evaluated_adapter),
            "evaluation": evaluation_identity,
            "scores": engine.files.content_fingerprint([metrics_file]),
            "code": package_version(),
            "versions": engine.run_directory.versions(),
        },
    )

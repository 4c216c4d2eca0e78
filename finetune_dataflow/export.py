"""What a run leaves behind: the saved adapter and the files of the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from hamilton.function_modifiers import config

from finetune_dataflow import engine


def row_ledger_file(run_directory: Path, row_ledger: pd.DataFrame) -> Path:
    """row_ledger.jsonl: every row of the data file and what became of it, a line each."""
    text = engine.files.json_lines(row_ledger.to_dict("records"))
    metrics = run_directory / engine.run_directory.METRICS
    return engine.files.write_if_changed(run_directory / "row_ledger.jsonl", text, invalidated=metrics)


def predictions_file(run_directory: Path, hold_out_predictions: pd.DataFrame) -> Path:
    """predictions.jsonl: every hold-out row with the reference and both replies, a line each."""
    text = engine.files.json_lines(hold_out_predictions.to_dict("records"))
    metrics = run_directory / engine.run_directory.METRICS
    return engine.files.write_if_changed(run_directory / "predictions.jsonl", text, invalidated=metrics)


def metrics_file(
    run_directory: Path, run_metrics: dict[str, Any], predictions_file: Path, row_ledger_file: Path, config_file: Path
) -> Path:
    """metrics.json: the scores of base and tuned model. Written last, so that its presence says the run is whole."""
    return engine.files.write_json(run_directory / engine.run_directory.METRICS, run_metrics)


@config.when(start="base")
def save_best_models__base(adapter_path: Path, config_file: Path, row_ledger_file: Path) -> dict[str, Path]:
    """The paths of what was saved: `adapter` (the directory with the best validation loss), `config`, `weights`, …"""
    return {
        **engine.adapters.adapter_files(adapter_path),
        "run_config": config_file,
        "row_ledger": row_ledger_file,
        "history": adapter_path.parent / engine.run_directory.HISTORY,
    }


@config.when(start="presaved")
def save_best_models__presaved(evaluated_adapter: Path) -> dict[str, Path]:
    """The paths of the given adapter: `adapter` (its directory), `config`, `weights`. Nothing is written."""
    return engine.adapters.adapter_files(evaluated_adapter)

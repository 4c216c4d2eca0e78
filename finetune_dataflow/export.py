"""What a run leaves behind: the saved adapter and the files of the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from hamilton.function_modifiers import config

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.audit import LabelAudit
from finetune_dataflow.engine.fit_settings import FitSettings
from finetune_dataflow.engine.reporting_settings import ReportingSettings
from finetune_dataflow.engine.run_directory import RunIdentity


@computed_anew
def row_ledger_file(run_directory: Path, row_ledger: pd.DataFrame) -> Path:
    """row_ledger.jsonl: every row of the data file and what became of it, a line each."""
    text = engine.files.json_lines(row_ledger.to_dict("records"))
    metrics = run_directory / engine.run_directory.METRICS
    return engine.files.write_if_changed(run_directory / "row_ledger.jsonl", text, invalidated=metrics)


@computed_anew
def label_audit_file(run_directory: Path, label_audit: LabelAudit) -> Path:
    """label_audit.html: what is learned, in figures and in three rows with what is learned marked."""
    path = run_directory / "label_audit.html"
    return engine.files.write_if_changed(path, label_audit.html(), invalidated=run_directory / engine.run_directory.METRICS)


@computed_anew
def hold_out_inputs_file(run_directory: Path, hold_out_set: pd.DataFrame) -> Path:
    """hold_out_inputs.txt: the hold-out's inputs as hashes, so that a later fit can tell that it trains on them."""
    kept = sorted(engine.splitting.hashes(engine.records.identities(hold_out_set)))
    text = "".join(f"{each}\n" for each in kept)
    path = run_directory / engine.run_directory.HOLD_OUT_INPUTS
    return engine.files.write_if_changed(path, text, invalidated=run_directory / engine.run_directory.METRICS)


@computed_anew
def predictions_file(run_directory: Path, hold_out_predictions: pd.DataFrame) -> Path:
    """predictions.jsonl: every hold-out row with the reference and both replies, a line each."""
    text = engine.files.json_lines(hold_out_predictions.to_dict("records"))
    metrics = run_directory / engine.run_directory.METRICS
    return engine.files.write_if_changed(run_directory / "predictions.jsonl", text, invalidated=metrics)


@computed_anew
def dag_file(run_directory: Path, dag_drawing: str) -> Path:
    """dag.svg: this graph."""
    return engine.files.write_text(run_directory / "dag.svg", dag_drawing)


@computed_anew
def metrics_file(
    run_directory: Path,
    run_metrics: dict[str, Any],
    predictions_file: Path,
    report_file: Path,
    dag_file: Path,
    row_ledger_file: Path,
    config_file: Path,
    label_audit_file: Path,
    hold_out_inputs_file: Path,
) -> Path:
    """metrics.json: the scores of base and tuned model. Written last, so that its presence says the run is whole."""
    return engine.files.write_json(run_directory / engine.run_directory.METRICS, run_metrics)


@computed_anew
@config.when(start="base")
def reported_metrics__base(
    metrics_file: Path,
    run_metrics: dict[str, Any],
    run_directory: Path,
    run_identity: RunIdentity,
    reporting_settings: ReportingSettings,
) -> Path | None:
    """The file with the id under which the run's metrics were reported; None where they are reported nowhere."""
    return engine.reporting.reported_metrics(reporting_settings, run_directory, run_identity.told, run_metrics)


@computed_anew
@config.when(start="base")
def adapter_copy__base(adapter_path: Path, adapter_copy_target: Path | None) -> Path | None:
    """A second copy of the adapter where one is wanted, else None."""
    return None if adapter_copy_target is None else engine.adapters.copy_adapter(adapter_path, adapter_copy_target)


@computed_anew
@config.when(start="base")
def complete_model__base(
    adapter_path: Path, run_directory: Path, base_model_path: Path, fit_settings: FitSettings
) -> Path | None:
    """The directory of the fully fine-tuned model, complete in itself; None where an adapter was trained."""
    if fit_settings.method.fine_tune_type != "full":
        return None
    return engine.model_directories.complete_model(base_model_path, adapter_path, Path(run_directory / "model"))


@computed_anew
@config.when(start="base")
def save_best_models__base(
    adapter_path: Path,
    config_file: Path,
    row_ledger_file: Path,
    adapter_copy: Path | None,
    complete_model: Path | None,
) -> dict[str, Path]:
    """The paths of what was saved: `adapter` (the directory of the best), `config`, `weights`, `last_adapter`, …

    `model` is a complete model directory, there after a full fine-tune; `adapter_copy` is there where one is wanted.
    """
    optional = {"model": complete_model, "adapter_copy": adapter_copy}
    return {
        **engine.adapters.adapter_files(adapter_path),
        **{name: path for name, path in optional.items() if path is not None},
        "last_adapter": adapter_path.parent / engine.training.LAST,
        "run_config": config_file,
        "row_ledger": row_ledger_file,
        "history": adapter_path.parent / engine.run_directory.HISTORY,
    }


@computed_anew
@config.when(start="presaved")
def save_best_models__presaved(evaluated_adapter: Path) -> dict[str, Path]:
    """The paths of the given adapter: `adapter` (its directory), `config`, `weights`. Nothing is written."""
    return engine.adapters.adapter_files(evaluated_adapter)

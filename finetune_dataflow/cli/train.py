"""`run.py train` and `run.py evaluate`: the main job, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_dataflow import engine
from finetune_dataflow.cli.graph import dot_source
from finetune_dataflow.cli.options import build_driver, parse

PREPARED = [
    "source_rows", "shaped_rows", "leaking_rows", "row_ledger", "data_quality", "label_audit", "hold_out_audit",
    "train_tokens", "validation_tokens", "hold_out_tokens", "run_identity", "evaluation_identity", "base_model_path",
]  # fmt: skip
RESULTS = [
    "save_best_models", "hold_out_set_predictions", "finetuned_model_on_validation_set",
    "training_and_validation_set_metrics", "config_file", "metrics_file", "run_metrics", "lineage_file",
]  # fmt: skip
NAMES = {
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum",
    "loss": "loss (nats)", "perplexity": "perplexity",
}  # fmt: skip


def train(arguments: Sequence[str], start: str | None = None) -> int:
    """Prepare, fit (under start="base"), evaluate, write the run directory and print the verdict."""
    options = parse(arguments, start)
    dr = build_driver(options.start, options.modules)
    prepared = dr.execute(PREPARED, inputs=options.inputs)
    directory = engine.run_directory.location(options.inputs.get("output_dir", ""), prepared["run_identity"])
    engine.run_directory.check_unclaimed(directory, prepared["run_identity"])
    metrics = engine.run_directory.finished_metrics(directory, prepared["run_identity"], prepared["evaluation_identity"])
    if metrics is not None:
        print(f"{directory} holds this run, finished. Its result:\n")
    else:
        print(*data_lines(options.inputs["data_path"], prepared), sep="\n")
        results = dr.execute(RESULTS, inputs=options.inputs, overrides=prepared)
        engine.files.write_text(directory / "dag.svg", engine.drawing.svg(dot_source(options.start, options.modules)))
        metrics = results["run_metrics"]
    print(table(metrics))
    print(f"\n{metrics['verdict']}\n")
    print(whereabouts(directory, metrics))
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Everything before the fit, printed: sources and shapes, the split, the data's quality, the label audit, the steps."""
    options = parse(arguments)
    outputs = [*PREPARED, *(["fit_settings"] if options.start == "base" else [])]
    prepared = build_driver(options.start, options.modules).execute(outputs, inputs=options.inputs)
    print(*data_lines(options.inputs["data_path"], prepared), sep="\n")
    print("\nLabels:")
    audit = prepared["label_audit"]
    print(*(f"  {line}" for line in [*audit.lines(), *prepared["hold_out_audit"].lines()]), sep="\n")
    print(f"\n{audit.coloured() if sys.stdout.isatty() else audit.plain()}")
    if options.start == "base":
        settings, tokens = prepared["fit_settings"], prepared["train_tokens"]
        steps = engine.training.total_steps(len(tokens), settings)
        print(f"\nThe fit: {steps} updates of up to {settings.batch_size} rows, {settings.epochs:g} epochs.")
    return 0


def data_lines(data_path: str, prepared: dict[str, Any]) -> list[str]:
    """What was read, what went where, and what is odd in it."""
    shaped = prepared["shaped_rows"]
    lines = [f"{data_path}: {prepared['source_rows'].kind}, rows of the shape {shaped.shape}.", *shaped.notes]
    lines.append(rows_line(prepared["row_ledger"]))
    for reason, rows in prepared["row_ledger"].query("status == 'dropped'").groupby("reason")["row"]:
        named = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        lines.append(f"  dropped, {reason}: row{'s' if len(rows) > 1 else ''} {named}")
    return [*lines, *(f"  {line}" for line in prepared["data_quality"].lines())]


def rows_line(ledger: Any) -> str:
    """How many rows went where, and how many were dropped or cut."""
    used = ledger[ledger["status"] == "used"]["set"].value_counts()
    counts = ", ".join(f"{used.get(name, 0)} {name.replace('_', '-')}" for name in ("train", "validation", "hold_out"))
    dropped, cut = int((ledger["status"] == "dropped").sum()), int(ledger["truncated"].sum())
    return f"{len(ledger)} rows: {counts}, {dropped} dropped, {cut} with a shortened prompt."


def table(metrics: dict[str, Any]) -> str:
    """The hold-out's scores of base and tuned model side by side, with the difference and its interval."""
    lines = [f"{'':14}{'base':>9}{'tuned':>9}   tuned - base (95 % interval)"]
    for key, name in NAMES.items():
        line = f"{name:14}{metrics['base'][key]:9.3f}{metrics['finetuned'][key]:9.3f}"
        if key in metrics["difference"]:
            interval = metrics["difference"][key]
            line += f"   {interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"
        lines.append(line)
    return "\n".join([f"Scores on {metrics['hold_out_rows']} hold-out rows, which no choice was made on:", *lines])


def whereabouts(directory: Path, metrics: dict[str, Any]) -> str:
    """Where the results are, and what the fit took."""
    if metrics["fit"] is None:
        return f"Everything of this evaluation is in {directory}."
    fit = metrics["fit"]
    best = (
        f"best after update {fit['best_step']} of {fit['steps']}"
        if fit["best_step"]
        else "no update improved the validation loss, so the adapter is the untrained one"
    )
    return (
        f"Fit: validation loss {fit['first_validation_loss']:.3f} -> {fit['best_validation_loss']:.3f} ({best}), "
        f"{fit['tokens_per_second']:.0f} tokens/s, peak memory {fit['peak_memory_bytes'] / 2**30:.1f} GiB "
        f"({fit['device']}).\nThe adapter is in {directory / 'adapters'}; everything of this run in {directory}."
    )

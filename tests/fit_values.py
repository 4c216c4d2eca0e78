"""Fit settings from flat names, and small sets of rows, for the tests of the fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings, MethodSettings, OptimizerSettings
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns

SMALL: dict[str, Any] = {
    "num_layers": 2, "lora_rank": 4, "lora_scale": 10.0, "learning_rate": 0.01, "weight_decay": 0.0, "epochs": 3.0,
    "evals_per_epoch": 2, "random_state": 7,
}  # fmt: skip


def settings_of(**values: Any) -> FitSettings:
    """The settings of a small fit, with some values of one's own under the inputs' names; None takes one away."""
    values = {**SMALL, **values}
    method, optimizer, loop = (
        {each.name: values.pop(each.name) for each in fields(kind) if each.name in values}
        for kind in (MethodSettings, OptimizerSettings, LoopSettings)
    )
    assert not values, f"unknown: {values}"
    return FitSettings(MethodSettings(**method), OptimizerSettings(**optimizer), LoopSettings(**loop))


def rows_of(count: int, first: int) -> TokenColumns:
    """Rows that all say the same thing after different prompts: easy to learn."""
    return token_columns([EncodedRow(n, [n % 200, 10, 3 * n % 250], [*b"yes", 258]) for n in range(first, first + count)])


def adapter_digest(directory: Path, name: str = "adapters") -> str:
    """SHA-256 of a run's adapter."""
    return hashlib.sha256((directory / name / "adapters.safetensors").read_bytes()).hexdigest()


def history(directory: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [value for value in map(json.loads, lines) if value["event"] == event]

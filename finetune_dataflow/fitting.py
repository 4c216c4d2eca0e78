"""From tokens to an adapter: the LoRA fit under start="base", a given adapter under start="presaved"."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from hamilton.function_modifiers import config

from finetune_dataflow import engine
from finetune_dataflow.engine.audit import LabelAudit
from finetune_dataflow.engine.run_directory import RunIdentity
from finetune_dataflow.engine.settings import FitSettings
from finetune_dataflow.engine.tokens import TokenColumns

if TYPE_CHECKING:
    from finetune_dataflow.engine.training import FitSummary


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedFit:
    """A finished fit: the directory of its run, and what it says of itself."""

    run_directory: Path
    summary: FitSummary


@config.when(start="base")
def fit_settings__base(
    split_settings: engine.settings.SplitSettings,
    num_layers: int = 16,
    lora_rank: int = 8,
    lora_scale: float = 20.0,
    lora_dropout: float = 0.0,
    learning_rate: float = 2e-4,
    warmup_proportion: float = 0.1,
    weight_decay: float = 0.01,
    epochs: float = 1.0,
    batch_size: int = 4,
    evals_per_epoch: int = 2,
) -> FitSettings:
    """The settings of the fit.

    Inputs:
        num_layers: How many of the model's last blocks are adapted; -1 for all.
        lora_rank: The rank of the two matrices that LoRA adds to a linear layer.
        lora_scale: The factor on LoRA's output, absolute as in mlx-lm (PEFT's alpha is scale * rank).
        lora_dropout: The share of a LoRA layer's inputs that is dropped in training.
        learning_rate: The highest learning rate, reached after the warm-up; a cosine leads from there to zero.
        warmup_proportion: The share of all updates in which the learning rate rises.
        weight_decay: AdamW's weight decay.
        epochs: How often every training row is used.
        batch_size: Rows in one update.
        evals_per_epoch: How often an epoch the validation loss is measured, for the choice of the best adapter.
    """
    return FitSettings(
        num_layers=num_layers,
        lora_rank=lora_rank,
        lora_scale=lora_scale,
        lora_dropout=lora_dropout,
        learning_rate=learning_rate,
        warmup_proportion=warmup_proportion,
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
        evals_per_epoch=evals_per_epoch,
        random_state=split_settings.random_state,
    )


@config.when(start="base")
def finished_fit__base(
    base_model_path: Path,
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    fit_settings: FitSettings,
    run_identity: RunIdentity,
    label_audit: LabelAudit,
    train_set: pd.DataFrame,
    validation_set: pd.DataFrame,
    output_dir: str = "",
) -> FinishedFit:
    """The fit, done: its adapter stands in the run directory. A directory with the same fit finished is taken as it is.

    It takes the label audit so that nothing is trained on labels that the audit refuses.

    Inputs:
        output_dir: The directory of the run; empty for runs/<name of the data file>-<8 digits of the run's fingerprint>.

    Raises UserError where the directory holds another run, or is in use by one.
    """
    used = engine.splitting.hashes([*engine.records.identities(train_set), *engine.records.identities(validation_set)])
    with engine.run_directory.held(output_dir, run_identity) as directory:
        summary = engine.run_directory.finished_fit(directory)
        if summary is None:
            engine.run_directory.warn_of_hold_outs_beside(directory, used)
            if (directory / engine.run_directory.HISTORY).exists():
                logger.warning("The fit in %s was not finished. It starts again from the first update.", directory)
            summary = engine.training.fit(
                base_model_path, train_tokens, validation_tokens, fit_settings, directory, run_identity.adapter_notes, used
            )
    return FinishedFit(directory, summary)


@config.when(start="base")
def run_directory__base(finished_fit: FinishedFit) -> Path:
    """The directory of the run."""
    return finished_fit.run_directory


@config.when(start="base")
def adapter_path__base(run_directory: Path) -> Path:
    """The directory of the adapter with the best validation loss, in mlx-lm's layout."""
    return run_directory / "adapters"


@config.when(start="base")
def evaluated_adapter__base(adapter_path: Path) -> Path:
    """The directory of the adapter that is evaluated: the one that was fitted."""
    return adapter_path


@config.when(start="presaved")
def evaluated_adapter__presaved(adapter_path: str, base_model_fingerprint: str) -> Path:
    """The directory of the adapter that is evaluated: the one that was given.

    Inputs:
        adapter_path: The directory of the adapter to evaluate, in mlx-lm's layout.

    Raises UserError where it holds no adapter, or one of another base model.
    """
    directory = engine.files.user_path(adapter_path)
    engine.adapters.check_base_model(directory, base_model_fingerprint)
    return directory


@config.when(start="base")
def training_history__base(run_directory: Path) -> pd.DataFrame:
    """The losses as they were recorded: event ("train" or "validation"), step (updates), loss, learning_rate, …"""
    history = pd.DataFrame(engine.files.read_json_lines(run_directory / engine.run_directory.HISTORY))
    return history[history["event"] != "end"].reset_index(drop=True)

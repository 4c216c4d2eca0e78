"""From tokens to an adapter: the LoRA fit under start="base", a given adapter under start="presaved"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from hamilton.function_modifiers import config

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.audit import LabelAudit
from finetune_dataflow.engine.fit_plan import FitPlan
from finetune_dataflow.engine.fit_settings import FitSettings
from finetune_dataflow.engine.frozen_states import StateStore
from finetune_dataflow.engine.reporting_settings import ReportingSettings
from finetune_dataflow.engine.run_directory import RunIdentity
from finetune_dataflow.engine.tokens import TokenColumns

if TYPE_CHECKING:
    from finetune_dataflow.engine.training import FitSummary


@dataclass(frozen=True)
class FinishedFit:
    """A finished fit: the directory of its run, and what it says of itself."""

    run_directory: Path
    summary: FitSummary


@config.when(start="base")
def used_inputs__base(
    train_set: pd.DataFrame,
    validation_set: pd.DataFrame,
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    starting_weights: Path | None,
) -> frozenset[str] | None:
    """The inputs that the fit uses, and those that the fit before it used, as hashes; None where that cannot be told.

    It cannot where the tokens are not those of the two sets, or the weights that it starts from do not say what made them.
    """
    sets = ((train_set, train_tokens), (validation_set, validation_tokens))
    before = frozenset[str]() if starting_weights is None else engine.adapters.used_inputs(starting_weights.parent)
    if before is None or not all(set(tokens.rows.tolist()) <= set(rows["row"]) for rows, tokens in sets):
        return None
    return before | engine.splitting.hashes([each for rows, _ in sets for each in engine.records.identities(rows)])


@computed_anew
@config.when(start="base")
def frozen_states__base(base_model_fingerprint: str, frozen_states_gb: float = 10.0) -> StateStore:
    """Where the outputs of the layers that are not trained are kept: a fit computes them once and starts behind them.

    They are files in the user's cache directory, by what they depend on, so that later epochs, validations, resumed runs and
    other fits over the same rows with the same frozen layers find them.

    Inputs:
        frozen_states_gb: The most gigabytes that these files may take, least recently used ones removed; 0 for none.

    Raises UserError for a negative size.
    """
    return engine.frozen_states.store(base_model_fingerprint, frozen_states_gb)


@computed_anew
@config.when(start="base")
def reporting_settings__base(report_to: str | None = None, project_name: str | None = None) -> ReportingSettings:
    """Where the fit is reported to while it goes on.

    Inputs:
        report_to: A service that the fit is reported to, as in mlx-lm: wandb; without it, none.
        project_name: The project there; without it WANDB_PROJECT's, or finetune-dataflow.

    Raises UserError for a service that is not known or not installed.
    """
    return engine.reporting_settings.reporting_settings(report_to, project_name)


@computed_anew
@config.when(start="base")
def finished_fit__base(
    base_model_path: Path,
    train_tokens: TokenColumns,
    validation_tokens: TokenColumns,
    fit_settings: FitSettings,
    run_identity: RunIdentity,
    label_audit: LabelAudit,
    fit_plan: FitPlan,
    used_inputs: frozenset[str] | None,
    starting_weights: Path | None,
    frozen_states: StateStore,
    base_model_fingerprint: str,
    chat_template: str,
    reporting_settings: ReportingSettings,
    output_dir: str = "",
) -> FinishedFit:
    """The fit, done: its adapter stands in the run directory. A directory with the same fit finished is taken as it is,
    one with the same fit unfinished is gone on with.

    It takes the label audit so that nothing is trained on labels that the audit refuses.

    Inputs:
        output_dir: The directory of the run; empty for runs/<name of the data file>-<8 digits of the run's fingerprint>.

    Raises UserError where the directory holds another run, or is in use by one.
    """
    if starting_weights is not None:
        engine.starting_weights.check_base(starting_weights, base_model_fingerprint)
    score = engine.validation_score.score(fit_settings, validation_tokens, base_model_path, chat_template)
    with engine.run_directory.held(output_dir, run_identity) as directory:
        summary = engine.run_directory.finished_fit(directory)
        if summary is None:
            engine.run_directory.warn_of_hold_outs_beside(directory, used_inputs or frozenset())
            with engine.reporting.reported_fit(reporting_settings, directory, run_identity.told):
                summary = engine.training.fit(
                    base_model_path, train_tokens, validation_tokens, fit_settings, directory, run_identity.adapter_notes,
                    used_inputs,
                    start=starting_weights, score=score, plan=fit_plan, store=frozen_states,
                )  # fmt: skip
    return FinishedFit(directory, summary)


@computed_anew
@config.when(start="base")
def run_directory__base(finished_fit: FinishedFit) -> Path:
    """The directory of the run."""
    return finished_fit.run_directory


@computed_anew
@config.when(start="base")
def adapter_path__base(run_directory: Path) -> Path:
    """The directory of the adapter with the best validation loss, in mlx-lm's layout."""
    return Path(run_directory / engine.training.BEST)


@computed_anew
@config.when(start="base")
def evaluated_adapter__base(adapter_path: Path) -> Path:
    """The directory of the adapter that is evaluated: the one that was fitted."""
    return adapter_path


@computed_anew
@config.when(start="presaved")
def evaluated_adapter__presaved(
    adapter_path: str, base_model_path: Path, base_model_fingerprint: str, rendering_fingerprints: dict[str, str]
) -> Path:
    """The directory of the adapter that is evaluated: the one that was given.

    A warning says where it meets another base model, tokenizer, chat template or prompt than it was trained with.

    Inputs:
        adapter_path: The directory of the adapter to evaluate, in mlx-lm's layout or PEFT's.

    Raises UserError where it holds no adapter.
    """
    directory = engine.files.user_path(adapter_path)
    adapter = engine.adapters.check_adapter(directory)
    engine.peft_layout.in_mlx_layout(directory, base_model_path)  # so that what does not fit is refused before any work
    engine.rendering.warn_of_differences(adapter, {"base_model": base_model_fingerprint, **rendering_fingerprints})
    return directory


@computed_anew
@config.when(start="base")
def training_history__base(run_directory: Path) -> pd.DataFrame:
    """The losses as they were recorded: event ("train" or "validation"), step (updates), loss, learning_rate, …"""
    history = pd.DataFrame(engine.files.read_json_lines(run_directory / engine.run_directory.HISTORY))
    return history[history["event"].isin(["train", "validation"])].reset_index(drop=True)

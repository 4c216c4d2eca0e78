"""Fine-tune a language model on your own questions and answers with MLX, and be told whether it helped.

A data file becomes `records`; each row is dealt to the train, validation or hold-out set by a hash of its own input.
Rows become conversations, conversations become token ids and labels: the prompt is masked, the reply is learned.
The fit trains LoRA layers on the train set and keeps the adapter with the best validation loss.
Base and tuned model then answer the hold-out prompts, which neither has seen, and `verdict` says in one sentence
whether the tuned one is better. `start="base"` is all of this; `start="presaved"` evaluates an adapter from before.

Every function below is a node of an Apache Hamilton graph; its parameters name the nodes and inputs it needs:
`driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build()`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from finetune_dataflow import engine  # noqa: F401 -- the CPU runtime must stand before MLX is imported

__version__ = "0.1.0"

# The nodes, in the order of execution, which is the order to read their modules in. They are imported when they are first
# named (PEP 562), as Hamilton does with all of them, so that `--help` need not load what a run needs.
NODES = {
    "dataset": (
        "data_source",
        "source_content",
        "source_rows",
        "shaped_rows",
        "records",
        "dataset_fingerprint",
    ),
    "splits": (
        "split_settings",
        "row_sides",
        "leaking_rows",
        "train_set",
        "validation_set",
        "hold_out_set",
    ),
    "prompts": (
        "prompt_settings",
        "chat_template",
        "conversations",
    ),
    "base_model": (
        "base_model_name",
        "quantization_settings",
        "base_model_path",
        "base_model_fingerprint",
    ),
    "tokenization": (
        "tokenization_settings",
        "set_tokens",
        "row_ledger",
    ),
    "audit": (
        "data_quality",
        "label_audit",
        "hold_out_audit",
    ),
    "lineage": (
        "preparation_settings",
        "rendering_fingerprints",
        "run_identity__base",
        "run_identity__presaved",
        "run_directory__presaved",
        "evaluation_identity",
        "config_file",
        "lineage_file",
    ),
    "training_settings": (
        "method_settings__base",
        "optimizer_settings__base",
        "loop_settings__base",
        "fit_settings__base",
        "fit_plan__base",
        "starting_weights__base",
        "adapter_copy_target__base",
        "trained_parameters__base",
    ),
    "fitting": (
        "used_inputs__base",
        "frozen_states__base",
        "reporting_settings__base",
        "finished_fit__base",
        "run_directory__base",
        "adapter_path__base",
        "evaluated_adapter__base",
        "evaluated_adapter__presaved",
        "training_history__base",
    ),
    "generation": (
        "generation_settings",
        "reply_store",
        "base_replies",
        "tuned_replies",
        "used_rows",
        "prompt_reply",
        "hold_out_set_predictions",
        "finetuned_model_on_validation_set",
    ),
    "evaluation": (
        "base_losses",
        "tuned_losses",
        "metric_settings",
        "own_metrics",
        "reply_scores",
        "training_and_validation_set_metrics__base",
        "training_and_validation_set_metrics__presaved",
        "comparison",
        "seen_rows__base",
        "seen_rows__presaved",
        "deciding_metric",
        "verdict",
        "hold_out_predictions",
        "run_metrics__base",
        "run_metrics__presaved",
    ),
    "report": (
        "loss_figure__base",
        "rouge_figure",
        "scores_figure",
        "difference_figure",
        "score_distribution_figure",
        "row_scatter_figure",
        "outcomes_figure",
        "token_length_figure",
        "label_figure",
        "row_ledger_figure",
        "dag_drawing__base",
        "dag_drawing__presaved",
        "report_parts",
        "report_figures",
        "report_file__base",
        "report_file__presaved",
    ),
    "export": (
        "row_ledger_file",
        "label_audit_file",
        "hold_out_inputs_file",
        "predictions_file",
        "dag_file",
        "metrics_file",
        "reported_metrics__base",
        "adapter_copy__base",
        "complete_model__base",
        "save_best_models__base",
        "save_best_models__presaved",
    ),
}


# The nodes that run a model, and the nodes that write a file, with the file's name: their tags `cost` and `artifact`.
COSTLY = (
    "finished_fit__base",
    "base_replies",
    "tuned_replies",
    "base_losses",
    "tuned_losses",
    "prompt_reply",
    "complete_model__base",
)
ARTIFACTS = {
    "finished_fit__base": "metrics.jsonl",
    "adapter_path__base": "adapters",
    "config_file": "config.yaml",
    "lineage_file": "lineage.json",
    "row_ledger_file": "row_ledger.jsonl",
    "label_audit_file": "label_audit.html",
    "hold_out_inputs_file": "hold_out_inputs.txt",
    "predictions_file": "predictions.jsonl",
    "report_file__base": "report.html",
    "report_file__presaved": "report.html",
    "dag_file": "dag.svg",
    "metrics_file": "metrics.json",
    "complete_model__base": "model",
}


def __getattr__(name: str) -> Callable[..., Any]:
    """The node of that name."""
    for module, names in NODES.items():
        if name in names:
            return _tagged(getattr(importlib.import_module(f"{__name__}.{module}"), name), name, module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _tagged(node: Callable[..., Any], name: str, module: str) -> Callable[..., Any]:
    """The node with tags that answer: of which stage, does it run a model, which file does it write?"""
    from hamilton.function_modifiers import tag

    artifact = {"artifact": ARTIFACTS[name]} if name in ARTIFACTS else {}
    tagged: Callable[..., Any] = tag(stage=module, cost="model" if name in COSTLY else "light", **artifact)(node)
    return tagged


def __dir__() -> list[str]:
    """The nodes and the version: what Hamilton looks through."""
    return ["__version__", *(name for names in NODES.values() for name in names)]

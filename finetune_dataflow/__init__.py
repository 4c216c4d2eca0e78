"""Fine-tune a language model on your own questions and answers with MLX, and be told whether it helped.

A data file becomes `records`; each row is dealt to the train, validation or hold-out set by a hash of its own input.
Rows become conversations, conversations become token ids and labels: the prompt is masked, the reply is learned.
The fit trains LoRA layers on the train set and keeps the adapter with the best validation loss.
Base and tuned model then answer the hold-out prompts, which neither has seen, and `verdict` says in one sentence
whether the tuned one is better. `start="base"` is all of this; `start="presaved"` evaluates an adapter from before.

Every function below is a node of an Apache Hamilton graph; its parameters name the nodes and inputs it needs:
`driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build()`.
"""

# ruff: noqa: F401, I001 -- re-exported, in the order of execution, which is the order to read them in
from finetune_dataflow.dataset import data_source, dataset_fingerprint, records, shaped_rows, source_rows
from finetune_dataflow.splits import hold_out_set, leaking_rows, row_sides, split_settings, train_set, validation_set
from finetune_dataflow.prompts import chat_template, conversations, prompt_settings
from finetune_dataflow.base_model import base_model_fingerprint, base_model_name, base_model_path
from finetune_dataflow.tokenization import row_ledger, set_tokens, tokenization_settings
from finetune_dataflow.audit import data_quality, hold_out_audit, label_audit
from finetune_dataflow.lineage import (
    config_file,
    evaluation_identity,
    lineage_file,
    preparation_settings,
    run_directory__presaved,
    run_identity__base,
    run_identity__presaved,
)
from finetune_dataflow.fitting import (
    adapter_path__base,
    evaluated_adapter__base,
    evaluated_adapter__presaved,
    finished_fit__base,
    fit_settings__base,
    run_directory__base,
    training_history__base,
)
from finetune_dataflow.generation import (
    base_replies,
    finetuned_model_on_validation_set,
    generation_settings,
    hold_out_set_predictions,
    tuned_replies,
    used_rows,
)
from finetune_dataflow.evaluation import (
    base_losses,
    comparison,
    hold_out_predictions,
    rouge,
    run_metrics__base,
    run_metrics__presaved,
    seen_rows__base,
    seen_rows__presaved,
    training_and_validation_set_metrics__base,
    training_and_validation_set_metrics__presaved,
    tuned_losses,
    verdict,
)
from finetune_dataflow.export import (
    hold_out_inputs_file,
    label_audit_file,
    metrics_file,
    predictions_file,
    row_ledger_file,
    save_best_models__base,
    save_best_models__presaved,
)

__version__ = "0.1.0"

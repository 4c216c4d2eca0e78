"""What the fit does, as its user says it: which parameters are trained, by which optimiser, how long and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hamilton.function_modifiers import config

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.engine.files import Location
from finetune_dataflow.engine.fit_plan import FitPlan
from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings, MethodSettings, OptimizerSettings
from finetune_dataflow.engine.settings import SplitSettings
from finetune_dataflow.engine.tokens import TokenColumns


@config.when(start="base")
def method_settings__base(
    split_settings: SplitSettings,
    fine_tune_type: str = "lora",
    num_layers: int = 16,
    lora_rank: int = 8,
    lora_scale: float = 20.0,
    lora_dropout: float = 0.0,
    lora_keys: list[str] | None = None,
    use_rslora: bool = False,
) -> MethodSettings:
    """Which parameters are trained.

    Inputs:
        fine_tune_type: How: lora, dora (LoRA with a learned magnitude of each output), or full (the weights themselves).
        num_layers: How many of the model's last blocks are trained; -1 for all, which with full means the whole model.
        lora_rank: The rank of the two matrices that LoRA adds to a linear layer.
        lora_scale: The factor on LoRA's output, absolute as in mlx-lm (PEFT's alpha is scale * rank).
        lora_dropout: The share of a LoRA layer's inputs that is dropped in training.
        lora_keys: The modules that LoRA is put on, by their names within a block (self_attn.q_proj) or in the whole model
            (model.embed_tokens, lm_head); without it every linear layer and embedding of the blocks.
        use_rslora: Scale LoRA by sqrt(rank) as rsLoRA does: alpha / sqrt(rank) instead of alpha / rank in PEFT's terms.
    """
    return MethodSettings(
        fine_tune_type=fine_tune_type,
        num_layers=num_layers,
        lora_rank=lora_rank,
        lora_scale=lora_scale,
        lora_dropout=lora_dropout,
        lora_keys=tuple(lora_keys or ()),
        use_rslora=use_rslora,
        random_state=split_settings.random_state,
    )


@config.when(start="base")
def optimizer_settings__base(
    optimizer: str = "adamw",
    learning_rate: float = 2e-4,
    weight_decay: float | None = None,
    optimizer_config: dict[str, Any] | None = None,
    loraplus_lr_ratio: float = 1.0,
    max_grad_norm: float | None = None,
    warmup_proportion: float = 0.1,
    lr_schedule: dict[str, Any] | None = None,
    learning_schedule: dict[str, Any] | None = None,
) -> OptimizerSettings:
    """The optimiser, its learning rate over the updates, and what is done to the gradient before.

    Inputs:
        optimizer: adam, adamw, sgd, adafactor, muon or lion.
        learning_rate: The highest learning rate, reached after the warm-up; a cosine leads from there to zero.
        weight_decay: The optimiser's weight decay; without it the optimiser's own default (adamw and muon 0.01, others 0).
        optimizer_config: Further arguments of the optimiser under its name, as in mlx-lm: {adamw: {betas: [0.9, 0.98]}}.
        loraplus_lr_ratio: LoRA+: the factor on the learning rate of LoRA's second matrix.
        max_grad_norm: Gradients of a larger norm are scaled down to it; without it none is.
        warmup_proportion: The share of all updates in which the learning rate rises.
        lr_schedule: The learning rate over the updates in mlx-lm's form: {name: cosine_decay, arguments: [1e-5, -1, 1e-7],
            warmup: 10}; -1 stands for the rest of the fit.
        learning_schedule: The same in mlx-tuning-fork's form: {type: cosine_w_warmup, start_lr: 0, warmup_proportion: 0.1,
            max_lr: 1e-4, min_lr: 1e-6, cycle_length: -1}; proportions and -1 refer to one epoch.
    """
    return OptimizerSettings(
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        optimizer_config=optimizer_config or {},
        loraplus_lr_ratio=loraplus_lr_ratio,
        max_grad_norm=max_grad_norm,
        warmup_proportion=warmup_proportion,
        lr_schedule=lr_schedule,
        learning_schedule=learning_schedule,
    )


@config.when(start="base")
def loop_settings__base(
    epochs: float | None = None,
    iters: int | None = None,
    batch_size: int = 4,
    grad_accumulation_steps: int = 1,
    grad_checkpoint: bool = False,
    steps_per_report: int | None = None,
    reporting_interval_proportion: float | None = None,
    steps_per_eval: int | None = None,
    evals_per_epoch: int | None = None,
    validation_interval_proportion: float | None = None,
    val_batches: int | None = None,
    validations_per_train_item: float | None = None,
    save_every: int | None = None,
    saves_per_epoch: int | None = None,
    adapter_save_interval_proportion: float | None = None,
    keep_checkpoints: int = 2,
    early_stopping_patience: int | None = None,
    best_metric: str = "loss",
    best_metric_rows: int = 16,
    clear_cache_threshold: int | None = None,
) -> LoopSettings:
    """How long the fit goes on, what one update is made of, and how often things are done between updates.

    Inputs:
        epochs: How often every training row is used; without it, and without iters, once.
        iters: How many batches are used, as in mlx-lm, instead of epochs.
        batch_size: Rows in one batch.
        grad_accumulation_steps: Batches in one update; their gradients are added, each token with the same weight.
        grad_checkpoint: Compute each block's activations again in the backward pass: less memory, more time.
        steps_per_report: Updates between two reports of the training loss; 1 without it.
        reporting_interval_proportion: The same as a share of an epoch.
        steps_per_eval: Updates between two validations; without it, half an epoch's.
        evals_per_epoch: The same as a number of validations an epoch.
        validation_interval_proportion: The same as a share of an epoch.
        val_batches: Validate on at most so many batches of rows, chosen once by random_state; -1 or nothing for all.
        validations_per_train_item: The same as validation rows per training row used between two validations.
        save_every: Updates between two checkpoints; without it, once a minute.
        saves_per_epoch: The same as a number of checkpoints an epoch.
        adapter_save_interval_proportion: The same as a share of an epoch.
        keep_checkpoints: How many checkpoints are kept.
        early_stopping_patience: Stop after so many validations in a row that bring nothing better; without it, never.
        best_metric: What the best adapter is chosen by: loss, or rouge1, rouge2, rougeL or rougeLsum of generated replies.
        best_metric_rows: The validation rows that are answered for a ROUGE best_metric, chosen once by random_state.
        clear_cache_threshold: Bytes of MLX's buffer cache above which it is emptied between updates; without it, never.
    """
    return LoopSettings(**locals())


@config.when(start="base")
def fit_settings__base(
    method_settings: MethodSettings, optimizer_settings: OptimizerSettings, loop_settings: LoopSettings
) -> FitSettings:
    """The settings of the fit: method, optimiser and loop."""
    return FitSettings(method_settings, optimizer_settings, loop_settings)


@config.when(start="base")
def fit_plan__base(fit_settings: FitSettings, train_tokens: TokenColumns, validation_tokens: TokenColumns) -> FitPlan:
    """The fit in numbers: batches, updates, and the updates between two reports, validations and checkpoints."""
    return engine.fit_plan.fit_plan(fit_settings, len(train_tokens), len(validation_tokens))


@computed_anew
@config.when(start="base")
def starting_weights__base(resume_adapter_file: str = "") -> Path | None:
    """The weights that the fit starts from, or None for new ones.

    Inputs:
        resume_adapter_file: Weights to start from: an adapter's .safetensors or .npz file, or its directory.
    """
    return engine.starting_weights.located(resume_adapter_file)


@computed_anew
@config.when(start="base")
def adapter_copy_target__base(starting_weights: Path | None, save_adapter_to: str = "") -> Path | None:
    """The directory of a second copy of the adapter, or None.

    Inputs:
        save_adapter_to: A directory that the adapter is written to, too; a YAML of mlx-lm's calls it adapter_path.
    """
    target = engine.adapters.copy_target(save_adapter_to, starting_weights)
    return None if target is None else Location(target)


@config.when(start="base")
def trained_parameters__base(base_model_path: Path, fit_settings: FitSettings) -> dict[str, int]:
    """How many parameters are trained, `trained`, and how many there are, `all`.

    Raises UserError where the method does not suit the model.
    """
    return engine.methods.trained_parameters(base_model_path, fit_settings.method)

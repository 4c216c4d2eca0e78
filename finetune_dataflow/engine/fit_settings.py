"""The settings of a fit as frozen values, checked where they are made: the method, the optimiser and its rate, the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from finetune_dataflow.engine.settings import all_of, require, require_choice
from finetune_dataflow.errors import UserError

METHODS = ("lora", "dora", "full")
MOST_EPOCHS = 1e6
OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "muon", "lion")
BEST_METRICS = ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class MethodSettings:
    """Which parameters are trained. lora_keys: module names within a block, or of the whole model; empty for all that can."""

    fine_tune_type: str = "lora"
    num_layers: int = 16
    lora_rank: int = 8
    lora_scale: float = 20.0
    lora_dropout: float = 0.0
    lora_keys: tuple[str, ...] = ()
    use_rslora: bool = False
    random_state: int = 42

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range."""
        layers = self.num_layers
        all_of(
            lambda: require_choice("fine_tune_type", self.fine_tune_type, METHODS),
            lambda: require("num_layers", layers, layers == -1 or layers >= 1, "a number of layers, 1 or more, or -1 for all"),
            lambda: require("lora_rank", self.lora_rank, self.lora_rank >= 1, "a whole number, 1 or more"),
            lambda: _positive("lora_scale", self.lora_scale),
            lambda: require("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "a share from 0 to below 1"),
        )

    @property
    def effective_scale(self) -> float:
        """The factor on LoRA's output: lora_scale, or with use_rslora lora_scale * sqrt(rank) (alpha / sqrt(rank) in PEFT)."""
        return self.lora_scale * math.sqrt(self.lora_rank) if self.use_rslora else self.lora_scale


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser, its learning rate over the updates, and what is done to the gradient before.

    weight_decay: None for the optimiser's own default. max_grad_norm: None for no clipping. At most one of lr_schedule
    (mlx-lm's) and learning_schedule (mlx-tuning-fork's) is given; without either, the rate rises in a line over
    warmup_proportion of all updates and falls to zero in half a cosine.
    """

    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    weight_decay: float | None = None
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    loraplus_lr_ratio: float = 1.0
    max_grad_norm: float | None = None
    warmup_proportion: float = 0.1
    lr_schedule: Mapping[str, Any] | None = None
    learning_schedule: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range."""
        decay, warmup = self.weight_decay, self.warmup_proportion
        all_of(
            lambda: require_choice("optimizer", self.optimizer, OPTIMIZERS),
            lambda: _positive("learning_rate", self.learning_rate),
            lambda: require("weight_decay", decay, decay is None or 0 <= decay < math.inf, "a number, 0 or more"),
            lambda: _positive("loraplus_lr_ratio", self.loraplus_lr_ratio),
            lambda: _positive("max_grad_norm", self.max_grad_norm, optional=True),
            lambda: require("warmup_proportion", warmup, 0 <= warmup <= 1, "a share from 0 to 1"),
        )


@dataclass(frozen=True)
class LoopSettings:
    """How long the fit goes on, what one update is made of, and how often things are done between updates.

    None means: not given. An epoch is every training row once; an update is grad_accumulation_steps batches of batch_size
    rows; iters counts batches, as in mlx-lm. Of two spellings of one thing at most one may be given.
    """

    SPELLINGS: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("epochs", "iters"),
        ("steps_per_report", "reporting_interval_proportion"),
        ("steps_per_eval", "evals_per_epoch", "validation_interval_proportion"),
        ("save_every", "saves_per_epoch", "adapter_save_interval_proportion"),
        ("val_batches", "validations_per_train_item"),
    )
    # These change what is written down and when, not what is learned: a run may go on under others.
    UNBINDING: ClassVar[tuple[str, ...]] = (
        "steps_per_report", "reporting_interval_proportion", "save_every", "saves_per_epoch",
        "adapter_save_interval_proportion", "keep_checkpoints", "clear_cache_threshold",
    )  # fmt: skip

    epochs: float | None = None
    iters: int | None = None
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    grad_checkpoint: bool = False
    steps_per_report: int | None = None
    reporting_interval_proportion: float | None = None
    steps_per_eval: int | None = None
    evals_per_epoch: int | None = None
    validation_interval_proportion: float | None = None
    val_batches: int | None = None
    validations_per_train_item: float | None = None
    save_every: int | None = None
    saves_per_epoch: int | None = None
    adapter_save_interval_proportion: float | None = None
    keep_checkpoints: int = 2
    early_stopping_patience: int | None = None
    best_metric: str = "loss"
    best_metric_rows: int = 16
    clear_cache_threshold: int | None = None

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range, and every two spellings of one thing."""
        whole = "a whole number, 1 or more"
        at_least_one = ("batch_size", "grad_accumulation_steps", "keep_checkpoints", "best_metric_rows")
        counts = ("iters", "steps_per_report", "steps_per_eval", "evals_per_epoch", "save_every", "saves_per_epoch",
                  "early_stopping_patience")  # fmt: skip
        shares = ("reporting_interval_proportion", "validation_interval_proportion", "adapter_save_interval_proportion")
        batches, cached = self.val_batches, self.clear_cache_threshold
        all_of(
            *(lambda name=name: require(name, getattr(self, name), getattr(self, name) >= 1, whole) for name in at_least_one),
            *(lambda name=name: _count(name, getattr(self, name)) for name in counts),
            *(lambda name=name: _share(name, getattr(self, name)) for name in shares),
            lambda: _positive("epochs", self.epochs, optional=True, most=MOST_EPOCHS),
            lambda: _positive("validations_per_train_item", self.validations_per_train_item, optional=True),
            lambda: require("val_batches", batches, batches is None or batches == -1 or batches >= 1, f"{whole}, or -1 for all"),
            lambda: require_choice("best_metric", self.best_metric, BEST_METRICS),
            lambda: require("clear_cache_threshold", cached, cached is None or cached >= 0, "a number of bytes, 0 or more"),
            *(lambda group=group: self._one_of(group) for group in self.SPELLINGS),
        )

    def _one_of(self, group: tuple[str, ...]) -> None:
        given = [name for name in group if getattr(self, name) is not None]
        if len(given) > 1:
            said = " and ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise UserError(f"{said} say the same thing twice. Give one of {', '.join(group)}.")


@dataclass(frozen=True)
class FitSettings:
    """What the fit does: its method, its optimiser, its loop."""

    method: MethodSettings = field(default_factory=MethodSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        """Raise UserError for LoRA+ without LoRA."""
        if self.method.fine_tune_type == "full" and self.optimizer.loraplus_lr_ratio != 1:
            raise UserError("loraplus_lr_ratio is for lora and dora; fine_tune_type='full' has no second matrix. Leave it out.")

    @property
    def random_state(self) -> int:
        """The seed of the adapter's first weights, the order of the rows and dropout."""
        return self.method.random_state

    @property
    def values(self) -> dict[str, Any]:
        """Every setting that the result depends on, by name."""
        every = {**asdict(self.method), **asdict(self.optimizer), **asdict(self.loop)}
        every["lora_keys"] = list(self.method.lora_keys)
        return {name: value for name, value in every.items() if name not in LoopSettings.UNBINDING}

    @property
    def unbinding(self) -> dict[str, Any]:
        """Every setting that the result does not depend on, by name."""
        return {each.name: getattr(self.loop, each.name) for each in fields(self.loop) if each.name in LoopSettings.UNBINDING}


def _positive(name: str, value: float | None, *, optional: bool = False, most: float = math.inf) -> None:
    holds = optional if value is None else math.isfinite(value) and 0 < value <= most
    require(name, value, holds, "a number above 0" + ("" if most == math.inf else f", at most {most:g}"))


def _count(name: str, value: int | None) -> None:
    require(name, value, value is None or value >= 1, "a whole number, 1 or more")


def _share(name: str, value: float | None) -> None:
    require(name, value, value is None or 0 < value <= 1, "a share of an epoch above 0, at most 1")

"""The settings of each stage as frozen values, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from finetune_dataflow.errors import UserError

SMALLEST_SHARE = 1e-6
LongRows = Literal["truncate_prompt", "drop", "error"]


@dataclass(frozen=True)
class Learned:
    """Which tokens of a conversation are learned besides its last reply, which always is.

    text_alone: the reply is all there is; no prompt, no template. whole_prompt: the prompt, too. every_turn: earlier
    replies, too.
    """

    text_alone: bool = False
    whole_prompt: bool = False
    every_turn: bool = False


@dataclass(frozen=True)
class SplitSettings:
    """How rows are dealt to the three sets. Sizes are shares of all rows; the hold-out is the rest."""

    random_state: int
    train_size: float
    validation_size: float
    near_duplicates: str = "auto"

    def __post_init__(self) -> None:
        """Raise UserError where a share is not within (0, 1) or nothing is left for the hold-out."""
        require("random_state", self.random_state, 0 <= self.random_state < 2**32, "a whole number from 0 to 4294967295")
        for name in ("train_size", "validation_size"):
            value = getattr(self, name)
            require(name, value, SMALLEST_SHARE <= value < 1, "a share of all rows above 0 and below 1")
        require_choice("near_duplicates", self.near_duplicates, ("auto", "drop", "keep"))
        left = 1 - self.train_size - self.validation_size
        if left < SMALLEST_SHARE:
            raise UserError(
                f"train_size={self.train_size} and validation_size={self.validation_size} leave no rows for the "
                "hold-out. Their sum must be below 1."
            )


@dataclass(frozen=True)
class PromptSettings:
    """What is put around a row's texts, and how the result is wrapped. Empty means: left alone."""

    system_prompt: str = ""
    prompt_format: str = ""
    input_template: str = ""
    context_template: str = ""
    response_template: str = ""
    few_shot_file: str = ""
    few_shot_count: int = 0
    loom_file: str = ""
    build_prompt: str = ""
    loom_markers: str = ""
    loom_language: str = ""

    def __post_init__(self) -> None:
        """Raise UserError for a negative number of examples."""
        require("few_shot_count", self.few_shot_count, self.few_shot_count >= 0, "a number of examples, or 0 for all")


@dataclass(frozen=True)
class TokenizationSettings:
    """How long a row may be, in tokens, what happens to a longer one, and which tokens are learned."""

    max_seq_length: int
    long_rows: str
    mask_prompt: bool = True
    train_type: str = "completion-only"
    assistant_turns: str = "every"

    def __post_init__(self) -> None:
        """Raise UserError for a length below 8 tokens or an unknown treatment."""
        require("max_seq_length", self.max_seq_length, self.max_seq_length >= 8, "a number of tokens, 8 or more")
        require_choice("train_type", self.train_type, ("completion-only", "self-supervised"))
        require_choice("assistant_turns", self.assistant_turns, ("every", "last"))
        require_choice("long_rows", self.long_rows, LongRows.__args__)  # type: ignore[attr-defined]  # typing hides it

    @property
    def learned(self) -> Learned:
        """Which tokens of a conversation are learned."""
        return Learned(
            text_alone=self.train_type == "self-supervised",
            whole_prompt=not self.mask_prompt,
            every_turn=self.assistant_turns == "every",
        )


@dataclass(frozen=True)
class FitSettings:
    """What the fit does. Steps are updates of the adapter; an epoch is every training row once."""

    num_layers: int
    lora_rank: int
    lora_scale: float
    lora_dropout: float
    learning_rate: float
    warmup_proportion: float
    weight_decay: float
    epochs: float
    batch_size: int
    evals_per_epoch: int
    random_state: int

    def __post_init__(self) -> None:
        """Raise UserError naming the first value out of range."""
        for name in ("lora_rank", "batch_size", "evals_per_epoch"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "a whole number, 1 or more")
        layers = self.num_layers
        require("num_layers", layers, layers == -1 or layers >= 1, "a number of layers, 1 or more, or -1 for all")
        for name in ("lora_scale", "learning_rate", "epochs"):
            value = getattr(self, name)
            require(name, value, math.isfinite(value) and value > 0, "a number above 0")
        require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a number, 0 or more")
        require("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "a share from 0 to below 1")
        require("warmup_proportion", self.warmup_proportion, 0 <= self.warmup_proportion <= 1, "a share from 0 to 1")


@dataclass(frozen=True)
class GenerationSettings:
    """How replies are generated for the evaluation: greedy, in batches."""

    max_tokens: int
    generation_batch_size: int

    def __post_init__(self) -> None:
        """Raise UserError for a size below 1."""
        for name in ("max_tokens", "generation_batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "a whole number, 1 or more")


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a UserError that names the option, what was found and what is expected, unless `holds`."""
    if not holds:
        raise UserError(f"{name}={value!r} is out of range. Expected {expected}.")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError that names the option and its choices, unless `value` is one of them."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown. Expected one of {', '.join(map(repr, choices))}.")

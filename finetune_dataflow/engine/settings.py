"""The settings of each stage as frozen values, checked where they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from finetune_dataflow.errors import UserError, nearest

SMALLEST_SHARE = 1e-6
LongRows = Literal["truncate_prompt", "drop", "error"]
Scoring: TypeAlias = Callable[[list[str], list[str]], Sequence[float]]  # replies and references to a score a row


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
        all_of(
            lambda: require("max_seq_length", self.max_seq_length, self.max_seq_length >= 8, "a number of tokens, 8 or more"),
            lambda: require_choice("train_type", self.train_type, ("completion-only", "self-supervised")),
            lambda: require_choice("assistant_turns", self.assistant_turns, ("every", "last")),
            lambda: require_choice("long_rows", self.long_rows, get_args(LongRows)),
        )

    @property
    def learned(self) -> Learned:
        """Which tokens of a conversation are learned."""
        return Learned(
            text_alone=self.train_type == "self-supervised",
            whole_prompt=not self.mask_prompt,
            every_turn=self.assistant_turns == "every",
        )


@dataclass(frozen=True)
class QuantizationSettings:
    """To how many bits the base model's weights are quantised when it is loaded, in groups of how many; 0 for not at all."""

    quantize_bits: int = 0
    quantize_group_size: int = 64

    def __post_init__(self) -> None:
        """Raise UserError for sizes that MLX has no kernels for."""
        bits, group = self.quantize_bits, self.quantize_group_size
        all_of(
            lambda: require("quantize_bits", bits, bits in (0, 4, 8), "4 or 8, or 0 for weights as they are"),
            lambda: require("quantize_group_size", group, group in (32, 64, 128), "32, 64 or 128"),
        )


@dataclass(frozen=True)
class GenerationSettings:
    """How replies are generated for the evaluation, in batches.

    max_tokens: the longest reply. temperature: 0 for the most probable token every time, which the filters and the seed do not
    change. top_p: the share of probability that is kept, 0 or 1 for all. top_k: the number of tokens kept, 0 for all. min_p:
    the smallest probability kept, as a share of the highest. random_state: the seed of each reply's own random generator.
    """

    LOWEST_TEMPERATURE: ClassVar[float] = 1e-3  # as of the answer that is streamed

    max_tokens: int
    generation_batch_size: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    random_state: int = 0

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range."""
        whole, share, seed = "a whole number, 1 or more", "a share from 0 to 1", self.random_state
        lowest, temperature = self.LOWEST_TEMPERATURE, self.temperature
        warm = f"0 for the most probable token, or a number from {lowest}"
        all_of(
            lambda: require("max_tokens", self.max_tokens, self.max_tokens >= 1, whole),
            lambda: require("generation_batch_size", self.generation_batch_size, self.generation_batch_size >= 1, whole),
            lambda: require("temperature", temperature, temperature == 0 or lowest <= temperature < math.inf, warm),
            lambda: require("top_p", self.top_p, 0 <= self.top_p <= 1, share),
            lambda: require("top_k", self.top_k, self.top_k >= 0, "a number of tokens, or 0 for all"),
            lambda: require("min_p", self.min_p, 0 <= self.min_p <= 1, share),
            lambda: require("random_state", seed, 0 <= seed < 2**32, "a whole number from 0 to 4294967295"),
        )

    @property
    def greedy(self) -> bool:
        """Whether every token is the most probable one."""
        return self.temperature == 0

    @property
    def decoding(self) -> dict[str, float]:
        """What changes replies: not the batch size, and of greedy replies not the filters and the seed."""
        every: dict[str, float] = {"max_tokens": self.max_tokens, "temperature": float(self.temperature)}
        if not self.greedy:
            every |= {"top_p": float(self.top_p), "top_k": self.top_k, "min_p": float(self.min_p)}
            every |= {"random_state": self.random_state}
        return every


@dataclass(frozen=True)
class MetricSettings:
    """How replies are scored. metrics: the user's further ones, by name; bleu_tokenizer: as sacrebleu names it.

    code: a fingerprint of each of these metrics' files.
    """

    TOKENIZERS: ClassVar[tuple[str, ...]] = ("13a", "zh", "intl", "char")

    metrics: tuple[str, ...] = ()
    bleu_tokenizer: str = "13a"
    code: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range."""
        known = self.TOKENIZERS
        once = len({*self.metrics}) == len(self.metrics)
        all_of(
            lambda: require("metrics", list(self.metrics), once, "each metric once"),
            lambda: require("bleu_tokenizer", self.bleu_tokenizer, self.bleu_tokenizer in known, f"one of {', '.join(known)}"),
        )


def all_of(*checks: Callable[[], None]) -> None:
    """Run every check and raise one UserError with all that they said, a line each."""
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a UserError that names the option, what was found and what is expected, unless `holds`."""
    if not holds:
        raise UserError(f"{name}={value!r} is out of range. Expected {expected}.")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError that names the option and its choices, unless `value` is one of them."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown.{nearest(value, choices)} Expected one of {', '.join(map(repr, choices))}.")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings: "batch_size is 4 there and 8 here", …"""
    return [
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def _short(value: object) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:20]}…"

"""The answer to one prompt, token by token as it is generated, on mlx-lm's generation loop."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.replies import StreamedToken
from finetune_dataflow.engine.settings import require
from finetune_dataflow.errors import UserError

LOWEST_TEMPERATURE = 1e-3  # below, the scaled logits leave the range of half precision
REPLACEMENT = "\ufffd"  # what bytes that make no character decode to
UNASSIGNED = "\U0003fffd"  # in no vocabulary: a tokenizer writes it in bytes, or not at all
# The end of a text that what follows may still change where a tokenizer removes the space before punctuation and "n't", "'ve".
_OPEN_END = re.compile(r"[ ']+(?:n[ ']*|[vr])?\Z")


@dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of one answer are chosen.

    max_tokens: the longest answer. temperature: 0 for the most probable token every time; the filters below need more.
    top_p: the share of probability that is kept, 0 or 1 for all. min_p: the smallest probability kept, as a share of the
    highest; min_tokens_to_keep tokens stay in any case. top_k: the number of tokens kept, 0 for all. repetition_penalty:
    what the logits of the last repetition_context_size tokens, the prompt's included, are divided by (multiplied where
    negative); None for none. random_state: the seed; mlx-lm gives the same tokens for it.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    random_state: int = 0

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range."""
        temperature, penalty = self.temperature, self.repetition_penalty
        warm = temperature == 0 or LOWEST_TEMPERATURE <= temperature < math.inf
        checks = (
            ("max_tokens", self.max_tokens >= 1, "a whole number, 1 or more"),
            ("temperature", warm, f"0 for the most probable token, or a number from {LOWEST_TEMPERATURE}"),
            ("top_p", 0 <= self.top_p <= 1, "a share from 0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "a share from 0 to 1"),
            ("min_tokens_to_keep", self.min_tokens_to_keep >= 1, "a number of tokens, 1 or more"),
            ("top_k", self.top_k >= 0, "a number of tokens, or 0 for all"),
            ("repetition_penalty", penalty is None or 0 < penalty < math.inf, "a number above 0; 1 changes nothing"),
            ("repetition_context_size", self.repetition_context_size >= 1, "a number of tokens, 1 or more"),
            ("random_state", 0 <= self.random_state < 2**32, "a whole number from 0 to 4294967295"),
        )
        problems = []
        for name, holds, expected in checks:
            try:
                require(name, getattr(self, name), holds, expected)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))


def stream(
    model: nn.Module, encoder: ChatEncoder, prompt_ids: Sequence[int], settings: SamplingSettings
) -> Iterator[StreamedToken]:
    """Yield the tokens of the answer, up to a stop token, which is left out, or `settings.max_tokens`.

    The texts, joined, are `encoder.decode` of the tokens, control tokens included. MLX's random state is left alone: what
    is drawn between two tokens neither changes the answer nor is changed by it. Raises UserError where the prompt is empty,
    a filter keeps more tokens than the model has, or the logits are not finite.
    """
    if len(prompt_ids) == 0:
        raise UserError("The prompt has no tokens. Expected at least one.")
    text = _IncrementalText(encoder)
    held: StreamedToken | None = None
    for count, (token_id, probability) in enumerate(_generated(model, encoder, prompt_ids, settings), 1):
        if held:
            yield held
        token = StreamedToken(token_id, text.add(token_id), probability)
        # A token that may be the last waits for its successor: if none comes, it has to carry the rest of the text.
        held = token if text.pending or count == settings.max_tokens else None
        if not held:
            yield token
    if held:
        yield replace(held, text=held.text + text.pending)


def _generated(
    model: nn.Module, encoder: ChatEncoder, prompt_ids: Sequence[int], settings: SamplingSettings
) -> Iterator[tuple[int, float]]:
    """The tokens before the first stop token, each with its probability."""
    choice = _Choice(settings)
    penalty = make_logits_processors(
        repetition_penalty=settings.repetition_penalty, repetition_context_size=settings.repetition_context_size
    )
    steps = generate_step(
        mx.array(list(prompt_ids), mx.uint32),
        model,
        mx.default_stream(mx.default_device()),
        max_tokens=settings.max_tokens,
        sampler=choice,
        logits_processors=[choice.observe, *penalty],
    )
    with closing(steps):
        for token, _ in steps:
            token_id, probability = int(token), float(choice.probabilities.popleft())
            if not math.isfinite(probability):
                raise UserError("The model's logits are not finite. Its weights are damaged, or too large.")
            if token_id in encoder.stop_ids:
                return
            yield token_id, min(probability, 1.0)


class _Choice:
    """mlx-lm's sampler with a random state of its own, beside the probability that the model gave each chosen token.

    `probabilities` grows by one with each choice; the generation loop is a step ahead of what it yields.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self.probabilities: deque[mx.array] = deque()
        self._distribution = mx.array([])
        self._settings = settings
        self._seed = settings.random_state
        self._sampler = make_sampler(
            temp=settings.temperature,
            top_p=settings.top_p,
            min_p=settings.min_p,
            min_tokens_to_keep=settings.min_tokens_to_keep,
            top_k=settings.top_k,
        )

    def observe(self, _: mx.array, logits: mx.array) -> mx.array:
        """Note the distribution of the next token, from logits of shape [1, vocabulary]; the first logits processor."""
        self._distribution = mx.softmax(logits.astype(mx.float32), axis=-1)  # now, because a penalty is applied in place
        return logits

    def __call__(self, log_probabilities: mx.array) -> mx.array:
        """The chosen token, of shape [1], from log-probabilities of shape [1, vocabulary]."""
        chosen = self._drawn(log_probabilities) if self._settings.temperature else self._sampler(log_probabilities)
        probability = self._distribution[0, chosen[0]]
        mx.async_eval(chosen, probability)  # together, or reading the probability would wait for the next token
        self.probabilities.append(probability)
        return chosen

    def _drawn(self, log_probabilities: mx.array) -> mx.array:
        top_k, least, known = self._settings.top_k, self._settings.min_tokens_to_keep, log_probabilities.shape[-1]
        require("top_k", top_k, top_k < known, f"a number below the {known} tokens that this model knows, or 0 for all")
        require("min_tokens_to_keep", least, least <= known, f"at most the {known} tokens that this model knows")
        with seeded(self._seed):
            chosen = self._sampler(log_probabilities)
            high, low = (int(each) for each in np.array(mx.random.state[0]))  # type: ignore[index]  # as in `seeded`
            self._seed = high << 32 | low
        return chosen


class _IncrementalText:
    """The text of tokens as they come: what is given out once is never changed by a later token.

    The whole answer is decoded with every token, which makes no assumption on how far a tokenizer's decoder looks around
    itself and takes a millisecond for thousands of tokens.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        self._decode = encoder.decode
        self._ids: list[int] = []
        self._whole = self._given = ""
        # Where single bytes are tokens, one that fits nowhere can turn all characters written in bytes before it into U+FFFD.
        last = encoder.plain_ids(UNASSIGNED)[-1:]
        self._byte = last if last and not encoder.decode(last).strip(REPLACEMENT) else []
        self._removes_spaces = encoder.decode(encoder.plain_ids("a .")).endswith("a.")

    def add(self, token_id: int) -> str:
        """The text that has become complete with this token."""
        self._ids.append(token_id)
        self._whole = self._decode(self._ids)
        new, spoilt = self.pending, self._decode([*self._ids, *self._byte])[len(self._given) :]
        while not spoilt.startswith(new):
            new = new[:-1]
        new = new.rstrip(REPLACEMENT)  # bytes that may yet become a character
        if self._removes_spaces:
            new = _OPEN_END.sub("", new)
        self._given += new
        return new

    @property
    def pending(self) -> str:
        """The text of the tokens so far that has not been given out."""
        return self._whole[len(self._given) :]

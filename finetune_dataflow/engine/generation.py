"""Greedy replies to many prompts at once, on mlx-lm's batch generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.settings import GenerationSettings


@dataclass(frozen=True)
class Reply:
    """A generated reply: its tokens without the stop token, and whether it ended by itself within max_tokens."""

    token_ids: tuple[int, ...]
    ended: bool


def greedy_replies(
    base_model_path: Path,
    adapter_path: Path | None,
    prompts: Sequence[Sequence[int]],
    encoder: ChatEncoder,
    settings: GenerationSettings,
) -> list[Reply]:
    """The greedy reply to each prompt, in the prompts' order; the tuned model's where an adapter is given."""
    model = load_model(base_model_path, adapter_path)
    return replies_of(model, prompts, encoder, settings, "tuned replies" if adapter_path else "base replies")


def replies_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], encoder: ChatEncoder, settings: GenerationSettings, description: str
) -> list[Reply]:
    """The greedy reply of a loaded model to each prompt, in the prompts' order."""
    generator = BatchGenerator(
        model,
        max_tokens=settings.max_tokens,
        stop_tokens=[[stop] for stop in sorted(encoder.stop_ids)],
        completion_batch_size=settings.generation_batch_size,
        prefill_batch_size=min(8, settings.generation_batch_size),
        stream=mx.default_stream(mx.default_device()),
    )
    bar = Bar(len(prompts), description)
    # Prompts of like length stand together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    place_of = dict(zip(generator.insert([list(prompts[index]) for index in order]), order, strict=True))
    tokens: dict[int, list[int]] = {index: [] for index in order}
    ended: dict[int, bool] = {}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                tokens[place_of[response.uid]].append(response.token)
            if response.finish_reason is not None:
                ended[place_of[response.uid]] = response.finish_reason == "stop"
                bar.advance()
    generator.close()
    bar.close()
    return [Reply(tuple(tokens[index]), ended[index]) for index in range(len(prompts))]

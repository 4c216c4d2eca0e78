"""Adapters of ours with random numbers in all matrices, as if they had been trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune_dataflow.engine import adapters
from finetune_dataflow.engine.fit_settings import MethodSettings
from finetune_dataflow.engine.methods import adapter_config, make_trainable, trainable
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.randomness import seeded

SPREAD = 0.1


def adapter_of(base: Path, directory: Path, **settings: Any) -> Path:
    """Write the adapter of a method with these settings; without them LoRA of rank 4 and scale 2 on all blocks."""
    method = MethodSettings(**{"num_layers": -1, "lora_rank": 4, "lora_scale": 2.0, **settings})
    model = load_model(base)
    make_trainable(model, method)
    with seeded(3):
        drawn = [(name, _drawn(name, each)) for name, each in sorted(trainable(model).items())]
    model.load_weights(drawn, strict=False)
    adapters.save_weights(model, directory)
    adapters.save_config(directory, adapter_config(method, len(model.layers)))
    return directory


def _drawn(name: str, before: mx.array) -> mx.array:
    """Normal numbers; a magnitude of DoRA's keeps its size, more or less."""
    noise = SPREAD * mx.random.normal(before.shape)
    return before * (1 + noise) if name.endswith(".m") else noise

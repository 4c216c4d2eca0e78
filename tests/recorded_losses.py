"""Models whose weights NumPy draws alike on every machine, and where the losses that transformers has on them are recorded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

RECORDING = Path(__file__).parent / "recorded" / "transformers_losses.json"

Weights = dict[str, NDArray[np.float32]]


def draw_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> Weights:
    """Float32 weights of these shapes, drawn one after another in the order of their names.

    Matrices are uniform around 0 with a variance of 1 / last axis, vectors within 0.1 of 1, biases within 0.1 of 0.
    """
    # Uniform numbers from PCG64 take no logarithm or exponential, so no library of the machine's rounds them its way.
    generator = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        centre = 1.0 if len(shape) == 1 and not name.endswith("bias") else 0.0
        reach = 0.1 if len(shape) == 1 else math.sqrt(3 / shape[-1])
        weights[name] = (centre + reach * (2 * generator.random(shape) - 1)).astype(np.float32)
    return weights


def digest(weights: Weights) -> str:
    """SHA-256 (hex) of the weights' names, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name}\0{weights[name].shape}\0".encode() + weights[name].astype("<f4").tobytes())
    return found.hexdigest()


def write_model(directory: Path, config: Mapping[str, Any], weights: Weights) -> Path:
    """Write config.json and model.safetensors as a checkpoint of transformers has them; no tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory

"""Loading a base model, with or without an adapter. Every stage that needs a model loads its own."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model as load_base_model

from finetune_dataflow.engine.adapters import apply_adapter
from finetune_dataflow.engine.peft_layout import in_mlx_layout
from finetune_dataflow.errors import UserError


def load_model(base_model_path: Path, adapter_path: Path | None = None, *, lazy: bool = False) -> nn.Module:
    """The base model, with the adapter applied where one is given, in evaluation mode.

    lazy: weights are read when they are first used. On a CPU, half-precision weights become float32, the fast type there and
    an exact copy of their values.
    """
    try:
        model, _ = load_base_model(base_model_path, lazy=lazy, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"The model in {base_model_path} cannot be loaded: {error}") from error
    except SystemExit as error:  # mlx-lm's OLMo exits where its package is missing
        raise UserError(
            f"The model in {base_model_path} cannot be loaded: mlx-lm says above which package it needs for it."
        ) from error
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    if adapter_path is not None:
        apply_adapter(model, in_mlx_layout(adapter_path, base_model_path), base_model_path)
    model.eval()
    return model

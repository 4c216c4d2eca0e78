"""Which of a model's parameters are trained: LoRA and DoRA layers put on it, or its own weights unfrozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from finetune_dataflow.engine.fit_settings import MethodSettings
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.errors import UserError, nearest

EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
ADAPTABLE = (nn.Linear, nn.Embedding, *QUANTIZED, SwitchLinear)


def make_trainable(model: nn.Module, settings: MethodSettings, *, evaluate: bool = True) -> None:
    """Freeze `model` but for what the fit trains. New layers are seeded by random_state and change no output yet.

    Raises UserError for more layers than the model has, for lora_keys that match no module or one that takes no adapter,
    for DoRA on experts, and for a full fine-tune of quantised weights.
    """
    blocks = len(model.layers)
    if settings.num_layers > blocks:
        raise UserError(
            f"num_layers={settings.num_layers} is out of range. Expected at most {blocks}, the model's layers, or -1."
        )
    model.freeze()
    if settings.fine_tune_type == "full":
        _unfreeze(model, settings)
        return
    _check_keys(model, settings)
    try:
        with seeded(settings.random_state):
            linear_to_lora_layers(
                model, adapted_layers(settings, blocks), lora_parameters(settings), settings.fine_tune_type == "dora"
            )
            if evaluate:
                mx.eval(model.trainable_parameters())
    except ValueError as error:
        raise UserError(f"fine_tune_type={settings.fine_tune_type!r} does not work on this model: {error}.") from error


def trained_parameters(base_model_path: Path, settings: MethodSettings) -> dict[str, int]:
    """How many parameters a fit trains and how many the model has; no weight is read for it."""
    model = load_model(base_model_path, lazy=True)
    before = sum(each.size for _, each in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))
    make_trainable(model, settings, evaluate=False)
    return {"trained": sum(each.size for each in trainable(model).values()), "all": before}


def adapted_layers(settings: MethodSettings, blocks: int) -> int:
    """How many of the model's last blocks are trained."""
    return blocks if settings.num_layers == -1 else settings.num_layers


def lora_parameters(settings: MethodSettings) -> dict[str, Any]:
    """The LoRA settings under mlx-lm's names; its scale is absolute (PEFT's alpha is scale * rank)."""
    keys = {"keys": list(settings.lora_keys)} if settings.lora_keys else {}
    named = {"use_rslora": True} if settings.use_rslora else {}  # for PEFT; the scale has it in it
    return {
        "rank": settings.lora_rank, "scale": settings.effective_scale, "dropout": settings.lora_dropout, **keys, **named
    }  # fmt: skip


def adapter_config(settings: MethodSettings, blocks: int) -> dict[str, Any]:
    """What mlx-lm needs to know of an adapter to put it on a model again."""
    return {
        "fine_tune_type": settings.fine_tune_type,
        "num_layers": adapted_layers(settings, blocks),
        "lora_parameters": None if settings.fine_tune_type == "full" else lora_parameters(settings),
    }


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The parameters that are trained, by name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters())))


def _unfreeze(model: nn.Module, settings: MethodSettings) -> None:
    if settings.lora_keys:
        raise UserError("lora_keys is for lora and dora; fine_tune_type='full' trains whole blocks. Leave one of them out.")
    parts = [model] if settings.num_layers == -1 else model.layers[-settings.num_layers :]
    if any(isinstance(module, QUANTIZED) for part in parts for _, module in part.named_modules()):
        raise UserError(
            "fine_tune_type='full' cannot train quantised weights, which have no gradient. "
            "Use lora or dora, or the model before it was quantised."
        )
    for part in parts:
        part.unfreeze()


def _check_keys(model: nn.Module, settings: MethodSettings) -> None:
    """UserErrors for what mlx-lm would pass over in silence, or fail on without saying which option is meant."""
    blocks = model.layers[-adapted_layers(settings, len(model.layers)) :]
    inside = [(name, module) for block in blocks for name, module in block.named_modules()]
    modules = {**dict(model.named_modules()), **dict(inside)}
    chosen = settings.lora_keys or tuple(
        {name for name, module in inside if isinstance(module, ADAPTABLE) or hasattr(module, "to_lora")}
    )
    able = sorted(name for name, module in modules.items() if isinstance(module, ADAPTABLE) or hasattr(module, "to_lora"))
    problems = [
        f"lora_keys names {key!r}, which is no module of this model's blocks or of the model.{nearest(key, able)}"
        if key not in modules
        else f"lora_keys names {key!r}, a {type(modules[key]).__name__}, which takes no adapter."
        for key in chosen
        if key not in able
    ]
    if settings.fine_tune_type == "dora":
        experts = sorted({key for key in chosen if isinstance(modules.get(key), EXPERTS)})
        if experts:
            others = sorted({name for name, _ in inside} & set(able) - set(experts))
            problems.append(
                f"fine_tune_type='dora' is not possible on the experts {', '.join(experts)}. "
                f"Name other modules in lora_keys ({', '.join(others)}), or use lora."
            )
    if problems:
        raise UserError("\n".join(problems))

"""An adapter of mlx-lm's layout taken to pieces, and the pieces named as PEFT names them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune_dataflow.engine import adapters, peft_experts
from finetune_dataflow.engine.peft_config import is_peft
from finetune_dataflow.engine.peft_matrices import LowRank
from finetune_dataflow.engine.peft_names import BaseLayers, Layer, misfit
from finetune_dataflow.engine.starting_weights import read_weights
from finetune_dataflow.errors import UserError, nearest

HEAD, MAGNITUDES = "lm_head", "lora_magnitude_vector"
PEFT_REFUSES = {"gpt_oss": "router", "mamba2": "out_proj"}


@dataclass(frozen=True)
class Named:
    """Tensors as PEFT names them (without its prefix), and the target_modules and target_parameters that they belong to.

    doubled: those of the parameters whose rank is twice the adapter's.
    """

    tensors: Mapping[str, mx.array]
    modules: list[str]
    parameters: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)


def config_to_write(adapter: Path, out: Path) -> dict[str, Any]:
    """The config of an adapter that is to be written to `out`. Raises UserError where that cannot be."""
    if is_peft(adapter):
        raise UserError(f"The adapter in {adapter} is in PEFT's layout already.")
    config = adapters.check_adapter(adapter)
    if config.get("fine_tune_type") == "full":
        raise UserError(
            f"{adapter} holds the weights of a full fine-tune, which PEFT has no layout for. Use the run's whole model, which "
            "transformers loads by itself."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Name a directory for PEFT's adapter.")
    if (out / adapters.WEIGHTS).is_file():
        raise UserError(f"{out} holds an adapter in mlx-lm's layout, whose config PEFT's would replace. Name another directory.")
    return config


def base_name_of(base: Path, config: Mapping[str, Any]) -> str:
    """The base model's name on the hub: as the hub's cache has it, or as the run was told it; else its directory."""
    cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{base.absolute()}/")
    told = config.get("model")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    on_hub = isinstance(told, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", told) and not Path(told).exists()
    return str(told) if on_hub else str(base.resolve())


def fitting(adapter: Path, config: Mapping[str, Any], base: BaseLayers) -> dict[str, LowRank]:
    """The adapter's matrices by layer: those of every layer that its config reaches, and of no other."""
    found: dict[str, dict[str, mx.array]] = {}
    for name, array in read_weights(adapter / adapters.WEIGHTS).items():
        layer, _, part = name.rpartition(".")
        found.setdefault(layer, {})[part] = array
    asked, dora = config["lora_parameters"], config.get("fine_tune_type") == "dora"
    within = {base.places[name][1] for name in base.layers if base.places[name][0] is not None}
    reached = base.reached(asked.get("keys") or within, config["num_layers"]) & base.layers.keys()
    parts = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    problems = [f"{name} is no layer that its config reaches.{nearest(name, reached)}" for name in found if name not in reached]
    problems += [f"{name} has no adapter." for name in sorted(reached) if name not in found]
    problems += [f"{name} has {', '.join(sorted(each))}, expected {', '.join(sorted(parts))}."
                 for name, each in found.items() if each.keys() != parts]  # fmt: skip
    embeddings = [name for name in sorted(reached) if base.layers[name].kind == "embedding"]
    if dora and embeddings and not problems:
        raise UserError(
            f"PEFT cannot express the DoRA adapter of {embeddings[0]}: its DoRA of an embedding has a magnitude for each column, "
            "mlx-lm's for each row. Use lora, or leave the embedding out of lora_keys."
        )
    if not problems:
        changes = {name: LowRank(each["lora_a"], each["lora_b"], asked["scale"], each.get("m")) for name, each in found.items()}
        problems = [
            f"{name} has matrices {tuple(each.a.shape)} and {tuple(each.b.shape)} for a layer {base.layers[name].shape}."
            for name, each in changes.items()
            if not each.fits(base.layers[name].change) or each.rank != asked["rank"]
        ]
    if problems:
        raise misfit(adapter, base, config.get("model"), problems)
    return changes


def named(changes: Mapping[str, LowRank], base: BaseLayers, *, dora: bool) -> Named:
    """The adapter under PEFT's names. Raises UserError for a layer that PEFT cannot adapt."""
    singles = [_single(base.layers[name], change, base, dora) for name, change in changes.items() if change.a.ndim == 2]
    experts: dict[str, dict[str, LowRank]] = {}
    for name, change in changes.items():
        if change.a.ndim == 3:
            experts.setdefault(peft_experts.experts_name(base.layers[name], base), {})[name.rpartition(".")[2]] = change
    stacked, parameters, doubled = peft_experts.stacked(experts)
    return Named(
        {key: each for single in singles for key, each in single.tensors.items()} | stacked,
        sorted({each for single in singles for each in single.modules}),
        sorted([*parameters, *(each for single in singles for each in single.parameters)]),
        doubled,
    )


def _single(layer: Layer, change: LowRank, base: BaseLayers, dora: bool) -> Named:
    """One linear layer or embedding."""
    name = base.name_in_transformers(layer)
    if layer.kind == "embedding":
        return _embedding(name, change, tied=layer == base.tied_embedding)
    if name.rpartition(".")[2] == PEFT_REFUSES.get(base.model_type):
        raise UserError(f"PEFT takes no adapter for {name} of {base.model_type!r}. Train other layers (lora_keys).")
    by_parameter = peft_experts.by_parameter(name, base)
    name = peft_experts.name_in_mixture(name) if by_parameter else name
    if dora and by_parameter:
        raise UserError(
            f"PEFT cannot express the DoRA adapter of {layer.name}: it adapts this part of a mixture of experts by its "
            "parameter, and parameters by LoRA alone. Use lora, or leave the layer out of lora_keys."
        )
    tensors = {f"{name}.lora_A.weight": change.a.T, f"{name}.lora_B.weight": change.b.T}
    if change.magnitudes is not None:
        tensors[f"{name}.{MAGNITUDES}"] = change.magnitudes
    return Named(tensors, [], [f"{name}.weight"]) if by_parameter else Named(tensors, [name])


def _embedding(name: str, change: LowRank, *, tied: bool) -> Named:
    """An embedding; a tied one at the output, too, which transformers has as a module of its own on the same matrix."""
    tensors = {f"{name}.lora_embedding_A": change.a.T, f"{name}.lora_embedding_B": change.b.T}
    if not tied:
        return Named(tensors, [name])
    return Named({**tensors, f"{HEAD}.lora_A.weight": change.b, f"{HEAD}.lora_B.weight": change.a}, [name, HEAD])

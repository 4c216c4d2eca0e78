"""Mixtures of experts in PEFT's layout: transformers holds all experts in two stacked parameters, mlx-lm in three layers.

transformers 5 has `experts.gate_up_proj` (experts, gate and up, in) and `experts.down_proj` (experts, out, in), which PEFT adapts
as target_parameters; before, each expert had linear layers of its own, and PEFT adapters of that time name these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx

from finetune_dataflow.engine.peft_config import PeftSettings
from finetune_dataflow.engine.peft_matrices import LowRank
from finetune_dataflow.engine.peft_names import BaseLayers, Layer, plain
from finetune_dataflow.errors import UserError

# Their experts are as above; tests_full/test_peft.py holds the logits of mixtral, qwen3_moe and qwen3_next against PEFT's.
STACKED = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"})
# In the configs for these architectures PEFT takes such names of modules for the parameters of experts, so their layers, too, are
# adapted by their parameter: routers, which are no linear layers in transformers, shared experts, and blocks without experts.
TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
OLD_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FUSED = ("gate_proj", "up_proj")

Tensors = dict[str, mx.array]


def experts_name(layer: Layer, base: BaseLayers) -> str:
    """What transformers calls the module that holds a layer's experts. Raises UserError where PEFT cannot adapt it."""
    if base.model_type not in STACKED:
        raise UserError(
            f"PEFT cannot express the adapter of the experts {layer.name}: how transformers holds the experts of "
            f"{base.model_type!r} is not known here. Known are {', '.join(sorted(STACKED))}. Train other layers (lora_keys), or "
            "use the fused model."
        )
    return re.sub(r"\.(block_sparse_moe|mlp)\.switch_mlp\.\w+$", ".mlp.experts", layer.name)


def by_parameter(name: str, base: BaseLayers) -> bool:
    """Whether PEFT has to be told a linear layer's parameter instead of its module."""
    return base.model_type in STACKED and name.rpartition(".")[2] in TAKEN_FOR_EXPERTS


def name_in_mixture(name: str) -> str:
    """What transformers 5 calls a layer of a mixture of experts."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def stacked(experts: Mapping[str, Mapping[str, LowRank]]) -> tuple[Tensors, list[str], list[str]]:
    """The tensors in PEFT's layout of experts by their module's name and mlx-lm's layer; the parameters; those of twice the rank.

    gate and up become one pair: their `a` one above the other, their `b` each in its own rows and columns, zeros elsewhere.
    """
    tensors: Tensors = {}
    parameters, doubled = [], []
    for name, layers in experts.items():
        pairs = {}
        if layers.keys() & {*FUSED}:
            pairs["gate_up_proj"] = _fused(layers)
            doubled.append(f"{name}.gate_up_proj")
        if "down_proj" in layers:
            pairs["down_proj"] = (layers["down_proj"].a, layers["down_proj"].b)
        for place, (a, b) in zip(("base_layer.", "")[-len(pairs) :], pairs.values(), strict=True):
            tensors[f"{name}.{place}lora_A.weight"] = a.reshape(-1, a.shape[-1])
            tensors[f"{name}.{place}lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        parameters += [f"{name}.{each}" for each in pairs]
    return tensors, parameters, doubled


def _fused(layers: Mapping[str, LowRank]) -> tuple[mx.array, mx.array]:
    some = next(layers[each] for each in FUSED if each in layers)
    zeros = LowRank(mx.zeros_like(some.a), mx.zeros_like(some.b), some.scale)
    gate, up = (layers.get(each, zeros) for each in FUSED)
    nothing = mx.zeros_like(some.b)
    rows = [mx.concatenate([gate.b, nothing], axis=2), mx.concatenate([nothing, up.b], axis=2)]
    return mx.concatenate([gate.a, up.a], axis=1), mx.concatenate(rows, axis=1)


def taken_apart(
    modules: Mapping[str, Mapping[str, mx.array]], settings: PeftSettings, base: BaseLayers
) -> tuple[dict[str, LowRank], dict[str, Mapping[str, mx.array]]]:
    """The adapters of experts in a PEFT adapter under mlx-lm's names, and the modules that are none.

    Raises UserError for experts that the base lacks and for matrices that do not divide among them.
    """
    found: dict[str, LowRank] = {}
    single: dict[str, dict[int, LowRank]] = {}
    others = {}
    for name, parts in modules.items():
        of_one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name)
        of_all = re.fullmatch(r"(.*\.experts)(\.base_layer)?", name)
        if of_one and (layer := _layer(of_one[1], OLD_NAMES.get(of_one[3], of_one[3]), base)):
            single.setdefault(layer.name, {})[int(of_one[2])] = _of_one(name, parts, settings)
        elif of_all and base.model_type in STACKED and _layer(of_all[1], "down_proj", base):
            found |= _of_all(of_all[1], bool(of_all[2]), parts, settings, base)
        else:
            others[name] = parts
    found |= {name: _joined(base.layers[name], experts) for name, experts in single.items()}
    return found, others


def _layer(experts: str, projection: str, base: BaseLayers) -> Layer | None:
    layer = base.by_plain_name.get(f"{plain(experts).removesuffix('.experts')}.switch_mlp.{projection}")
    return layer if layer is not None and layer.kind == "experts" else None


def _of_one(name: str, parts: Mapping[str, mx.array], settings: PeftSettings) -> LowRank:
    rank, scale = settings.rank_and_scale(name)
    if parts.keys() != {"lora_A", "lora_B"} or parts["lora_A"].shape[0] != rank:
        raise UserError(f"{name}: expected lora_A and lora_B of rank {rank}, as the config says.")
    return LowRank(parts["lora_A"].T, parts["lora_B"].T, scale)


def _joined(layer: Layer, experts: Mapping[int, LowRank]) -> LowRank:
    """One adapter of all experts; those without one of their own get zeros."""
    count, out, width = layer.shape
    odd = [number for number, each in experts.items() if number >= count or not each.fits((out, width))]
    if odd:
        raise UserError(
            f"The adapter of expert {odd[0]} of {layer.name} does not fit: the base model has {count} of {(out, width)}."
        )
    rank, scale = max(each.rank for each in experts.values()), next(iter(experts.values())).scale
    same = {number: each.under(scale).widened(rank) for number, each in experts.items()}
    some = next(iter(same.values()))
    nothing = LowRank(mx.zeros_like(some.a), mx.zeros_like(some.b), scale)
    every = [same.get(number, nothing) for number in range(count)]
    return LowRank(mx.stack([each.a.T for each in every]), mx.stack([each.b.T for each in every]), scale)


def _of_all(
    experts: str, inner: bool, parts: Mapping[str, mx.array], settings: PeftSettings, base: BaseLayers
) -> dict[str, LowRank]:
    """A stacked parameter's adapter. Where both parameters have one, that of gate_up_proj is the inner one."""
    both = settings.adapts_parameter(f"{experts}.gate_up_proj"), settings.adapts_parameter(f"{experts}.down_proj")
    name = "gate_up_proj" if inner or both == (True, False) else "down_proj"
    rank, scale = settings.rank_and_scale(f"{experts}.{name}")
    layers = [_layer(experts, each, base) for each in (FUSED if name == "gate_up_proj" else ("down_proj",))]
    shapes = [layer.shape for layer in layers if layer is not None]
    count, out, width = shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]
    a, b = parts.get("lora_A"), parts.get("lora_B")
    if a is None or b is None or a.shape != (count * rank, width) or b.shape != (out, rank * count):
        raise UserError(
            f"{experts}.{name}: expected lora_A {(count * rank, width)} and lora_B {(out, rank * count)}, for rank {rank} and "
            f"the base model's {count} experts."
        )
    a, b = a.reshape(count, rank, width), b.reshape(out, rank, count).transpose(2, 0, 1)
    ends = mx.split(b, len(layers), axis=1)
    return {layer.name: LowRank(a, end, scale) for layer, end in zip(layers, ends, strict=True) if layer is not None}

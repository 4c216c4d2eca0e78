"""An adapter of PEFT's layout taken to pieces, and the pieces given to the layers that mlx-lm has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from finetune_dataflow.engine import peft_experts
from finetune_dataflow.engine.peft_config import CONFIG, WEIGHTS, PeftSettings
from finetune_dataflow.engine.peft_matrices import LowRank
from finetune_dataflow.engine.peft_names import BaseLayers, Layer, misfit, plain
from finetune_dataflow.engine.starting_weights import read_weights
from finetune_dataflow.errors import UserError, nearest

logger = logging.getLogger(__name__)

PREFIX, HEAD = "base_model.model.", "lm_head"
LINEAR, EMBEDDING, MAGNITUDES = {"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}, "lora_magnitude_vector"
MOST_UNLIKE = 1e-2  # of a weight's norm, by which a copy of it in another precision may differ

Tensors = dict[str, mx.array]


def modules_of(directory: Path) -> tuple[dict[str, Tensors], Tensors]:
    """PEFT's tensors by module and part, and the copies of the base model's weights that it keeps beside them."""
    modules: dict[str, Tensors] = {}
    copies: Tensors = {}
    problems = []
    for key, array in read_weights(directory / WEIGHTS).items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        name = module.removeprefix(PREFIX)
        if not key.startswith(PREFIX):
            problems.append(f"{key} is no name of PEFT's, which begins with {PREFIX!r}.")
        elif part in LINEAR | EMBEDDING | {MAGNITUDES}:
            modules.setdefault(name, {})[part] = array
        elif key.endswith(".weight") and "lora" not in part and "modules_to_save" not in key:
            copies[name if part == "base_layer" else f"{name}.{part}".removeprefix(PREFIX)] = array
        else:
            problems.append(f"{key} is no part of an adapter that mlx-lm has.")
    if not modules and not problems:
        problems.append("it holds no adapter.")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{directory / WEIGHTS}: {problems[0]}{more}")
    return modules, copies


def check_copies(copies: Mapping[str, mx.array], base: BaseLayers, directory: Path) -> None:
    """Raise UserError where a weight that PEFT kept beside an embedding's adapter is not the base model's."""
    for name, array in copies.items():
        layer = base.by_plain_name.get(plain(name)) or (base.tied_embedding if name == HEAD else None)
        if layer is None or layer.shape != array.shape:
            expected = "none such" if layer is None else f"one of {layer.shape}"
            raise UserError(
                f"{directory / WEIGHTS} holds a weight {name} of {tuple(array.shape)} for the base model's, and the model in "
                f"{base.directory} has {expected}. An adapter of mlx-lm's has no place for it: merge it into the model with PEFT."
            )
        if layer.quantized:
            logger.warning(
                "%s holds a copy of %s, which cannot be held against a quantised model. It is not used.", directory, name
            )
            continue
        ours = base.parameters[f"{layer.name}.weight"].astype(mx.float32)
        if mx.linalg.norm(array.astype(mx.float32) - ours) > MOST_UNLIKE * mx.linalg.norm(ours):
            raise UserError(
                f"{directory / WEIGHTS} holds a weight {name} that is not that of the model in {base.directory}. An adapter of "
                "mlx-lm's has no place for it: merge it into the model with PEFT."
            )


def changes_of(
    modules: Mapping[str, Mapping[str, mx.array]], settings: PeftSettings, base: BaseLayers, directory: Path
) -> dict[str, LowRank]:
    """PEFT's adapter by mlx-lm's layers."""
    changes, singles = peft_experts.taken_apart(modules, settings, base)
    singles = _untied(singles, settings, base, directory)
    problems = []
    for name, parts in singles.items():
        layer = base.by_plain_name.get(plain(name))
        if layer is None or layer.kind == "experts":
            problems.append(f"{name} is no layer of it.{nearest(plain(name), base.by_plain_name)}")
            continue
        base.name_in_transformers(layer)
        change, problem = _change(name, parts, layer, settings)
        if change is None:
            problems.append(problem)
        else:
            changes[layer.name] = change
    if problems:
        raise misfit(directory, base, settings.base_model, problems)
    return changes


def _change(name: str, parts: Mapping[str, mx.array], layer: Layer, settings: PeftSettings) -> tuple[LowRank | None, str]:
    """One layer's matrices as mlx-lm has them, or what is wrong with them."""
    embedded = layer.kind == "embedding"
    if settings.dora and (embedded or layer.quantized):
        why = ("has a magnitude for each column of an embedding in PEFT, and for each row in mlx-lm" if embedded
               else "has magnitudes of the weights before they were quantised")  # fmt: skip
        return None, f"{name}: DoRA {why}. Merge it into the model with PEFT."
    expected = EMBEDDING if embedded else LINEAR | ({MAGNITUDES} if settings.dora else set())
    if parts.keys() != expected:
        return None, f"{name} has {', '.join(sorted(parts))}, expected {', '.join(sorted(expected))}."
    rank, scale = settings.rank_and_scale(f"{name}.weight" if settings.adapts_parameter(f"{name}.weight") else name)
    a, b = (parts[each] for each in sorted(EMBEDDING if embedded else LINEAR))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank:
        return None, f"{name} has matrices {tuple(a.shape)} and {tuple(b.shape)}, where {CONFIG} says rank {rank}."
    change = LowRank(a.T, b.T, scale, parts.get(MAGNITUDES))
    if not change.fits(layer.change):
        return None, f"{name} has matrices {tuple(a.shape)} and {tuple(b.shape)} for a layer {layer.shape}."
    return change, ""


def _untied(
    modules: Mapping[str, Mapping[str, mx.array]], settings: PeftSettings, base: BaseLayers, directory: Path
) -> dict[str, Mapping[str, mx.array]]:
    """The modules without the output's, where the model ties it to the embedding and the adapter does, too.

    Raises UserError where the adapter changes one of the two alone: mlx-lm has them as one layer.
    """
    tied = base.tied_embedding
    head = next((name for name in modules if plain(name) == HEAD), None)
    embedding = next((name for name in modules if tied is not None and plain(name) == plain(tied.name)), None)
    if tied is None or (head is None and embedding is None):
        return dict(modules)
    if embedding is not None and (settings.tied if head is None else _same(modules, embedding, head, settings)):
        return {name: parts for name, parts in modules.items() if name != head}
    raise UserError(
        f"The adapter in {directory} changes {embedding or head} otherwise than the other end of the model in {base.directory}, "
        "which ties its embedding and its output: mlx-lm has them as one layer. Train it with ensure_weight_tying=True, or merge "
        "it into the model with PEFT."
    )


def _same(modules: Mapping[str, Mapping[str, mx.array]], embedding: str, head: str, settings: PeftSettings) -> bool:
    inner, outer = modules[embedding], modules[head]
    if inner.keys() != EMBEDDING or outer.keys() != LINEAR:
        return False
    if settings.rank_and_scale(embedding) != settings.rank_and_scale(head):
        return False
    a, b = inner["lora_embedding_A"], inner["lora_embedding_B"]
    return bool(mx.array_equal(outer["lora_A"], b.T)) and bool(mx.array_equal(outer["lora_B"], a.T))

"""The layers of a base model that take adapters, under mlx-lm's names and under those that transformers has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from finetune_dataflow.errors import UserError

# Architectures whose linear layers and embeddings mlx-lm names, and shapes, as transformers does (AutoModelForCausalLM, or where
# there is none, AutoModelForImageTextToText).
# tests_full/test_peft.py holds these tables against transformers.
SAME_NAMES = frozenset({
    "apertus", "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "gpt_oss",
    "granite", "helium", "lfm2", "llama", "mamba2", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "olmoe", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
# Where they differ: how a name begins in mlx-lm and in transformers.
VISION = (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"))
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"), VISION),
    "gpt2": (("model.", "transformer."),),
    "gptj": (("model.", "transformer."),),
    "qwen3_5": (("language_model.model.", "model."), ("language_model.lm_head", "lm_head")),
}
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings", "embedding")
OUTERMOST = ("base_model", "model", "language_model", "transformer")  # parts that names begin with in one library or the other

Kind = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True)
class Layer:
    """A module that takes an adapter: `linear` (out, in), `embedding` (rows, width) or `experts` (experts, out, in)."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    quantized: bool

    @property
    def change(self) -> tuple[int, ...]:
        """The shape of what an adapter adds, out before in: an embedding's rows are what goes in."""
        return self.shape[::-1] if self.kind == "embedding" else self.shape


@dataclass(frozen=True)
class BaseLayers:
    """A base model's layers by mlx-lm's names.

    places: for every module, the number of its block (None outside of them) and its name within. blocks: how many there are.
    parameters: the model's, unread until they are used.
    """

    directory: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    places: Mapping[str, tuple[int | None, str]]
    blocks: int
    parameters: Mapping[str, mx.array] = field(repr=False)

    @property
    def model_type(self) -> str:
        """The architecture."""
        return str(self.config.get("model_type"))

    @property
    def quantized(self) -> bool:
        """Whether any layer is."""
        return any(layer.quantized for layer in self.layers.values())

    @cached_property
    def tied_embedding(self) -> Layer | None:
        """The embedding of the tokens where it is the output's matrix, too."""
        outside = [layer for name, layer in self.layers.items() if self.places[name][0] is None]
        tokens = [each for each in outside if each.kind == "embedding" and each.name.rpartition(".")[2] in TOKEN_EMBEDDINGS]
        heads = {each.shape for each in outside if each.kind == "linear"}
        return next((each for each in tokens if each.shape not in heads), None)

    def reached(self, keys: Iterable[str], num_layers: int) -> set[str]:
        """The modules that mlx-lm puts adapters on for these keys: in the last blocks by their names there, else in full."""
        named, first = set(keys), self.blocks - num_layers if num_layers > 0 else 0
        return {
            name
            for name, (block, within) in self.places.items()
            if name in named or (block is not None and block >= first and within in named)
        }

    def keys_of(self, names: Collection[str]) -> tuple[list[str], int]:
        """The keys and num_layers by which mlx-lm puts adapters on these layers and no others."""
        wanted, places = set(names), [self.places[name] for name in names]
        first = min((block for block, _ in places if block is not None), default=0)
        short = sorted({name for name, (block, _) in zip(names, places, strict=True) if block is None}
                       | {within for block, within in places if block is not None})  # fmt: skip
        if self.reached(short, self.blocks - first) == wanted:
            return short, self.blocks - first
        return sorted(wanted), self.blocks

    def name_in_transformers(self, layer: Layer) -> str:
        """What transformers calls a linear layer or an embedding. Raises UserError where that is not known."""
        name = layer.name
        if self.model_type in SAME_NAMES:
            return name
        if self.model_type in RENAMED:
            prefixes = RENAMED[self.model_type]
            return next((theirs + name.removeprefix(ours) for ours, theirs in prefixes if name.startswith(ours)), name)
        if self._is_as_in_checkpoint(layer):
            return name
        raise UserError(
            f"What transformers calls the layer {name} of {self.directory} is not known here: its architecture is "
            f"{self.model_type!r}, and its checkpoint does not show it. Known are "
            f"{', '.join(sorted(SAME_NAMES | RENAMED.keys()))}, and others from transformers' own checkpoint."
        )

    @cached_property
    def by_plain_name(self) -> dict[str, Layer]:
        """The layers by names that the two libraries share."""
        return {plain(name): layer for name, layer in self.layers.items()}

    def _is_as_in_checkpoint(self, layer: Layer) -> bool:
        """Whether the checkpoint is one of transformers' and has this layer's weight by this name, value for value."""
        stored = self._checkpoint.get(f"{layer.name}.weight")
        if layer.quantized or stored is None or stored.shape != layer.shape:
            return False
        ours = self.parameters[f"{layer.name}.weight"]
        return bool(mx.array_equal(stored.astype(ours.dtype), ours))

    @cached_property
    def _checkpoint(self) -> dict[str, mx.array]:
        stored: dict[str, mx.array] = {}
        for path in sorted(self.directory.glob("model*.safetensors")):
            arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True))
            if metadata.get("format") == "mlx":  # mlx-lm's own names, whatever they were
                return {}
            stored |= arrays
        return stored


def base_layers(base: Path) -> BaseLayers:
    """The layers of the model in `base`; no weight is read. Raises UserError where the model cannot be loaded."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    from finetune_dataflow.engine.models import load_model

    kinds: dict[type[nn.Module], Kind] = {
        nn.Linear: "linear", nn.QuantizedLinear: "linear", nn.Embedding: "embedding", nn.QuantizedEmbedding: "embedding",
        SwitchLinear: "experts", QuantizedSwitchLinear: "experts",
    }  # fmt: skip
    model = load_model(base, lazy=True)
    numbers = {id(block): number for number, block in enumerate(model.layers)}
    names = {name: numbers[id(module)] for name, module in model.named_modules() if id(module) in numbers}
    layers, places = {}, {}
    for name, module in model.named_modules():
        block = next((each for each in names if name.startswith(f"{each}.")), None)
        places[name] = (None, name) if block is None else (names[block], name.removeprefix(f"{block}."))
        if type(module) in kinds:
            layers[name] = Layer(name, kinds[type(module)], _shape(module), hasattr(module, "bits"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    parameters = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))
    return BaseLayers(base, config, layers, places, len(numbers), parameters)


def plain(name: str) -> str:
    """A module's name without what the libraries begin it with, and with their common name for a mixture of experts."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in OUTERMOST:
        parts = parts[1:]
    return re.sub(r"(?<=\.)block_sparse_moe(?=\.)", "mlp", ".".join(parts))


def _shape(module: nn.Module) -> tuple[int, ...]:
    shape = tuple(module.weight.shape)
    return (*shape[:-1], shape[-1] * 32 // module.bits) if hasattr(module, "bits") else shape


def misfit(adapter: Path, base: BaseLayers, made_for: object, problems: list[str]) -> UserError:
    """The error for an adapter that was made for another model; problems: what shows it, at least one."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    made = f"it was made for {made_for}" if made_for else "it does not say which it was made for"
    return UserError(f"The adapter in {adapter} does not fit the model in {base.directory}; {made}. {problems[0]}{more}")

"""The weights of a model directory under the names that its files and mlx-lm give them, and the same with some changed.

mlx-lm renames and joins some architectures' weights while it loads them. A changed weight is known by mlx-lm's name and must
be written under the file's: each array is followed through mlx-lm's own renaming, and a table tells how it stacks experts.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.utils import _get_classes, load_config

from finetune_dataflow.engine.files import write_json, writing
from finetune_dataflow.engine.methods import QUANTIZED
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.errors import UserError

# Architectures whose weights mlx-lm stores under transformers' own names when it converts or quantises a model.
SAME_NAMES = (
    "cohere", "gemma", "gemma2", "gemma3_text", "gemma4_text", "granite", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2",
    "qwen3", "stablelm",
)  # fmt: skip
# Experts, which mlx-lm stacks: its name of the stack, transformers' of one, and those of the three matrices.
_PLAIN_EXPERTS: tuple[str, str, dict[str, str]] = (".mlp.switch_mlp.", ".mlp.experts.{}.", {})
_EXPERTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mixtral": (
        ".block_sparse_moe.switch_mlp.", ".block_sparse_moe.experts.{}.", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    ),
    "qwen2_moe": _PLAIN_EXPERTS,
    "qwen3_moe": _PLAIN_EXPERTS,
    "olmoe": _PLAIN_EXPERTS,
}  # fmt: skip
_STACKED = ("switch_mlp.", "switch_glu.")

Merge = Callable[[mx.array], mx.array]  # a base weight in float32 to the tuned one


class BaseWeights:
    """A base model as its files have it, and how mlx-lm names what is in them."""

    def __init__(self, directory: Path) -> None:
        """Read the headers of its files; no weight is read."""
        self.directory = directory
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.model_type = str(self.config["model_type"])
        self.files: dict[str, Path] = {}
        self.made_by_mlx = False
        for path in sorted(directory.glob("model*.safetensors")):
            arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True))
            self.files |= dict.fromkeys(arrays, path)
            self.made_by_mlx |= metadata.get("format") == "mlx"
        plain = load_model(directory, lazy=True)
        self.quantized = {path: module for path, module in plain.named_modules() if isinstance(module, QUANTIZED)}
        self.arrays = self.read_all()
        by_identity = {id(array): name for name, array in self.arrays.items()}
        sanitized = self._sanitize(dict(self.arrays))
        # A weight that mlx-lm only renames is the same object afterwards.
        self.stored = {name: by_identity[id(array)] for name, array in sanitized.items() if id(array) in by_identity}

    def read_all(self) -> dict[str, mx.array]:
        """Every array under its name in the files, none of them read yet."""
        arrays: dict[str, mx.array] = {}
        for path in sorted(set(self.files.values())):
            arrays |= cast(dict[str, mx.array], mx.load(str(path)))
        return arrays

    def read(self, stored: str) -> mx.array:
        """One array, apart from all others, so that nothing else holds it in memory."""
        return cast(dict[str, mx.array], mx.load(str(self.files[stored])))[stored]

    def dense(self, name: str) -> mx.array:
        """The weight that mlx-lm calls `name`, in float32."""
        path, _, leaf = name.rpartition(".")
        module = self.quantized.get(path) if leaf == "weight" else None
        if module is not None:
            return dense(self.read(name), self.read(f"{path}.scales"), self.read_biases(path), module)
        if name in self.stored:
            return self.read(self.stored[name]).astype(mx.float32)
        return mx.stack([self.read(each) for each in self.experts(name)]).astype(mx.float32)

    def read_biases(self, path: str) -> mx.array | None:
        """The biases of a quantised module; None where its scheme has none."""
        return self.read(f"{path}.biases") if f"{path}.biases" in self.files else None

    def experts(self, name: str) -> list[str]:
        """transformers' names of what mlx-lm stacks as `name`, one for each expert; none where that is not known."""
        stack, single, matrices = _EXPERTS.get(self.model_type, ("\0", "", {}))
        if stack not in name:
            return []
        before, _, after = name.partition(stack)
        matrix, _, leaf = after.partition(".")
        count = int(self.config.get("num_local_experts") or self.config["num_experts"])
        return [f"{before}{single.format(expert)}{matrices.get(matrix, matrix)}.{leaf}" for expert in range(count)]

    def dtype(self, name: str) -> mx.Dtype:
        """The type that the weight called `name` is stored in; of a quantised one, that of its scales."""
        path = name.rpartition(".")[0]
        if path in self.quantized:
            scales = self.arrays[f"{path}.scales"].dtype
            return scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16
        return self.arrays[self.stored.get(name) or self.experts(name)[0]].dtype

    @property
    def type_name(self) -> str:
        """The type of most of its matrices, dequantised: "bfloat16", …"""
        names = [f"{path}.weight" for path in self.quantized] or [
            name for name, stored in self.stored.items() if self.arrays[stored].ndim > 1
        ]
        types = [type_name(self.dtype(name)) for name in names]
        return max(sorted({*types}), key=types.count)

    def check(self, merges: Mapping[str, Merge], *, keeps_layout: bool) -> None:
        """Raise UserError where the changed weights cannot be given their names in the files, or transformers' names."""
        scheme = self.config.get("quantization_config") or {}
        if "quantization" not in self.config and scheme:
            raise UserError(
                f"The base model in {self.directory} is quantised by {scheme.get('quant_method', 'something')!r}, which cannot "
                "be taken apart here. Use the model before it was quantised, or one that mlx-lm quantised."
            )
        for path in self.quantized:
            if any(self.stored.get(f"{path}.{leaf}") != f"{path}.{leaf}" for leaf in ("weight", "scales")):
                raise UserError(self._changed(path))
            if f"{path}.global_scale" in self.files:
                raise UserError(
                    f"The base model in {self.directory} has scales of whole tensors ({path}), which are not handled here."
                )
        for name in merges:
            if name not in self.stored and not all(each in self.files for each in self.experts(name) or ["\0"]):
                raise UserError(self._changed(name))
        if keeps_layout:
            return
        stacked = next((each for each in self.stored.values() if any(word in each for word in _STACKED)), None)
        if (stacked and not self.experts(stacked)) or (
            self.made_by_mlx and self.model_type not in SAME_NAMES and self.model_type not in _EXPERTS
        ):
            raise UserError(
                f"The base model in {self.directory} is stored as mlx-lm stores it; how transformers names the weights of "
                f"the architecture {self.model_type!r} is not known here. Use the model as it was before mlx-lm converted it. "
                f"Known: {', '.join(sorted((*SAME_NAMES, *_EXPERTS)))}."
            )

    def _changed(self, name: str) -> str:
        return (
            f"mlx-lm changes the weight {name} of the base model in {self.directory} while it loads it (architecture "
            f"{self.model_type!r}), in a way that cannot be undone here, so the tuned weight has no place in its files. "
            "Use the adapter as it is, or mlx_lm.fuse for a model that only mlx-lm reads."
        )

    def _sanitize(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        model_class, argument_class = _get_classes(config=load_config(self.directory))
        model = model_class(argument_class.from_dict(load_config(self.directory)))
        return cast(dict[str, mx.array], model.sanitize(arrays)) if hasattr(model, "sanitize") else arrays


@dataclass(frozen=True)
class _Output:
    """One array to write: its name, its size, and how it is made."""

    name: str
    nbytes: int
    make: Callable[[], mx.array]


class Plan:
    """Every array of a fused model without quantisation, in the order in which it is written."""

    def __init__(self, source: BaseWeights, merges: Mapping[str, Merge]) -> None:
        """Plan for these changes of this base model."""
        self.source, self.merges = source, merges
        self.tuned = functools.lru_cache(maxsize=1)(self._tuned)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without the quantisation that there was."""
        config = {
            name: value for name, value in self.source.config.items() if name not in {"quantization", "quantization_config"}
        }
        if self.source.quantized:
            named = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
            config |= dict.fromkeys(named, self.source.type_name)
        return config

    def __iter__(self) -> Iterator[_Output]:
        """The arrays."""
        source = self.source
        parameters = {stored: name for name, stored in source.stored.items()}
        of_experts = {stored: name for name in self.merges if name not in source.stored for stored in source.experts(name)}
        for stored, array in source.arrays.items():
            name = parameters.get(stored)
            path, _, leaf = stored.rpartition(".")
            if path in source.quantized and leaf in {"scales", "biases"}:
                continue
            if stored == "lm_head.weight" and name is None:
                continue  # a copy of the embedding, which may have changed
            if stored in of_experts:
                yield self._slice(stored, of_experts[stored], source.experts(of_experts[stored]).index(stored), array.shape)
            elif name is not None and (name in self.merges or path in source.quantized or source.experts(name)):
                yield from self._whole(stored, name)
            else:
                yield _Output(stored, array.nbytes, functools.partial(source.read, stored))

    def _whole(self, stored: str, name: str) -> Iterator[_Output]:
        shape, dtype = self._shape(name), self.source.dtype(name)
        experts = self.source.experts(name)
        for expert, each in enumerate(experts):
            yield self._slice(each, name, expert, shape[1:])
        if not experts:
            yield _Output(stored, math.prod(shape) * dtype.size, lambda: self.tuned(name).astype(dtype))

    def _slice(self, stored: str, name: str, expert: int, shape: tuple[int, ...]) -> _Output:
        dtype = self.source.dtype(name)
        return _Output(stored, math.prod(shape) * dtype.size, lambda: self.tuned(name)[expert].astype(dtype))

    def _shape(self, name: str) -> tuple[int, ...]:
        path = name.rpartition(".")[0]
        shape = self.source.arrays[self.source.stored[name]].shape
        return (*shape[:-1], shape[-1] * 32 // self.source.quantized[path].bits) if path in self.source.quantized else shape

    def _tuned(self, name: str) -> mx.array:
        base = self.source.dense(name)
        return self.merges[name](base) if name in self.merges else base


class Requantized(Plan):
    """The same with the quantisation kept, the changed weights at 8 bits."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with the settings of each changed module."""
        paths = [path for path in self.source.quantized if f"{path}.weight" in self.merges]
        settings = {**self.source.config["quantization"], **{path: self._settings(path) for path in paths}}
        return {**self.source.config, "quantization": settings, "quantization_config": settings}

    def __iter__(self) -> Iterator[_Output]:
        """The arrays."""
        source = self.source
        parameters = {stored: name for name, stored in source.stored.items()}
        for stored, array in source.arrays.items():
            name, (path, _, leaf) = parameters.get(stored, ""), stored.rpartition(".")
            changed = f"{path}.weight" in self.merges
            if path in source.quantized and changed:
                if leaf == "weight":
                    yield from self._eight_bits(path)
                elif leaf not in {"scales", "biases"}:
                    yield _Output(stored, array.nbytes, functools.partial(source.read, stored))
            elif name in self.merges:
                yield from self._whole(stored, name)
            elif stored != "lm_head.weight" or name:
                yield _Output(stored, array.nbytes, functools.partial(source.read, stored))

    def _whole(self, stored: str, name: str) -> Iterator[_Output]:
        dtype = self.source.dtype(name)
        yield _Output(stored, math.prod(self._shape(name)) * dtype.size, lambda: self.tuned(name).astype(dtype))

    def _settings(self, path: str) -> dict[str, Any]:
        return {"group_size": self.source.quantized[path].group_size, "bits": 8, "mode": "affine"}

    def _eight_bits(self, path: str) -> Iterator[_Output]:
        name, settings = f"{path}.weight", self._settings(path)
        dtype, size = self.source.dtype(name), math.prod(self._shape(name))
        parts = functools.lru_cache(maxsize=1)(lambda: eight_bits(self.tuned(name), settings["group_size"], dtype))
        yield _Output(name, size, lambda: parts()[0])
        for place, leaf in enumerate(("scales", "biases"), 1):
            scales = size // settings["group_size"] * dtype.size
            yield _Output(f"{path}.{leaf}", scales, functools.partial(lambda place: parts()[place], place))


def type_name(dtype: mx.Dtype) -> str:
    """The name of a type of numbers: "bfloat16", …"""
    return str(dtype).rpartition(".")[2]


def dense(weight: mx.array, scales: mx.array, biases: mx.array | None, module: Any) -> mx.array:
    """A quantised weight in float32; module: tells group_size, bits and mode."""
    exact = scales.astype(mx.float32) if mx.issubdtype(scales.dtype, mx.floating) else scales
    shift = None if biases is None else biases.astype(mx.float32)
    return mx.dequantize(weight, exact, shift, module.group_size, module.bits, module.mode, dtype=mx.float32)


def eight_bits(weight: mx.array, group_size: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """A float32 weight at 8 bits: codes, scales and biases, the codes chosen for the scales as `dtype` rounds them."""
    _, scales, biases = mx.quantize(weight, group_size, 8)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    groups = weight.reshape(*scales.shape, group_size)
    step = scales.astype(mx.float32)[..., None]
    codes = mx.round((groups - biases.astype(mx.float32)[..., None]) / mx.where(step == 0, 1, step))
    packed = mx.clip(codes, 0, 255).astype(mx.uint8).reshape(weight.shape).view(mx.uint32)
    return packed, scales, biases


def write_weights(directory: Path, plan: Plan, shard_bytes: int) -> None:
    """Write every array, a file's worth in memory at a time, with an index where there are several files."""
    shards: list[list[_Output]] = []
    for output in plan:
        if not shards or sum(each.nbytes for each in shards[-1]) + output.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(output)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for output in shard:
            arrays[output.name] = output.make()
            mx.eval(arrays[output.name])
            if mx.issubdtype(arrays[output.name].dtype, mx.floating) and not mx.isfinite(arrays[output.name]).all():
                raise UserError(
                    f"The tuned weight {output.name} has values that are not finite as {type_name(arrays[output.name].dtype)}."
                )
        try:
            with writing(directory / name), (directory / name).open("wb") as file:
                mx.save_safetensors(file, arrays, {"format": "pt"})  # transformers refuses a file without this mark
        except RuntimeError as error:
            raise UserError(f"{directory / name} cannot be written: {error}.") from error
        names |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        size = sum(output.nbytes for shard in shards for output in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        write_json(directory / "model.safetensors.index.json", index)

"""GGUF files read back for MLX: a model's weights beside the settings of the model that it was written from, and adapters.

`engine.gguf` makes a model directory of a GGUF file of llama architecture alone; here any architecture that `engine.gguf_writer`
knows is read, with the tokenizer and the settings of the directory that the file was written from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from finetune_dataflow.engine import adapters
from finetune_dataflow.engine.gguf import dequantised, unpermuted
from finetune_dataflow.engine.gguf_writer import GgufModel
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

_FACTORS = (".lora_a", ".lora_b")


def read_model(path: Path, like: Path, out: Path) -> Path:
    """The new model directory `out` with the weights of the GGUF file, float32, and everything else of the directory `like`.

    Raises UserError for tensors that `like` has no names for, and for names of it that the file lacks.
    """
    model = GgufModel(like)
    stored = {tensor.name: tensor for tensor in _reader(path).tensors}
    written = {name: each.name for each in model.tensors("f16") if (name := each.stored)}
    odd = sorted({*written.values()} ^ {*stored, *()} - {"rope_freqs.weight"})
    if odd:
        raise UserError(f"{path} does not hold the weights of {like}: {', '.join(odd[:5])}.")
    weights = {
        name: mx.array(_original(model, name, dequantised(each, stored[each].data, stored[each].tensor_type)))
        for name, each in written.items()
    }
    out.mkdir(parents=True)
    for each in like.iterdir():
        if each.is_file() and not each.name.startswith("model"):
            shutil.copyfile(each, out / each.name)
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "pt"})
    return out


def read_lora(path: Path, base: Path, adapter: Path, out: Path) -> Path:
    """The adapter of a GGUF file as the directory `out` in mlx-lm's layout; it was written from `adapter` for `base`.

    The layers' names and the method are those of `adapter`; the factors and their scale are the file's.
    """
    model, reader = GgufModel(base), _reader(path)
    stored = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    names = {str(model.names[f"{layer}.weight"]): layer for layer in _layers(adapter)}
    odd = sorted({*stored} ^ {f"{name}{factor}" for name in names for factor in _FACTORS})
    if odd:
        raise UserError(f"{path} does not hold the adapter in {adapter}: {', '.join(odd[:5])}.")
    weights: dict[str, mx.array] = {}
    for name, layer in names.items():
        first, second = (stored[f"{name}{factor}"] for factor in _FACTORS)
        looked_up = layer == "model.embed_tokens"
        weights[f"{layer}.lora_a"] = mx.array(first if looked_up else first.T)
        weights[f"{layer}.lora_b"] = mx.array((second if looked_up else _original(model, f"{layer}.weight", second)).T)
    config = json.loads((adapter / adapters.CONFIG).read_text(encoding="utf-8"))
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    config["lora_parameters"]["scale"] = alpha / config["lora_parameters"]["rank"]
    out.mkdir(parents=True)
    mx.save_safetensors(str(out / adapters.WEIGHTS), weights)
    adapters.save_config(out, config)
    return out


def says_bos(path: Path) -> bool:
    """Whether a GGUF file says that a beginning of sequence is put before a text."""
    field = _reader(path).fields.get("tokenizer.ggml.add_bos_token")
    return bool(field and field.contents())


def ends_said(path: Path) -> frozenset[int]:
    """The tokens at which a GGUF file says that generation ends."""
    fields = _reader(path).fields
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return frozenset(int(fields[name].contents()) for name in names if name in fields)


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    return GGUFReader(path)


def _layers(adapter: Path) -> list[str]:
    """The adapted layers, by mlx-lm's names."""
    weights = cast(dict[str, mx.array], mx.load(str(adapter / adapters.WEIGHTS)))
    return sorted({name.rpartition(".")[0] for name in weights})


def _original(model: GgufModel, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `GgufModel.converted` made these values of."""
    if model.architecture.permuted and ".self_attn.q_proj." in name:
        return _unpermuted(values, model.heads)
    if model.architecture.permuted and ".self_attn.k_proj." in name:
        return _unpermuted(values, model.key_value_heads)
    return values - np.float32(model.architecture.norm_offset) if name.endswith("norm.weight") else values


def _unpermuted(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in Hugging Face's order again; a bias is one column."""
    return unpermuted(values.reshape(len(values), -1), heads).reshape(values.shape)

"""A GGUF file of llama architecture, rewritten as a Hugging Face model directory in float32.

The file is read and dequantised by llama.cpp's own package `gguf`; this module renames the tensors, undoes llama.cpp's
row order of the query and key weights, and rebuilds the configuration and the byte-level BPE tokenizer from the
metadata. mlx-lm and transformers read the result alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader
    from tokenizers import Tokenizer

# Raise this when the files written for one and the same GGUF change: caches key on it.
CONVERTER_VERSION = 1
MANIFEST = "conversion.json"

# Metadata this converter depends on, and the values it handles; None stands for an absent key.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": (None, "none"),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm", "gpt-2"),
    "tokenizer.ggml.add_bos_token": (None, False),
}
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4

_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf_path: Path, directory: Path) -> Path:
    """The Hugging Face model directory made from a GGUF file, whole or not there at all.

    It is written beside `directory` and renamed onto it, so a kill leaves at most a hidden directory (see
    `unfinished_conversions`), and of two processes that convert the same file the second keeps the first one's result.
    Raises UserError for a file that is not GGUF, an architecture, tokenizer, tensor or tensor type that is not handled,
    and where `directory` holds something else.
    """
    if directory.exists() and any(directory.iterdir()) and not is_whole(directory):
        raise UserError(f"{directory} is not empty and is not a whole converted model; name another directory.")
    reader = _reader(gguf_path)
    metadata = _metadata(reader, gguf_path)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir()
    try:
        _write_weights(reader, metadata, gguf_path, temporary / "model.safetensors")
        tied = "output.weight" not in {tensor.name for tensor in reader.tensors}
        _write_json(temporary / "config.json", _model_config(metadata, tied))
        # safetensors makes its file readable by its owner only; a cache may be shared.
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)
        _write_json(temporary / "generation_config.json", _token_ids(metadata))
        _tokenizer(metadata).save(str(temporary / "tokenizer.json"))
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(metadata))
        _write_json(temporary / MANIFEST, {"files": _flushed_files(temporary)})
        _flush(temporary / MANIFEST)
        _flush(temporary)
        _rename_onto(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def is_whole(directory: Path) -> bool:
    """Whether `directory` holds every file of a conversion in its full size (a quick look at sizes only)."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return False


def unfinished_conversions(directory: Path) -> list[Path]:
    """What conversions to `directory` that were killed, or are still running, have left beside it."""
    return sorted(directory.parent.glob(f".{directory.name}.*.partial"))


def dequantised(name: str, data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """One tensor's stored rows as float32, by ggml's definition of its type; raises UserError for any other type."""
    import gguf
    import numpy as np

    try:
        return np.ascontiguousarray(gguf.dequantize(data, kind), dtype=np.float32)
    except NotImplementedError as error:
        raise UserError(
            f"The tensor {name} is stored as {kind.name}, which cannot be read; "
            "expected F32, F16, BF16 or one of ggml's quantised weight types (Q4_0, Q4_1, Q8_0, Q4_K, …)."
        ) from error


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows in Hugging Face's order: within a head, all first then all second halves of the rotated pairs.

    llama.cpp rotates neighbouring rows (2i, 2i + 1), Hugging Face rows (i, i + head size / 2).
    Shape: (heads * head size, width).
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


@dataclass(frozen=True)
class _Metadata:
    """What a GGUF file of llama architecture says of its model and tokenizer."""

    layers: int
    context_length: int
    width: int
    feed_forward_width: int
    heads: int
    key_value_heads: int
    head_size: int
    rms_norm_eps: float
    rope_theta: float
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    splits_digits: bool
    bos: int | None
    eos: int
    unknown: int | None
    padding: int
    end_of_turn: int
    chat_template: str | None


def _reader(gguf_path: Path) -> GGUFReader:
    import gguf

    if not gguf_path.is_file():
        raise UserError(f"There is no GGUF file {gguf_path}.")
    try:
        return gguf.GGUFReader(gguf_path)
    # The package raises these three for a file of another kind, one cut short, and a type it does not know.
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{gguf_path} cannot be read as GGUF version 2 or 3: {error}.") from error


def _metadata(reader: GGUFReader, gguf_path: Path) -> _Metadata:
    """What the file says of its model; raises UserError for keys whose value is not handled, or that are missing."""
    found = {name: field.contents() for name, field in reader.fields.items()}
    problems = [
        f"{key} is {found.get(key)!r}; supported: {', '.join(repr(value) for value in values if value is not None)}"
        for key, values in _SUPPORTED.items()
        if found.get(key) not in values
    ]
    if problems:
        raise UserError(f"{gguf_path} cannot be converted: {'; '.join(problems)}.")
    try:
        heads = found["llama.attention.head_count"]
        eos = found["tokenizer.ggml.eos_token_id"]
        metadata = _Metadata(
            layers=found["llama.block_count"],
            context_length=found["llama.context_length"],
            width=found["llama.embedding_length"],
            feed_forward_width=found["llama.feed_forward_length"],
            heads=heads,
            key_value_heads=found.get("llama.attention.head_count_kv", heads),
            head_size=found.get("llama.attention.key_length", found["llama.embedding_length"] // heads),
            # GGUF holds float32 1e-5, in Python 9.999999747378752e-06: seven digits give the number that was meant.
            rms_norm_eps=float(f"{found['llama.attention.layer_norm_rms_epsilon']:.7g}"),
            rope_theta=found.get("llama.rope.freq_base", 10000.0),
            tokens=found["tokenizer.ggml.tokens"],
            token_types=found["tokenizer.ggml.token_type"],
            merges=found["tokenizer.ggml.merges"],
            splits_digits=found["tokenizer.ggml.pre"] == "smollm",
            bos=found.get("tokenizer.ggml.bos_token_id"),
            eos=eos,
            unknown=found.get("tokenizer.ggml.unknown_token_id"),
            padding=found.get("tokenizer.ggml.padding_token_id", eos),
            end_of_turn=found.get("tokenizer.ggml.eot_token_id", eos),
            chat_template=found.get("tokenizer.chat_template"),
        )
    except KeyError as error:
        raise UserError(f"{gguf_path} cannot be converted: its metadata lacks the key {error}.") from error
    rotated = found.get("llama.rope.dimension_count", metadata.head_size)
    if rotated != metadata.head_size:
        raise UserError(
            f"{gguf_path} cannot be converted: llama.rope.dimension_count is {rotated}; "
            f"supported: the head size, {metadata.head_size}."
        )
    return metadata


def _write_weights(reader: GGUFReader, metadata: _Metadata, gguf_path: Path, path: Path) -> None:
    from safetensors.numpy import save_file

    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _OUTSIDE_LAYERS.items()}
    for layer in range(metadata.layers):
        names |= {f"blk.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight" for ours, theirs in _IN_A_LAYER.items()}
    found = {tensor.name for tensor in reader.tensors}
    # Without output.weight the output head is the embedding (tied).
    missing, unknown = sorted(names.keys() - found - {"output.weight"}), sorted(found - names.keys())
    if missing or unknown:
        raise UserError(
            f"{gguf_path} does not hold the tensors of a plain llama model of {metadata.layers} layers; "
            f"missing: {', '.join(missing) or 'none'}; not known: {', '.join(unknown) or 'none'}."
        )
    weights = {}
    for tensor in reader.tensors:
        weight = dequantised(tensor.name, tensor.data, tensor.tensor_type)
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", tensor.name):
            weight = unpermuted(weight, metadata.heads if ".attn_q." in tensor.name else metadata.key_value_heads)
        weights[names[tensor.name]] = weight
    # transformers refuses a file without this mark; mlx-lm does not look at it.
    save_file(weights, path, metadata={"format": "pt"})


def _token_ids(metadata: _Metadata) -> dict[str, object]:
    """The ids generation needs. Where the end of a turn is a token of its own, generation ends at either."""
    return {
        "bos_token_id": metadata.bos,
        "eos_token_id": metadata.eos if metadata.end_of_turn == metadata.eos else [metadata.eos, metadata.end_of_turn],
        "pad_token_id": metadata.padding,
    }


def _model_config(metadata: _Metadata, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": metadata.width,
        "intermediate_size": metadata.feed_forward_width,
        "num_hidden_layers": metadata.layers,
        "num_attention_heads": metadata.heads,
        "num_key_value_heads": metadata.key_value_heads,
        "head_dim": metadata.head_size,
        "max_position_embeddings": metadata.context_length,
        "rms_norm_eps": metadata.rms_norm_eps,
        "rope_theta": metadata.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": len(metadata.tokens),
        **_token_ids(metadata),
    }


def _tokenizer(metadata: _Metadata) -> Tokenizer:
    """Byte-level BPE; `smollm` splits every digit off before GPT-2's pattern (llama.cpp, src/llama-vocab.cpp)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in metadata.merges)]
    vocabulary = {token: index for index, token in enumerate(metadata.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if metadata.splits_digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL_TOKEN, normalized=False)
            for token, kind in zip(metadata.tokens, metadata.token_types, strict=True)
            if kind in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN)
        ]
    )
    return tokenizer


def _tokenizer_config(metadata: _Metadata) -> dict[str, object]:
    ids = {"bos": metadata.bos, "eos": metadata.eos, "unk": metadata.unknown, "pad": metadata.padding}
    return {
        # This class takes tokenizer.json as it is; GPT2Tokenizer would put its own splitting in place of the digits'.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.context_length,
        **{f"{name}_token": metadata.tokens[index] for name, index in ids.items() if index is not None},
        **({"chat_template": metadata.chat_template} if metadata.chat_template else {}),
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Have the kernel put a file, or a directory's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flushed_files(directory: Path) -> dict[str, dict[str, object]]:
    """Size and SHA-256 of each file in `directory`, by name, after having them put on disk."""
    files: dict[str, dict[str, object]] = {}
    for path in sorted(directory.iterdir()):
        _flush(path)
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _rename_onto(finished: Path, directory: Path) -> None:
    """Give `finished` its name, or leave an equal result there that another process has put first."""
    try:
        finished.rename(directory)
    except OSError as error:  # a directory that is not empty is there
        ours, theirs = finished / MANIFEST, directory / MANIFEST
        if not theirs.exists():
            raise
        if ours.read_bytes() != theirs.read_bytes():
            raise UserError(f"{directory} holds another converted model; name another directory.") from error
    _flush(directory.parent)

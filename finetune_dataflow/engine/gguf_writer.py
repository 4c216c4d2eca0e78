"""A model directory as one GGUF file, and a LoRA adapter as another, as llama.cpp's converters write them.

The files are written by llama.cpp's own package `gguf`, which also knows the tensors' names; this module decides what stands
in them. Everything that could be wrong is looked at before the first byte is written, and the finished file is read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from finetune_dataflow.engine.files import replacing
from finetune_dataflow.engine.gguf_tokenizer import GgufTokenizer, add_tokenizer, gguf_tokenizer
from finetune_dataflow.engine.settings import require_choice
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Kind = Literal["f16", "q8_0"]
KINDS = ("f16", "q8_0")
MOST_OF_NAMES = 4
Array = NDArray[Any]


@dataclass(frozen=True)
class _Architecture:
    """What GGUF calls an architecture and how its weights differ there.

    permuted: query and key rows stand in pairs, as llama.cpp rotates them. norm_offset: is added to the norms' weights.
    always_tied: the output head is always the embedding. head_size: where config.json leaves it out; 0 for width / heads.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    always_tied: bool = False
    head_size: int = 0
    activations: tuple[str | None, ...] = (None, "silu", "swish")


_GELU = (None, "gelu", "gelu_pytorch_tanh")  # Gemma's "gelu" has always meant the approximation
_ARCHITECTURES = {
    "llama": _Architecture("llama", permuted=True),
    "mistral": _Architecture("llama", permuted=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3", head_size=128),
    "gemma": _Architecture("gemma", norm_offset=1.0, always_tied=True, head_size=256, activations=_GELU),
    "gemma2": _Architecture("gemma2", norm_offset=1.0, always_tied=True, head_size=256, activations=_GELU),
    "gemma3_text": _Architecture("gemma3", norm_offset=1.0, always_tied=True, head_size=256, activations=_GELU),
    "phi3": _Architecture("phi3"),
}
_WINDOW_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # built into llama.cpp: every so many layers one sees everything
_NEEDED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_ROPE_KINDS = ("none", "linear", "llama3")


def write_gguf(model: Path, out: Path, kind: Kind) -> Path:
    """Write the model in a directory, with its tokenizer and chat template, as the GGUF file `out`, whole or not at all.

    kind: "f16" for half precision, "q8_0" for blocks of 32 weights of 8 bits with one scale each. Norms, biases and other
    vectors are float32 in both; a matrix whose rows are no multiple of 32 is half precision in "q8_0", too. Architectures:
    llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3.
    Raises UserError, before anything is written, for another architecture, for settings, weights or a tokenizer that GGUF
    cannot hold, and for quantised weights.
    """
    require_choice("kind", kind, KINDS)
    _check_out(out)
    source = GgufModel(model)
    tensors = source.tensors(kind)
    tokenizer = gguf_tokenizer(model, source.rows)
    with replacing(out) as temporary:
        import gguf

        writer = gguf.GGUFWriter(None, source.architecture.name)
        try:
            _add_metadata(writer, source, _model_name(out, source, tokenizer), kind)
            add_tokenizer(writer, tokenizer)
            _write(writer, temporary, tensors, source)
        finally:
            writer.close()
        _check_written(temporary, tensors, tokenizer)
    return out


def write_lora_gguf(adapter: Path, base: Path, out: Path) -> Path:
    """Write a LoRA adapter, mlx-lm's layout, as the GGUF file `out`, which llama.cpp puts on the base model's GGUF file.

    Each adapted matrix W becomes W + alpha / rank * B A. The two factors are float32.
    Raises UserError, before anything is written, for DoRA and full fine-tunes, for an adapter of another model, for a base
    model as `write_gguf` does, and for an adapted embedding that is the output head, too, which llama.cpp cannot apply.
    """
    _check_out(out)
    from finetune_dataflow.engine.adapters import WEIGHTS, check_adapter
    from finetune_dataflow.engine.models import load_model

    config = check_adapter(adapter)
    method = config.get("fine_tune_type", "lora")
    if method != "lora":
        raise UserError(f"The adapter in {adapter} is of fine_tune_type={method!r}; GGUF knows LoRA only. Fuse it into its base.")
    source = GgufModel(base)
    load_model(base, adapter, lazy=True)  # UserError where the adapter is not this model's
    weights = cast(dict[str, mx.array], mx.load(str(adapter / WEIGHTS)))
    factors = {name: pair for path in sorted({each.rpartition(".")[0] for each in weights})
               for name, pair in source.lora_factors(path, weights).items()}  # fmt: skip
    with replacing(out) as temporary:
        import gguf

        writer = gguf.GGUFWriter(None, source.architecture.name)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(out.stem)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            parameters = config["lora_parameters"]
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(parameters["scale"] * parameters["rank"]))
            for name, values in factors.items():
                writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return out


def check_architecture(directory: Path) -> None:
    """Raise UserError where a model directory is of an architecture that no GGUF is written of here."""
    found = str(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type"))
    if found not in _ARCHITECTURES:
        raise UserError(
            f"The model in {directory} is of the architecture {found!r}, for which no GGUF is written here. "
            f"Expected one of {', '.join(_ARCHITECTURES)}."
        )


def permuted(weight: Array, heads: int) -> Array:
    """Query or key rows (or a bias) in llama.cpp's order: within a head, the two of each rotated pair beside each other."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its name there, in the model's files (empty for one that is computed), its shape and type."""

    name: str
    stored: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


class GgufModel:
    """A model directory, checked: its configuration and the names, shapes and files of its weights."""

    def __init__(self, directory: Path) -> None:
        """Raise UserError for what GGUF cannot hold, naming all of it."""
        from finetune_dataflow.engine.model_source import check_model_directory

        check_model_directory(directory)
        self.directory = directory
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        check_architecture(directory)
        found = str(self.config.get("model_type"))
        self.model_type, self.architecture = found, _ARCHITECTURES[found]
        problems = [*self._problems()]
        if problems:
            raise UserError(f"The model in {directory} cannot be written as GGUF: {'; '.join(problems)}.")

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def key_value_heads(self) -> int:
        """The number of key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        """The width of a head."""
        default = self.architecture.head_size or self.config["hidden_size"] // self.heads
        return int(self.config.get("head_dim") or default)

    @property
    def rows(self) -> int:
        """The rows of the embedding."""
        return self.shapes["model.embed_tokens.weight"][0]

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        named = bool(self.config.get("tie_word_embeddings", False))
        return self.architecture.always_tied or named or "lm_head.weight" not in self.shapes

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each weight."""
        return {name: path for path, shapes in self._headers.items() for name in shapes}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight."""
        return {name: shape for shapes in self._headers.values() for name, shape in shapes.items()}

    @cached_property
    def _headers(self) -> dict[Path, dict[str, tuple[int, ...]]]:
        from safetensors import SafetensorError, safe_open

        headers: dict[Path, dict[str, tuple[int, ...]]] = {}
        for path in sorted(self.directory.glob("model*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as handle:
                    headers[path] = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{path} cannot be read as weights: {error}. It may have been cut short.") from error
        return headers

    @property
    def rope(self) -> dict[str, Any]:
        """The settings of the rotary embedding: rope_type ("none" for plain), rope_theta, and what the type needs."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        found = dict(found.get("full_attention", found))
        kind = found.get("rope_type") or found.get("type") or "none"
        default = 1e6 if self.model_type == "gemma3_text" else 1e4
        theta = self.config.get("rope_theta") or found.get("rope_theta") or default
        return {**found, "rope_type": "none" if kind == "default" else kind, "rope_theta": float(theta)}

    @property
    def local_theta(self) -> float:
        """The base of the rotary embedding in layers with a window (Gemma 3)."""
        nested = (self.config.get("rope_parameters") or {}).get("sliding_attention") or {}
        return float(self.config.get("rope_local_base_freq") or nested.get("rope_theta") or 1e4)

    def tensors(self, kind: Kind) -> list[_Tensor]:
        """What is written, in order. UserError for weights that GGUF has no names for, and for missing ones."""
        from gguf import GGMLQuantizationType as Types

        found: list[_Tensor] = []
        unknown: list[str] = []
        for name in self.shapes:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.tied):
                continue
            stored_as = self.names.get(name)
            if stored_as is None:
                unknown.append(name)
                continue
            shape = self.shapes[name]
            blocks = kind == "q8_0" and shape[-1] % 32 == 0
            matrix = Types.Q8_0 if blocks else Types.F16
            found.append(_Tensor(stored_as, name, shape, matrix if len(shape) > 1 else Types.F32))
        if unknown:
            raise UserError(
                f"The model in {self.directory} has weights that GGUF has no names for in the architecture "
                f"{self.architecture.name!r}: {_some(unknown)}."
            )
        if self.rope["rope_type"] == "llama3":
            found.insert(0, _Tensor("rope_freqs.weight", "", (self.head_size // 2,), Types.F32))
        return found

    @cached_property
    def names(self) -> dict[str, str | None]:
        """GGUF's name of each weight; None where it has none."""
        import gguf

        architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.architecture.name)
        names = gguf.get_tensor_name_map(architecture, self.layers)
        return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in self.shapes}

    def converted(self, name: str, weight: Array) -> Array:
        """A weight (or LoRA's B), float32, as GGUF's architecture wants it."""
        if self.architecture.permuted and ".self_attn.q_proj." in name:
            return permuted(weight, self.heads)
        if self.architecture.permuted and ".self_attn.k_proj." in name:
            return permuted(weight, self.key_value_heads)
        return weight + np.float32(self.architecture.norm_offset) if name.endswith("norm.weight") else weight

    def values(self, tensors: list[_Tensor]) -> Iterator[tuple[_Tensor, Array]]:
        """The tensors one after another with their values in float32, so that few are in memory at a time."""
        arrays: dict[str, mx.array] = {}
        opened: Path | None = None
        for tensor in tensors:
            if not tensor.stored:
                yield tensor, self.rope_factors()
                continue
            if self.files[tensor.stored] != opened:
                opened = self.files[tensor.stored]
                arrays = cast(dict[str, mx.array], mx.load(str(opened)))
            weight = np.array(arrays.pop(tensor.stored).astype(mx.float32))
            yield tensor, self.converted(tensor.stored, weight)

    def rope_factors(self) -> Array:
        """By what each rotation is slowed down under Llama 3's scaling, float32 [head size / 2]."""
        rope = self.rope
        factor, low, high = rope["factor"], rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        trained = rope.get("original_max_position_embeddings", 8192)
        exponents = np.arange(0, self.head_size, 2, dtype=np.float64) / self.head_size
        turns = trained / (2 * math.pi * rope["rope_theta"] ** exponents)  # over the length that the model was trained on
        mixed = 1 / ((1 - (share := (turns - low) / (high - low))) / factor + share)
        return np.where(turns > high, 1.0, np.where(turns < low, factor, mixed)).astype(np.float32)

    def lora_factors(self, path: str, weights: dict[str, mx.array]) -> dict[str, Array]:
        """The two factors of one adapted module under GGUF's names. UserError where llama.cpp could not apply them."""
        name = f"{path}.weight"
        stored_as = self.names.get(name)
        first, second = (np.array(weights[f"{path}.{each}"].astype(mx.float32)) for each in ("lora_a", "lora_b"))
        if stored_as is None or first.ndim != 2:
            raise UserError(
                f"The adapter changes {path}, for which GGUF has no name in the architecture {self.architecture.name!r}."
            )
        if name == "model.embed_tokens.weight" and self.tied:
            raise UserError(
                f"The adapter changes {path}, which is this model's output head, too; llama.cpp applies an adapter to one of the "
                "two only. Fuse it into its base instead."
            )
        if name == "lm_head.weight" and self.tied:
            raise UserError(f"The adapter changes {path}, but the output head of the base model is its embedding.")
        if name == "model.embed_tokens.weight":  # looked up by row, so A stands as it is
            return {f"{stored_as}.lora_a": first, f"{stored_as}.lora_b": second.T}
        return {f"{stored_as}.lora_a": first.T, f"{stored_as}.lora_b": self.converted(name, second.T)}

    def _problems(self) -> Iterator[str]:
        """What GGUF, or llama.cpp's code for this architecture, cannot express of the configuration."""
        config, rope = self.config, self.rope
        if "quantization" in config or "quantization_config" in config:
            yield "its weights are quantised, by another scheme than GGUF's; fuse it with quantized='dequantize' first"
        missing = [name for name in _NEEDED if config.get(name) is None]
        if missing:
            yield f"config.json lacks {', '.join(missing)}"
            return
        if "model.embed_tokens.weight" not in self.shapes:
            yield "it has no weight model.embed_tokens.weight"
        if rope["rope_type"] not in _ROPE_KINDS or (rope["rope_type"] == "llama3" and not self.architecture.permuted):
            yield f"its rotary embedding is scaled by {rope['rope_type']!r}; known here: {', '.join(_ROPE_KINDS)} (for llama)"
        elif rope["rope_type"] != "none" and "factor" not in rope:
            yield f"its rotary embedding is scaled by {rope['rope_type']!r}, but config.json names no factor"
        if self.model_type != "phi3" and config.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"partial_rotary_factor is {config['partial_rotary_factor']}"
        activation = config.get("hidden_activation") or config.get("hidden_act")
        if activation not in self.architecture.activations:
            yield f"its activation is {activation!r}"
        yield from self._window_problems()
        if self.model_type in _WINDOW_PERIODS:
            largest = {"gemma2": 46, "gemma3_text": 62}[
                self.model_type
            ]  # its scale is the width's; llama.cpp knows it by its layers
            divisor = config["hidden_size"] // self.heads if self.layers == largest else self.head_size
            scalar = config.get("query_pre_attn_scalar")
            if scalar != divisor:
                yield f"query_pre_attn_scalar is {scalar or 'not given'}, where llama.cpp has {divisor} built in"

    def _window_problems(self) -> Iterator[str]:
        config, period = self.config, _WINDOW_PERIODS.get(self.model_type)
        kinds = config.get("layer_types")
        if period is None:
            if config.get("use_sliding_window") or (kinds and "sliding_attention" in kinds):
                yield f"some of its layers see a window of tokens only, which GGUF's {self.architecture.name!r} cannot say"
            return
        built_in = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(self.layers)]
        if (kinds and kinds != built_in) or config.get("sliding_window_pattern", period) != period:
            yield f"other layers than every {period}. see all tokens, which is built into llama.cpp"


def _model_name(out: Path, model: GgufModel, tokenizer: GgufTokenizer) -> str:
    """The model's name: its file's, but that llama.cpp takes what is called phi-3 for Microsoft's and looks for its tokens."""
    called = any(each in out.stem.lower() for each in ("phi-3", "phi3"))
    has_tokens = {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= {*tokenizer.tokens}
    if model.model_type == "phi3" and has_tokens:
        return out.stem if called else f"phi-3 {out.stem}"
    return "fine-tuned model" if called and not has_tokens else out.stem


def _add_metadata(writer: GGUFWriter, model: GgufModel, name: str, kind: Kind) -> None:
    import gguf

    config, rope = model.config, model.rope
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.key_value_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(model.rows)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(model.head_size * config.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if model.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(model.local_theta)
    if model.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.get("original_max_position_embeddings") or config["max_position_embeddings"])
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if model.model_type in _WINDOW_PERIODS:
        writer.add_sliding_window(config.get("sliding_window") or {"gemma2": 4096, "gemma3_text": 512}[model.model_type])
    if model.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.get("attn_logit_softcapping") or 50.0)
        writer.add_final_logit_softcapping(config.get("final_logit_softcapping") or 30.0)


def _write(writer: GGUFWriter, path: Path, tensors: list[_Tensor], model: GgufModel) -> None:
    import gguf

    Types = gguf.GGMLQuantizationType
    for tensor in tensors:
        dtype = {Types.F32: np.float32, Types.F16: np.float16, Types.Q8_0: np.uint8}[tensor.kind]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind) if tensor.kind == Types.Q8_0 else tensor.shape
        size = math.prod(shape) * np.dtype(dtype).itemsize
        writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), size, raw_dtype=tensor.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, values in model.values(tensors):
        if not np.isfinite(values).all() or (
            tensor.kind != Types.F32 and np.abs(values).max(initial=0) > np.finfo(np.float16).max
        ):
            raise UserError(
                f"The weight {tensor.stored} has values that are not finite in half precision; GGUF cannot hold them."
            )
        writer.write_tensor_data(np.ascontiguousarray(gguf.quantize(np.ascontiguousarray(values), tensor.kind)))


def _check_written(path: Path, tensors: list[_Tensor], tokenizer: GgufTokenizer) -> None:
    """Read a finished file's table of tensors and its vocabulary back; RuntimeError where it is not what was to be written."""
    import gguf

    reader = gguf.GGUFReader(path)
    found = {each.name: (tuple(int(size) for size in reversed(each.shape)), each.tensor_type) for each in reader.tensors}
    keys = gguf.Keys.Tokenizer
    names = {"bos": keys.BOS_ID, "eos": keys.EOS_ID, "eot": keys.EOT_ID, "unk": keys.UNK_ID, "pad": keys.PAD_ID}
    wanted: dict[str, Any] = {
        "tokenizer.ggml.model": tokenizer.model, "tokenizer.ggml.pre": tokenizer.pre, "tokenizer.ggml.tokens": tokenizer.tokens,
        "tokenizer.ggml.token_type": tokenizer.types, "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        **({"tokenizer.ggml.merges": tokenizer.merges} if tokenizer.merges is not None else {}),
        **{names[each]: number for each, number in tokenizer.special_ids.items()},
    }  # fmt: skip
    same = all(name in reader.fields and reader.fields[name].contents() == value for name, value in wanted.items())
    if found != {each.name: (each.shape, each.kind) for each in tensors} or not same:
        raise RuntimeError(f"{path} does not hold what was written into it")


def _check_out(out: Path) -> None:
    if out.suffix != ".gguf" or out.is_dir():
        raise UserError(f"out={str(out)!r}: expected the path of a file that ends in .gguf.")
    if out.exists():
        with out.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{out} is there and is no GGUF file. Name another file.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_OF_NAMES} more" if len(names) > MOST_OF_NAMES else ""
    return f"{', '.join(names[:MOST_OF_NAMES])}{more}"

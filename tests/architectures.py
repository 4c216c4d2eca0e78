"""Tiny random models of many architectures of mlx-lm, as Hugging Face directories that `mlx_lm.utils.load` reads.

Every matrix that can be quantised has a last axis that is a multiple of 64, so group sizes 32 and 64 both divide it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model

from finetune_dataflow.engine.randomness import seeded
from tests.tiny_model import END_OF_TEXT, IM_END, IM_START, write_tiny_model

VOCABULARY = 259  # the bytes and three control tokens
PADDED_VOCABULARY = 320  # as many checkpoints have it: rows that no token names
WINDOW = 8  # tokens a sliding-window layer looks at, its own included
CONTROL_TOKENS = {"bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": END_OF_TEXT}

Config = dict[str, Any]


def _transformer(model_type: str, layers: int, hidden_size: int, **others: Any) -> Config:
    """The fields that most configurations share, then `others`: four heads, two of them for keys and values."""
    return {
        "model_type": model_type, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden_size, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": hidden_size // 4, "vocab_size": VOCABULARY, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, **CONTROL_TOKENS,
        **others,
    }  # fmt: skip


def _llama(layers: int, hidden_size: int) -> Config:
    return _transformer("llama", layers, hidden_size, tie_word_embeddings=True)


def _llama_untied(layers: int, hidden_size: int) -> Config:
    return _transformer("llama", layers, hidden_size, tie_word_embeddings=False)


def _mistral(layers: int, hidden_size: int) -> Config:
    """mlx-lm reads "mistral" as a llama, and takes a window only from layers said to slide; the last one sees everything."""
    kinds = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    window = {"layer_types": kinds, "sliding_window": WINDOW}
    return _transformer("mistral", layers, hidden_size, tie_word_embeddings=False, **window)


def _ministral3(layers: int, hidden_size: int) -> Config:
    """Windows as in mistral; its layers take an array of attention scales before the mask."""
    rope = {"rope_theta": 10000.0, "rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
    config = _mistral(layers, hidden_size)
    return {**config, "model_type": "ministral3", "rope_parameters": rope}


def _phi(layers: int, hidden_size: int) -> Config:
    return _transformer("phi", layers, hidden_size, partial_rotary_factor=0.5, vocab_size=PADDED_VOCABULARY)


def _phi3(layers: int, hidden_size: int) -> Config:
    return _transformer("phi3", layers, hidden_size, original_max_position_embeddings=512)


def _mixtral(layers: int, hidden_size: int) -> Config:
    return _transformer("mixtral", layers, hidden_size, num_local_experts=4, num_experts_per_tok=2)


def _qwen2(layers: int, hidden_size: int) -> Config:
    return _transformer("qwen2", layers, hidden_size, tie_word_embeddings=True, vocab_size=PADDED_VOCABULARY)


def _qwen3(layers: int, hidden_size: int) -> Config:
    return _transformer("qwen3", layers, hidden_size, tie_word_embeddings=True, vocab_size=PADDED_VOCABULARY)


def _experts(hidden_size: int) -> Config:
    return {
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": hidden_size, "norm_topk_prob": True, "vocab_size": PADDED_VOCABULARY,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen3_moe(layers: int, hidden_size: int) -> Config:
    return _transformer("qwen3_moe", layers, hidden_size, **_experts(hidden_size))


def _qwen3_next(layers: int, hidden_size: int) -> Config:
    """Gated delta layers, every second one full attention instead; a mixture of experts with a shared one."""
    delta = {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": hidden_size // 4,
        "linear_value_head_dim": hidden_size // 4, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
        "shared_expert_intermediate_size": hidden_size, "full_attention_interval": min(2, layers),
    }  # fmt: skip
    return _transformer("qwen3_next", layers, hidden_size, **_experts(hidden_size), **delta)


def _gemma(layers: int, hidden_size: int) -> Config:
    return _transformer("gemma", layers, hidden_size, num_key_value_heads=1, head_dim=hidden_size // 2)


def _gemma2(layers: int, hidden_size: int) -> Config:
    """Both soft caps small enough that they bend the scores."""
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
    return _transformer("gemma2", layers, hidden_size, **caps)


def _gemma3_text(layers: int, hidden_size: int) -> Config:
    """A sliding window on all layers but every second one."""
    window = {"sliding_window": WINDOW, "sliding_window_pattern": min(2, layers), "query_pre_attn_scalar": 16}
    return _transformer("gemma3_text", layers, hidden_size, **window)


def _gemma4_text(layers: int, hidden_size: int) -> Config:
    """Layers that give a tuple; those after the second take their keys and values from an earlier one of their kind."""
    kinds = ["sliding_attention" if (layers - n) % 2 == 0 else "full_attention" for n in range(layers)]
    others = {
        "layer_types": kinds, "sliding_window": WINDOW, "num_kv_shared_layers": max(0, layers - 2),
        "global_head_dim": hidden_size // 2, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": hidden_size, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
    }  # fmt: skip
    return _transformer("gemma4_text", layers, hidden_size, **others)


def _cohere(layers: int, hidden_size: int) -> Config:
    return _transformer("cohere", layers, hidden_size, logit_scale=0.25)


def _olmo2(layers: int, hidden_size: int) -> Config:
    """Stands for OLMo, too, whose first version mlx-lm reads with the package hf_olmo only."""
    return _transformer("olmo2", layers, hidden_size, tie_word_embeddings=False)


def _mamba2(layers: int, hidden_size: int) -> Config:
    """A state-space model: no attention, no positions."""
    return {
        "model_type": "mamba2", "hidden_size": hidden_size, "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden_size, "num_heads": 4, "head_dim": hidden_size // 2, "n_groups": 1,
        "state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, 100.0], "time_step_rank": "auto", "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        **CONTROL_TOKENS,
    }  # fmt: skip


def _granite(layers: int, hidden_size: int) -> Config:
    """Four multipliers, none of them one."""
    multipliers = {
        "logits_scaling": 2.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    }  # fmt: skip
    return _transformer("granite", layers, hidden_size, tie_word_embeddings=True, **multipliers)


def _stablelm(layers: int, hidden_size: int) -> Config:
    return _transformer("stablelm", layers, hidden_size, use_qkv_bias=True, partial_rotary_factor=0.25)


def _gpt2(layers: int, hidden_size: int) -> Config:
    """Learned positions, fused projections, and names of its own: `h` for the layers, `wte` for the embedding."""
    return {
        "model_type": "gpt2", "n_ctx": 512, "n_embd": hidden_size, "n_head": 4, "n_layer": layers, "n_positions": 512,
        "layer_norm_epsilon": 1e-5, "vocab_size": VOCABULARY, **CONTROL_TOKENS,
    }  # fmt: skip


def _openelm(layers: int, hidden_size: int) -> Config:
    """Every layer has its own width."""
    return {
        "model_type": "openelm", "model_dim": hidden_size, "num_transformer_layers": layers, "head_dim": hidden_size // 4,
        "num_query_heads": [4 * (1 + layer % 2) for layer in range(layers)], "num_kv_heads": [2] * layers,
        "ffn_multipliers": [1.0 + layer % 3 for layer in range(layers)], "ffn_dim_divisor": 64, "vocab_size": VOCABULARY,
        **CONTROL_TOKENS,
    }  # fmt: skip


_CONFIGS: dict[str, Callable[[int, int], Config]] = {
    "llama": _llama,
    "llama_untied": _llama_untied,
    "mistral": _mistral,
    "ministral3": _ministral3,
    "phi": _phi,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma4_text": _gemma4_text,
    "cohere": _cohere,
    "olmo2": _olmo2,
    "mamba2": _mamba2,
    "granite": _granite,
    "stablelm": _stablelm,
    "gpt2": _gpt2,
    "openelm": _openelm,
}
ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)
MIXTURES_OF_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_next")


def write_architecture(directory: Path, name: str, *, layers: int = 3, hidden_size: int = 64, seed: int = 0) -> Path:
    """Write the model `name` as a Hugging Face directory: config.json, model.safetensors, the byte tokenizer.

    hidden_size is a multiple of 64. Equal arguments give equal bytes. KeyError for a name that is not in ARCHITECTURES.
    """
    config = _CONFIGS[name](layers, hidden_size)
    write_tiny_model(directory, layers=1)  # for its tokenizer: what else it writes is replaced
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    with seeded(seed):
        model, _ = load_model(directory, lazy=True, strict=False)  # without weights: the constructor's
        parameters = tree_map(_not_constant, model.parameters())
        mx.eval(parameters)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(parameters)), {"format": "pt"})
    return directory


def _not_constant(weight: mx.array) -> mx.array:
    """Noise on a parameter that is made constant (norms, biases, gates), so that it takes part in what is compared."""
    constant = bool(mx.all(weight == weight.reshape(-1)[0]))
    return weight + 0.1 * mx.random.normal(weight.shape) if constant else weight

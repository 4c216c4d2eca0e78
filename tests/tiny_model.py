"""A random llama of two layers with a tokenizer whose ids are bytes: id 65 is "A", the control tokens follow at 256."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from finetune_dataflow.engine.randomness import seeded

END_OF_TEXT, IM_START, IM_END = 256, 257, 258

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Byte-level, without merges: one id a byte, its value."""
    # GPT-2's printable stand-ins for the bytes, in the order of the bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def write_tiny_model(
    directory: Path, *, layers: int = 2, hidden_size: int = 32, seed: int = 0, template: str | None = CHATML
) -> Path:
    """Write the model as a Hugging Face directory: config.json, model.safetensors, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama", "hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 259,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": IM_END,
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    with seeded(seed):
        model = llama.Model(llama.ModelArgs.from_dict(config))
        mx.eval(model.parameters())
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if template is not None:
        tokenizer_config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


def chatml_ids(user: str) -> list[int]:
    """The prompt's ids as a person would write them down."""
    return [IM_START, *b"user\n", *user.encode(), IM_END, *b"\n", IM_START, *b"assistant\n"]

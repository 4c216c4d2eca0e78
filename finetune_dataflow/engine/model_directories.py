"""Complete model directories written here: a base model quantised, a fully fine-tuned model."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model as load_base_model
from mlx_lm.utils import quantize_model, save_config, save_model

from finetune_dataflow.engine.adapters import adapter_fingerprint
from finetune_dataflow.engine.files import flush_tree, write_json, writing
from finetune_dataflow.engine.model_source import MODEL_FILES, model_fingerprint
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import QuantizationSettings
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

MADE_OF = "made_of.json"  # written last: its presence says that the directory is whole, its content what it was made of


def quantized_model(base_model_path: Path, settings: QuantizationSettings) -> Path:
    """The directory of the base model with its weights quantised, made once in the user's cache.

    Raises UserError where the model is quantised already or has no layer that can be.
    """
    bits, group_size = settings.quantize_bits, settings.quantize_group_size
    if bits == 0:
        return base_model_path
    content = model_fingerprint(base_model_path)
    directory = user_cache_directory() / "models" / f"{base_model_path.name}-{content[:12]}-{bits}bit-{group_size}"
    made_of = {"base_model": content, "bits": bits, "group_size": group_size}
    if is_made_of(directory, made_of):
        return directory
    config = json.loads((base_model_path / "config.json").read_text(encoding="utf-8"))
    if "quantization" in config or "quantization_config" in config:
        raise UserError(f"quantize_bits={bits}: the model in {base_model_path} is quantised already. Leave quantize_bits out.")
    logger.info("Quantising %s to %d bits (once).", base_model_path, bits)
    model, config = load_base_model(base_model_path, lazy=True, trust_remote_code=False)
    model, config = quantize_model(model, config, group_size, bits)
    if not any(isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for _, module in model.named_modules()):
        raise UserError(
            f"quantize_group_size={group_size}: no layer of the model in {base_model_path} has a width that is a multiple of it. "
            "Expected 32, 64 or 128."
        )
    return write_model(directory, model, config, base_model_path, made_of)


def complete_model(base_model_path: Path, adapter_path: Path, directory: Path) -> Path:
    """The fully fine-tuned model as a directory of its own: every weight, config, tokenizer."""
    made_of = {"base_model": model_fingerprint(base_model_path), "adapter": adapter_fingerprint(adapter_path)}
    if is_made_of(directory, made_of):
        return directory
    config = json.loads((base_model_path / "config.json").read_text(encoding="utf-8"))
    return write_model(directory, load_model(base_model_path, adapter_path), config, base_model_path, made_of)


def is_made_of(directory: Path, made_of: Mapping[str, object]) -> bool:
    """Whether `directory` is a whole model made of exactly this."""
    try:
        return bool(json.loads((directory / MADE_OF).read_text(encoding="utf-8")) == made_of)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False


def write_model(
    directory: Path, model: nn.Module, config: Mapping[str, object], source: Path, made_of: Mapping[str, object]
) -> Path:
    """Write weights, config and the source's other files as `directory`, whole or not at all."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(directory):
            temporary.mkdir(parents=True)
            mx.eval(model.parameters())
            save_model(temporary, model, donate_model=True)
            save_config(dict(config), config_path=temporary / "config.json")
            for path in {each for pattern in MODEL_FILES for each in source.glob(pattern)}:
                if path.suffix != ".safetensors" and not path.name.startswith(("model.", "config.json")):
                    shutil.copyfile(path, temporary / path.name)
            write_json(temporary / MADE_OF, made_of)
            flush_tree(temporary)
            if (directory / MADE_OF).is_file():
                shutil.rmtree(directory)
            elif directory.exists():
                raise UserError(
                    f"{directory} is not a directory that this project wrote. Move it, or name another output directory."
                )
            temporary.rename(directory)
    except RuntimeError as error:  # MLX's own writer
        raise UserError(f"{directory} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory

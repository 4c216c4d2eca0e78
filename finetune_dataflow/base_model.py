"""From a model's name to a directory of weights, tokenizer and settings on this machine."""

from __future__ import annotations

from pathlib import Path

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.embedded_model import EMBEDDED_MODEL_ID, embedded_model_directory
from finetune_dataflow.engine.settings import QuantizationSettings


def base_model_name(model_id: str = EMBEDDED_MODEL_ID) -> str:
    """The name of the base model, as given.

    Inputs:
        model_id: The base model: a local directory (MLX or Hugging Face safetensors), a .gguf file, a hub repository
            (owner/name), or smollm2-135m-instruct, the embedded default.
    """
    return model_id


def quantization_settings(quantize_bits: int = 0, quantize_group_size: int = 64) -> QuantizationSettings:
    """Whether the base model is quantised on loading, as QLoRA has it.

    Inputs:
        quantize_bits: Bits a weight of the base model is quantised to: 4 or 8; 0 for as it is.
        quantize_group_size: How many weights share one scale there: 32, 64 or 128.
    """
    return QuantizationSettings(quantize_bits, quantize_group_size)


@computed_anew
def base_model_path(base_model_name: str, quantization_settings: QuantizationSettings) -> Path:
    """The directory of the base model on this machine: config.json, safetensors weights, tokenizer.

    Raises UserError where it has no weights, is no decoder-only language model, or cannot be found.
    """
    embedded = base_model_name == EMBEDDED_MODEL_ID
    directory = embedded_model_directory() if embedded else engine.model_source.model_directory(base_model_name)
    return engine.model_directories.quantized_model(directory, quantization_settings)


def base_model_fingerprint(base_model_path: Path) -> str:
    """The SHA-256 of the base model's weights, settings and tokenizer files."""
    return engine.model_source.model_fingerprint(base_model_path)

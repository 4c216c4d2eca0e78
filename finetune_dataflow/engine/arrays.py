"""Named arrays in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from finetune_dataflow.engine.files import replacing


def write_arrays(path: Path, arrays: Mapping[str, mx.array]) -> Path:
    """Write the arrays, whole or not at all. Raises UserError where the disk is full.

    Through an open file, because MLX tells the system's reason for a failure only then.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        mx.save_safetensors(file, dict(arrays), {"format": "mlx"})
    return path


def is_whole(path: Path) -> bool:
    """Whether the file is there, is safetensors, and is as long as its header says."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False

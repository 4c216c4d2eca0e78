"""`run.py convert`: weights from NumPy's file format to safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune_dataflow import engine
from finetune_dataflow.errors import UserError


def convert(arguments: Sequence[str]) -> int:
    """Write the arrays of one .npz file as safetensors, unchanged."""
    if len(arguments) != 2:
        raise UserError("convert takes two files: run.py convert ADAPTERS.npz ADAPTERS.safetensors")
    source, target = (engine.files.user_path(each) for each in arguments)
    if not source.is_file():
        raise UserError(f"There is no file {source}.")
    for path, suffix in ((source, ".npz"), (target, ".safetensors")):
        if path.suffix != suffix:
            raise UserError(f"{path}: expected a {suffix} file.")
    written: Path = engine.starting_weights.convert(source, target)
    print(f"Wrote {written}.")
    return 0

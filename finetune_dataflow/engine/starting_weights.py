"""Weights that a fit starts from: an adapter's file of an earlier run, mlx-lm's or ours, checked before they are taken."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from finetune_dataflow.engine import peft_config
from finetune_dataflow.engine.arrays import write_arrays
from finetune_dataflow.engine.files import fingerprint, user_path
from finetune_dataflow.engine.fit_settings import MethodSettings
from finetune_dataflow.engine.path_contents import path_fingerprint
from finetune_dataflow.errors import UserError, nearest

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
SUFFIXES = (".safetensors", ".npz")


def located(resume_adapter_file: str) -> Path | None:
    """The file that `resume_adapter_file` names, in a directory the adapter's; None where nothing is named.

    Raises UserError where there is no such file, or one of another kind.
    """
    if not resume_adapter_file:
        return None
    path = user_path(resume_adapter_file)
    if path.is_dir():
        path = path / (peft_config.WEIGHTS if peft_config.is_peft(path) else WEIGHTS)
    if path.name == peft_config.WEIGHTS:
        peft_config.check_peft(path.parent)
    if not path.is_file():
        raise UserError(f"resume_adapter_file={resume_adapter_file!r}: there is no file {path}.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"resume_adapter_file={resume_adapter_file!r}: expected a .safetensors or .npz file, found {path.name}.")
    return path


def named(path: Path | None) -> dict[str, str]:
    """The weights' path under the name of its input; empty for None."""
    return {} if path is None else {"resume_adapter_file": str(path)}


def fingerprints(path: Path | None) -> dict[str, str]:
    """The fingerprint of the weights under a name of its own; empty for None."""
    if path is None:
        return {}
    content = path_fingerprint(path)
    if path.name == peft_config.WEIGHTS:  # its numbers depend on what its config says of ranks and alphas
        content = fingerprint([content, path_fingerprint(path.with_name(peft_config.CONFIG))])
    return {"starting_weights": content}


def read_weights(path: Path) -> dict[str, mx.array]:
    """The arrays of a .safetensors or .npz file by name; no pickle is ever read.

    Raises UserError where the file is cut short or is something else.
    """
    try:
        if path.suffix == ".npz" and not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        weights = mx.load(str(path))
        if not isinstance(weights, dict) or not weights:
            raise ValueError("no named arrays in it")
        mx.eval(weights)
        odd = [
            name for name, each in weights.items() if not mx.issubdtype(each.dtype, mx.floating) or not mx.isfinite(each).all()
        ]
        if odd:
            raise ValueError(f"{odd[0]} holds values that are no finite numbers, or whole ones")
    except (ValueError, RuntimeError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as weights: {error}. It may have been cut short.") from error
    return weights


def check_base(path: Path, base_model_fingerprint: str) -> None:
    """Raise UserError where the adapter beside which the file lies says that it was made for another base model."""
    beside = path.with_name(CONFIG)
    if not beside.is_file():
        return
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        made_for = config.get("fingerprints", {}).get("base_model", base_model_fingerprint)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return
    if made_for != base_model_fingerprint:
        raise UserError(
            f"resume_adapter_file={str(path)!r} was made for another model: {config.get('model')}, whose files are not those of "
            "the model in model_id. Name the model it was made for, or other weights."
        )


def start_from(model: nn.Module, path: Path, settings: MethodSettings) -> None:
    """Put the weights in `path` on the model's trainable parameters, all of them and nothing else.

    Raises UserError naming the first that is missing, too many, or of another shape, or where the config beside the weights
    says that they were trained by another method or under another scale.
    """
    _check_method(path, settings)
    weights = read_weights(path)
    trainable = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters())))
    problems = [
        f"{name} is no parameter that this fit trains.{nearest(name, trainable)}" for name in weights if name not in trainable
    ]
    problems += [f"{name} is missing." for name in trainable if name not in weights]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)}, expected {tuple(each.shape)}."
        for name, each in trainable.items()
        if name in weights and weights[name].shape != each.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"The weights in {path} do not fit this fit: {problems[0]}{more} They belong to another model, or to other settings "
            "of fine_tune_type, num_layers, lora_rank or lora_keys."
        )
    model.load_weights([(name, each.astype(trainable[name].dtype)) for name, each in weights.items()], strict=False)
    mx.eval(model.trainable_parameters())


def _check_method(path: Path, settings: MethodSettings) -> None:
    try:
        there = json.loads(path.with_name(CONFIG).read_text(encoding="utf-8"))
        scale = (there.get("lora_parameters") or {}).get("scale")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return
    full = settings.fine_tune_type == "full"
    if there.get("fine_tune_type", "lora") != settings.fine_tune_type or not (full or scale in (None, settings.effective_scale)):
        raise UserError(
            f"resume_adapter_file={str(path)!r} was trained with fine_tune_type={there.get('fine_tune_type', 'lora')!r} and a "
            f"scale of {scale}; this fit has {settings.fine_tune_type!r} and {settings.effective_scale}. Give it the same."
        )


def convert(source: Path, target: Path) -> Path:
    """Write the weights of a .npz file as safetensors, bit for bit, whole or not at all."""
    weights = read_weights(source)
    return write_arrays(target, weights)

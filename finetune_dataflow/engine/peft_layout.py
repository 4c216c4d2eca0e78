"""Adapters in PEFT's layout, both ways: ours written for PEFT and transformers, and PEFT's read as ours.

The two libraries have the same matrices, one the other's transposed: lora_a (in, rank) is lora_A (rank, in). mlx-lm has one rank
and one scale for an adapter, PEFT a rank and an alpha for each layer; the factor on a layer's output is mlx-lm's scale and PEFT's
alpha / rank, or with rsLoRA alpha / sqrt(rank).
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune_dataflow.engine import adapters
from finetune_dataflow.engine.arrays import is_whole, write_arrays
from finetune_dataflow.engine.files import content_fingerprint, fingerprint, replacing, write_json, writing
from finetune_dataflow.engine.model_source import model_fingerprint
from finetune_dataflow.engine.peft_config import CONFIG, WEIGHTS, is_peft, read_settings, written
from finetune_dataflow.engine.peft_matrices import common
from finetune_dataflow.engine.peft_names import base_layers
from finetune_dataflow.engine.peft_reading import changes_of, check_copies, modules_of
from finetune_dataflow.engine.peft_writing import base_name_of, config_to_write, fitting, named
from finetune_dataflow.engine.user_cache import user_cache_directory

logger = logging.getLogger(__name__)

VERSION = 1  # of how a PEFT adapter is read
PREFIX = "base_model.model."
CONV1D = frozenset({"gpt2"})  # their linear layers are transformers' Conv1D, which hold their weights transposed


def write_peft(adapter: Path, base: Path, out: Path, *, base_name: str = "") -> Path:
    """Write an adapter of mlx-lm's layout as one of PEFT's for the transformers model of the same base; returns `out`.

    The numbers and their precision stay. target_modules names the adapted layers in full, so that no other matches. base_name:
    what PEFT is to load as base_model_name_or_path; the hub's name of the base where it has one, else its directory.

    Raises UserError for a full fine-tune, for an adapter that does not fit the base, for a layer that PEFT cannot adapt, and
    where `out` is a file or an adapter of mlx-lm's.
    """
    config = config_to_write(adapter, out)
    layers = base_layers(base)
    if layers.quantized:
        logger.warning(
            "The base model in %s is quantised. PEFT puts the adapter on the model before it was: close to what was trained, "
            "but not the same.", base,
        )  # fmt: skip
    changes = fitting(adapter, config, layers)
    dora = config.get("fine_tune_type") == "dora"
    asked = config["lora_parameters"]
    theirs = named(changes, layers, dora=dora)
    tied = layers.tied_embedding is not None and layers.tied_embedding.name in changes
    described = written(
        rank=asked["rank"], scale=asked["scale"], rslora=asked.get("use_rslora"), dora=dora, dropout=asked.get("dropout", 0.0),
        base_model=base_name or base_name_of(base, config), modules=theirs.modules, parameters=theirs.parameters,
        doubled=theirs.doubled, tied=tied, transposed=layers.model_type in CONV1D,
    )  # fmt: skip
    with writing(out / CONFIG):
        (out / CONFIG).unlink(missing_ok=True)
    with replacing(out / WEIGHTS) as temporary, temporary.open("wb") as file:
        mx.save_safetensors(file, {PREFIX + name: mx.contiguous(each) for name, each in theirs.tensors.items()}, {"format": "pt"})
    _carry_used_inputs(adapter, out)
    write_json(out / CONFIG, described)
    return out


def read_peft(directory: Path, base: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The weights and the config by which mlx-lm computes on `base` what PEFT's adapter in `directory` does.

    Layers of a lower rank than the highest get directions of zeros. The scale is that of the most layers; into `lora_b` of the
    others goes the factor between the two, rounded once, to float32. lora_keys names layers of the last blocks by their names
    there, or where that would reach others, in full.

    Raises UserError for what mlx-lm has nothing like, for layers that the base lacks and for shapes that do not fit.
    """
    settings = read_settings(directory)
    layers = base_layers(base)
    modules, copies = modules_of(directory)
    check_copies(copies, layers, directory)
    changes = changes_of(modules, settings, layers, directory)
    weights, rank, scale = common(changes)
    keys, num_layers = layers.keys_of(changes)
    parameters = {"rank": rank, "scale": scale, "dropout": settings.dropout, "keys": keys}
    kind = "dora" if settings.dora else "lora"
    return weights, {
        "fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "model": settings.base_model,
    }  # fmt: skip


def as_mlx_adapter(directory: Path, base: Path, cache: Path) -> Path:
    """The directory in `cache` with PEFT's adapter in mlx-lm's layout, made once for this adapter and this base model."""
    files = [each for name in (WEIGHTS, CONFIG, adapters.USED_INPUTS) if (each := directory / name).is_file()]
    read_settings(directory)
    made_of = fingerprint([VERSION, content_fingerprint(files), model_fingerprint(base)])
    target = cache / f"{directory.resolve().name}-{made_of[:16]}"
    if not ((target / adapters.CONFIG).is_file() and is_whole(target / adapters.WEIGHTS)):
        weights, config = read_peft(directory, base)
        write_arrays(target / adapters.WEIGHTS, weights)
        _carry_used_inputs(directory, target)
        adapters.save_config(target, config)
    return target


def in_mlx_layout(adapter: Path, base: Path) -> Path:
    """The adapter's directory, or where it is in PEFT's layout, one in the user's cache with the same in mlx-lm's."""
    return as_mlx_adapter(adapter, base, user_cache_directory() / "adapters") if is_peft(adapter) else adapter


def weights_in_mlx_layout(weights: Path, base: Path) -> Path:
    """An adapter's file of weights, or where it is PEFT's, that of the same adapter in mlx-lm's layout."""
    of_peft = weights.name == WEIGHTS and is_peft(weights.parent)
    return in_mlx_layout(weights.parent, base) / adapters.WEIGHTS if of_peft else weights


def _carry_used_inputs(source: Path, target: Path) -> None:
    """What the fit has seen, for later evaluations: it lies beside the adapter in both layouts."""
    if (source / adapters.USED_INPUTS).is_file():
        with replacing(target / adapters.USED_INPUTS) as temporary:
            shutil.copyfile(source / adapters.USED_INPUTS, temporary)

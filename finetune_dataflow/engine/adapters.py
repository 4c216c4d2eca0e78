"""Adapters in mlx-lm's layout: `adapters.safetensors` and `adapter_config.json` in one directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters as load_mlx_lm_adapters

from finetune_dataflow.engine import peft_config
from finetune_dataflow.engine.arrays import write_arrays
from finetune_dataflow.engine.files import content_fingerprint, replacing, user_path, write_json, write_text
from finetune_dataflow.errors import UserError

WEIGHTS, CONFIG, USED_INPUTS = "adapters.safetensors", "adapter_config.json", "used_inputs.txt"


def save_weights(model: nn.Module, directory: Path) -> Path:
    """Write the trainable parameters, whole or not at all."""
    return write_arrays(directory / WEIGHTS, dict(tree_flatten(model.trainable_parameters())))


def save_config(directory: Path, config: dict[str, Any]) -> Path:
    """Write `adapter_config.json`, which mlx-lm reads to rebuild the layers."""
    return write_json(directory / CONFIG, config)


def check_adapter(adapter_path: Path) -> dict[str, Any]:
    """The adapter's config; UserError where the directory, its config or its weights are missing or unreadable.

    Of one in PEFT's layout, what mlx-lm's config would say before the base model is known.
    """
    if peft_config.is_peft(adapter_path):
        return peft_config.check_peft(adapter_path)
    if not adapter_path.is_dir():
        raise UserError(
            f"adapter_path={str(adapter_path)!r}: there is no such directory. Expected one with {WEIGHTS} and {CONFIG}."
        )
    missing = [name for name in (WEIGHTS, CONFIG) if not (adapter_path / name).is_file()]
    if missing:
        inside = adapter_path / "adapters"
        hint = f" Did you mean {str(inside)!r}?" if (inside / WEIGHTS).is_file() else ""
        raise UserError(f"The directory {adapter_path} holds no adapter: {' and '.join(missing)} missing.{hint}")
    try:
        config = json.loads((adapter_path / CONFIG).read_text(encoding="utf-8"))
        expected: dict[str, Any] = {"num_layers": int}
        found = {"num_layers": config["num_layers"]}
        if config.get("fine_tune_type") != "full":
            expected, found = {**expected, "rank": int, "scale": int | float}, {**found, **config["lora_parameters"]}
        wrong = [name for name, kind in expected.items() if not isinstance(found[name], kind)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{adapter_path / CONFIG} is no adapter config of mlx-lm's: {error!r}.") from error
    if wrong:
        raise UserError(f"{adapter_path / CONFIG} is no adapter config of mlx-lm's: {wrong[0]} is {found[wrong[0]]!r}.")
    return dict(config)


def apply_adapter(model: nn.Module, adapter_path: Path, base_model_path: Path) -> None:
    """Put the adapter's layers and weights on `model`; UserError where they belong to another model."""
    config = check_adapter(adapter_path)
    try:
        load_mlx_lm_adapters(model, str(adapter_path))
        missing = expected_parameters(model, config) - set(mx.load(str(adapter_path / WEIGHTS)))
        if missing:
            raise ValueError(f"Missing: {min(missing)} (and {len(missing) - 1} more)")
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        made_for = config.get("model", "an unknown model")
        raise UserError(
            f"The adapter in {adapter_path} does not fit the model in {base_model_path}; it was made for {made_for}. "
            f"{_first_problem(error)}"
        ) from error


def expected_parameters(model: nn.Module, config: dict[str, Any]) -> set[str]:
    """The names that the adapter's weights must have: what LoRA adds, or, of a full fine-tune, all of its blocks."""
    if config.get("fine_tune_type") != "full":
        return adapter_parameters(model)
    blocks = {id(block) for block in model.layers[-max(int(config["num_layers"]), 0) :]}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in blocks)
    named = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return {name for name, _ in named if name.startswith(prefixes)}


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that an adapter adds to a model."""
    named = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return {name for name, _ in named if name.rpartition(".")[2] in {"lora_a", "lora_b", "m"}}


def _first_problem(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return f"{lines[1] if len(lines) > 1 else lines[0]}{more}"


def save_used_inputs(directory: Path, used: frozenset[str] | None) -> Path | None:
    """Keep beside the adapter which inputs its fit used, as hashes, so that a later evaluation can tell what it has seen."""
    return None if used is None else write_text(directory / USED_INPUTS, "".join(f"{each}\n" for each in sorted(used)))


def used_inputs(adapter_path: Path) -> frozenset[str] | None:
    """The inputs, as hashes, that the adapter's fit used; None where it does not say."""
    path = adapter_path / USED_INPUTS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def copy_target(save_adapter_to: str, starting_weights: Path | None) -> Path | None:
    """The directory that `save_adapter_to` names; None where it is empty.

    Raises UserError where it is a file, belongs to a run, or holds the weights that the fit starts from.
    """
    if not save_adapter_to:
        return None
    directory = user_path(save_adapter_to)
    wrong = (
        "it is a file" if directory.exists() and not directory.is_dir()
        else "it belongs to the run beside it" if (directory.resolve().parent / "lineage.json").exists()
        else "the fit starts from the weights in it, and would be another run the next time"
        if starting_weights is not None and starting_weights.resolve().parent == directory.resolve()
        else ""
    )  # fmt: skip
    if wrong:
        raise UserError(f"save_adapter_to={save_adapter_to!r} cannot be written to, because {wrong}. Name another directory.")
    return directory


def copy_adapter(adapter_path: Path, directory: Path) -> Path:
    """The files of an adapter, copied into `directory`, each whole or not at all; what was there under their names goes."""
    for name in (CONFIG, USED_INPUTS, WEIGHTS):
        if (adapter_path / name).is_file():
            with replacing(directory / name) as temporary:
                shutil.copyfile(adapter_path / name, temporary)
    return directory


def adapter_fingerprint(adapter_path: Path) -> str:
    """SHA-256 over the adapter's weights and config, in mlx-lm's layout or PEFT's."""
    weights = peft_config.WEIGHTS if peft_config.is_peft(adapter_path) else WEIGHTS
    return content_fingerprint([adapter_path / weights, adapter_path / CONFIG])


def adapter_files(adapter_path: Path) -> dict[str, Path]:
    """The paths of an adapter: `adapter` (the directory), `config`, `weights`."""
    return {"adapter": adapter_path, "config": adapter_path / CONFIG, "weights": adapter_path / WEIGHTS}

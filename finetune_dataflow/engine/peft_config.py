"""PEFT's `adapter_config.json`: read and refused where mlx-lm has nothing like it, and written."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_dataflow.errors import UserError, nearest

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
OF_MLX_LM = "adapters.safetensors"  # whose config has the same name
OTHER_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # initialisations that change the base model's weights, too
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
TASKS = (None, "CAUSAL_LM")
LARGEST = 1e300  # of a number in a config
REFUSED = {
    "modules_to_save": "it replaces whole modules of the base model, for which an adapter of mlx-lm's has no place",
    "trainable_token_indices": "it replaces rows of the embedding, for which an adapter of mlx-lm's has no place",
    "lora_bias": "it adds a bias to every adapted layer, for which an adapter of mlx-lm's has no place",
    "layer_replication": "it repeats layers of the base model",
    "alora_invocation_tokens": "it acts on the tokens after its invocation alone, where mlx-lm's acts on all",
}
# What else a config says that changes no output: what the weights show anyway, and settings of the training.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "target_parameters",
})  # fmt: skip
READ = frozenset({
    "peft_type", "task_type", "init_lora_weights", "bias", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora",
})  # fmt: skip


@dataclass(frozen=True)
class PeftSettings:
    """What a LoRA config of PEFT's says of the numbers.

    The patterns are regular expressions of module names, and the rank or alpha of what they match. tied: the adapter of the
    embedding acts at the output, too, where the model ties the two. parameters: weights that are adapted by their own names.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    tied: bool
    base_model: str | None
    parameters: tuple[str, ...]

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """The rank that the module `name` has, and the factor on its output: alpha / rank, or alpha / sqrt(rank) (rsLoRA)."""
        rank = _of_pattern(self.rank_pattern, name, self.rank)
        scale = _of_pattern(self.alpha_pattern, name, self.alpha) / rank
        return rank, scale * math.sqrt(rank) if self.rslora else scale

    def adapts_parameter(self, name: str) -> bool:
        """Whether the config names this parameter, in whole or by its last parts."""
        return any(name == each or name.endswith(f".{each}") for each in self.parameters)


def is_peft(directory: Path) -> bool:
    """Whether an adapter's directory is in PEFT's layout, whole or not."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        config = None
    if isinstance(config, dict) and "peft_type" in config:
        return True
    named_so = any((directory / name).is_file() for name in (WEIGHTS, PICKLED))
    return named_so and not (directory / OF_MLX_LM).is_file()


def read_settings(directory: Path) -> PeftSettings:
    """What the directory's config says, checked; its weights are there, but have not been looked at.

    Raises UserError naming all that is missing, malformed or beyond mlx-lm.
    """
    _check_files(directory)
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no config of PEFT's: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config of PEFT's: it holds a {type(config).__name__}. Expected an object.")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={config.get('peft_type')!r} is no adapter that mlx-lm has. Expected 'LORA'.")
    problems = [*_malformed(config), *_beyond(config)]
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return PeftSettings(
        rank=config.get("r", 8), alpha=config.get("lora_alpha", 8), rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {}, rslora=config.get("use_rslora") or False,
        dora=config.get("use_dora") or False, dropout=config.get("lora_dropout") or 0.0,
        tied=bool(config.get("ensure_weight_tying")), base_model=config.get("base_model_name_or_path") or None,
        parameters=tuple(config.get("target_parameters") or ()),
    )  # fmt: skip


def check_peft(directory: Path) -> dict[str, Any]:
    """What can be said of an adapter in PEFT's layout before its base model is known, as mlx-lm's config says it.

    Raises UserError where it is not whole, or is beyond mlx-lm.
    """
    settings = read_settings(directory)
    scale = settings.rank_and_scale("")[1]
    return {
        "fine_tune_type": "dora" if settings.dora else "lora",
        "num_layers": 0,
        "lora_parameters": {"rank": settings.rank, "scale": scale, "dropout": settings.dropout},
        "model": settings.base_model,
    }


def written(
    *, rank: int, scale: float, rslora: bool | None, dora: bool, dropout: float, base_model: str, modules: list[str],
    parameters: list[str], doubled: list[str], tied: bool, transposed: bool,
) -> dict[str, Any]:  # fmt: skip
    """The config of an adapter whose layers all have this rank and scale, but those in `doubled` twice the rank.

    rslora: None where that is not known; then it is said where lora_alpha is a whole number only so. Keys that PEFT has had
    for a short time only are left out where they say nothing.
    """
    # With rsLoRA twice the rank would take alpha times the root of two; experts alone have twice the rank.
    alpha, rooted = _alpha(rank, scale, False if parameters else rslora)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0 if parameters else dropout, "target_modules": modules,
        "use_rslora": rooted, "use_dora": dora, "bias": "none", "fan_in_fan_out": transposed, "init_lora_weights": True,
        "modules_to_save": None, "rank_pattern": {re.escape(name): 2 * rank for name in doubled},
        "alpha_pattern": {re.escape(name): 2 * alpha for name in doubled}, "layers_to_transform": None,
        "layers_pattern": None, "auto_mapping": None, "revision": None,
    }  # fmt: skip
    return {
        **config,
        **({"target_parameters": parameters} if parameters else {}),
        **({"ensure_weight_tying": True} if tied else {}),
    }


def _alpha(rank: int, scale: float, rslora: bool | None) -> tuple[float, bool]:
    """lora_alpha, a whole number where it is one, and whether PEFT divides it by the root of the rank."""
    plain, rooted = _whole(scale * rank), _whole(scale * math.sqrt(rank))
    if rslora is None:
        rslora = isinstance(rooted, int) and not isinstance(plain, int)
    return (rooted, True) if rslora else (plain, False)


def _whole(value: float) -> float:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _of_pattern(patterns: Mapping[str, float], name: str, otherwise: float) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _check_files(directory: Path) -> None:
    if not (directory / CONFIG).is_file():
        raise UserError(f"The directory {directory} holds no whole adapter of PEFT's: {CONFIG} is missing.")
    if (directory / WEIGHTS).is_file():
        return
    pickled, weights = directory / PICKLED, directory / WEIGHTS
    if pickled.is_file():
        program = (
            "import sys, torch; from safetensors.torch import save_file; "
            "read = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
            "save_file({name: each.clone().contiguous() for name, each in read.items()}, sys.argv[2])"
        )
        raise UserError(
            f"{pickled} is a pickle, which can run any code when it is read, so it is not read. Convert it where torch is "
            f'installed:\npython -c "{program}" {shlex.quote(str(pickled))} {shlex.quote(str(weights))}'
        )
    raise UserError(f"The directory {directory} holds no whole adapter of PEFT's: {WEIGHTS} is missing.")


def _malformed(config: Mapping[str, Any]) -> Iterator[str]:
    for key, lowest, whole in (("r", 1, True), ("lora_alpha", -math.inf, False), ("lora_dropout", 0, False)):
        if key in config and not _is_number(config[key], lowest, whole) and not (key == "lora_dropout" and config[key] is None):
            yield f"{key}={config[key]!r} is not {'a whole number, 1 or more' if whole else 'a number that fits'}."
    if _is_number(config.get("lora_dropout", 0), 1, False):
        yield f"lora_dropout={config['lora_dropout']!r} is out of range. Expected a share from 0 to below 1."
    for key in ("use_rslora", "use_dora"):
        if config.get(key) not in (None, True, False):
            yield f"{key}={config[key]!r} is not true or false."
    for key, lowest, whole in (("rank_pattern", 1, True), ("alpha_pattern", -math.inf, False)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            yield f"{key}={patterns!r} is not an object of names and numbers."
            continue
        for name, value in patterns.items():
            if not _is_number(value, lowest, whole) or not _is_pattern(name):
                yield f"{key}: {name!r}: {value!r} is not a regular expression and its {'rank' if whole else 'alpha'}."
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(each, str) for each in parameters):
        yield f"target_parameters={parameters!r} is not a list of names."
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        yield f"base_model_name_or_path={base!r} is not a name."


def _beyond(config: Mapping[str, Any]) -> Iterator[str]:
    """What is well said but cannot be computed by an adapter of mlx-lm's on the base model."""
    if config.get("task_type") not in TASKS:
        yield f"task_type={config['task_type']!r} is another task than a language model's. Expected 'CAUSAL_LM'."
    if config.get("bias") not in (None, "none"):
        yield f"bias={config['bias']!r} trains biases of the base model, for which an adapter of mlx-lm's has no place."
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(OTHER_BASE):
        yield (
            f"init_lora_weights={start!r} changed the weights of the base model before the training, so the adapter fits no "
            "other. Let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion), or merge it."
        )
    elif not any(start is each or start == each for each in SAME_BASE):
        yield f"init_lora_weights={start!r} is not known here, and may have changed the weights of the base model."
    for key, value in config.items():
        if not value or key in READ or key in WITHOUT_EFFECT:
            continue
        why = REFUSED.get(key) or f"it is not known here what it does to the outputs.{nearest(key, READ | WITHOUT_EFFECT)}"
        yield f"{key}={_short(value)}: {why.removesuffix('.')}."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: object, lowest: float, whole: bool) -> bool:
    kind = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= LARGEST and value >= lowest


def _is_pattern(text: object) -> bool:
    try:
        re.compile(f"({text})$")
    except (re.error, RecursionError, OverflowError):
        return False
    return isinstance(text, str)

"""What of a run goes to a tracking service: figures under the names that dashboards know, settings, and no text of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_SENT = "(not sent)"
# Inputs whose text is a choice, a name, or a column of the data: it is told.
CHOICES = frozenset({
    "assistant_turns", "best_metric", "bleu_tokenizer", "context_key", "fine_tune_type", "fingerprints", "group_key",
    "input_text_key", "learning_schedule", "long_rows", "loom_language", "lora_keys", "lr_schedule", "near_duplicates",
    "object_format", "optimizer", "optimizer_config", "output_text_key", "project_name", "report_to", "row_shape", "start",
    "train_type",
})  # fmt: skip
# Inputs that are places: the name of the file or directory is told, not where it is.
PLACES = frozenset({
    "adapter_path", "data_path", "few_shot_file", "loom_file", "metrics", "model_id", "output_dir", "prompt_format",
    "resume_adapter_file", "save_adapter_to",
})  # fmt: skip
# Inputs that are texts of the user's: they stay here, as does the text of every input that is not known here.
TEXTS = frozenset({
    "build_prompt", "context_template", "input_template", "loom_markers", "prompt", "response_template", "run_name",
    "system_prompt",
})  # fmt: skip
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DIGEST = re.compile(r"[0-9a-f]{8,128}")

TRAINING = ("learning_rate", "gradient_norm", "tokens_per_second", "trained_tokens", "supervised_tokens")
SCORES, COMPARED = ("finetuned", "base"), ("difference", "intervals", "outcomes")  # of a comparison
VERDICT = ("mean", "low", "high", "p_value")  # of a difference
SAID = ("verdict", "device", "best_metric", "loss_path")  # texts of our own among the figures
FOR_SWEEPS = {
    "validation_loss": "loss", "validation_perplexity": "perplexity",
    **{name: name for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
}  # fmt: skip
BYTES_IN_A_GIGABYTE = 1e9  # mlx-lm's peak_memory


def shared_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are told: numbers as they are, of places the last part, of texts only that they are not sent."""
    return {name: _shared(name, value) for name, value in values.items()}


def logged(event: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
    """The step and the figures of an event of metrics.jsonl, under mlx-lm's names and our own; None where it has none.

    The step is the number of updates made, mlx-lm's iteration. Losses are in nats per supervised token, tokens_per_second is
    the mean since the fit began, peak_memory is in GB (1e9 bytes).
    """
    step, loss = event.get("step"), event.get("loss")
    if not isinstance(step, int) or not isinstance(loss, int | float):
        return None
    if event.get("event") == "train":
        found: dict[str, Any] = {"train_loss": loss, **{name: event.get(name) for name in TRAINING}}
        if _is_number(event.get("peak_memory_bytes")):
            found["peak_memory"] = event["peak_memory_bytes"] / BYTES_IN_A_GIGABYTE
    elif event.get("event") == "validation":
        further = {name: value for name, value in event.items() if name not in ("event", "step", "loss")}
        found = {"val_loss": loss, "validation_loss": loss, **further}
    else:
        return None
    return step, {"iteration": step, **{name: value for name, value in found.items() if _is_number(value)}}


def concluded(event: Mapping[str, Any]) -> dict[str, Any]:
    """What the event "end" says, for a summary: validation_loss is that of the adapter that is kept."""
    found = _flat({name: value for name, value in event.items() if name != "event"})
    kept = event.get("best_validation_loss")
    return {**found, "validation_loss": kept} if _is_number(kept) else found


def summarised(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for a summary, by names with slashes: of metrics.json, or of any names with numbers.

    The hold-out's scores are hold_out/finetuned/rougeL, hold_out/difference/rougeL/low, ...; the validation's begin with
    validation/, and those of the tuned model have the names of training_and_validation_set_metrics, too, which a sweep may
    ask for. Intervals of single scores, outcomes, and how the evaluation was made stay in metrics.json.
    """
    aside = (*SCORES, *COMPARED, "validation", "evaluation", "fit")
    found = _flat({name: value for name, value in metrics.items() if name not in aside or not isinstance(value, Mapping)})
    found |= _flat({name: _part(metrics, name) for name in SCORES}, "hold_out/")
    for name, difference in _part(metrics, "difference").items():
        found |= _flat({each: difference.get(each) for each in VERDICT}, f"hold_out/difference/{name}/")
    validation = _part(metrics, "validation")
    found |= _flat({name: _part(validation, name) for name in SCORES}, "validation/")
    tuned = _part(validation, "finetuned")
    found |= _flat({name: tuned.get(scored) for name, scored in FOR_SWEEPS.items()})
    return found | _flat({"train_loss": _part(metrics, "fit").get("train_loss")})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers, and texts of our own, by their names with the names above them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool) or _is_number(value) or (isinstance(value, str) and name in SAID):
            found[f"{prefix}{name}"] = value
    return found


def _shared(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float) or value == "":
        return value
    if isinstance(value, list | tuple):
        return [_shared(name, each) for each in value]
    if isinstance(value, Mapping) and name in CHOICES:
        return {str(key): _shared(name, each) for key, each in value.items()}
    if isinstance(value, str):
        if name in CHOICES or DIGEST.fullmatch(value):
            return value
        if name in PLACES:
            return value if name == "model_id" and _is_of_a_hub(value) else _last_part(value)
    return NOT_SENT


def _is_of_a_hub(text: str) -> bool:
    return HUB_NAME.fullmatch(text) is not None and not text.startswith(".") and not Path(text).exists()


def _last_part(text: str) -> str:
    """The name of a file, without where it is, and of a URL without what may be a key."""
    return re.split("[?#]", text)[0].rstrip("/").rpartition("/")[2].rpartition("@")[2]


def _part(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping under a name; an empty one where there is none."""
    found = metrics.get(name)
    return found if isinstance(found, Mapping) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

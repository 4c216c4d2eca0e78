"""The model card of an export: what it was made of, whether it is better than its base, and what of it the export keeps.

No text of the data stands in it. Front matter as the Hugging Face hub reads it.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from finetune_dataflow.engine.adapters import adapter_fingerprint
from finetune_dataflow.engine.comparison import score_lines
from finetune_dataflow.errors import UserError
from finetune_dataflow.exports.building import Built
from finetune_dataflow.exports.gate import Gate
from finetune_dataflow.exports.settings import ExportSettings, GateSettings

LIBRARIES = {"fused": "transformers", "peft": "peft", "gguf": "gguf", "gguf-lora": "gguf", "ollama": "gguf"}
EMBEDDED_LICENCE = "apache-2.0"  # of SmolLM2-135M-Instruct, as its authors give it
UNKNOWN = "unknown"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_SETTINGS = (
    "fine_tune_type", "num_layers", "lora_rank", "lora_scale", "learning_rate", "epochs", "iters", "batch_size", "max_seq_length",
    "mask_prompt", "random_state",
)  # fmt: skip


@dataclass(frozen=True)
class Lineage:
    """What an export was made of, and what is known of it.

    base_name: as the run was told it. fingerprints: of the base model, the adapter and the data. run: lineage.json of the
    adapter's run, metrics: its metrics.json; empty where the adapter lies in none.
    """

    base_name: str
    fingerprints: dict[str, str]
    run: dict[str, Any]
    metrics: dict[str, Any]
    licence: str
    licence_given: bool = False


def run_files(adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """lineage.json and metrics.json of the run that the adapter is of; empty where it is of none, or of another by now."""
    found = []
    for name in ("lineage.json", "metrics.json"):
        try:
            read = json.loads((adapter.resolve().parent / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return {}, {}
        found.append(read if isinstance(read, dict) else {})
    same = found[0].get("adapter") == adapter_fingerprint(adapter)
    return (found[0], found[1]) if same else ({}, {})


def check_licence(given: str) -> None:
    """Raise UserError for what is no identifier."""
    if given and not _LICENCE.fullmatch(given):
        raise UserError(f"license={given!r}: expected an identifier such as apache-2.0, mit or llama3.2.")


def licence(given: str, base: Path, embedded: bool) -> str:
    """The licence as it was given, else the base model's by its own card; `UNKNOWN` where that does not say."""
    if given:
        return given
    if embedded:
        return EMBEDDED_LICENCE
    try:
        text = (base / "README.md").read_text(encoding="utf-8")
        said = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found = str((said or {}).get("license") or "")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError, AttributeError):
        found = ""
    return found if _LICENCE.fullmatch(found) else UNKNOWN


def model_card(settings: ExportSettings, lineage: Lineage, gate: Gate, built: Built) -> str:
    """The card, in Markdown."""
    parts = [
        _front_matter(settings, lineage),
        f"# {_plain(settings.out.name)}",
        f"{_kind(settings)}, made from {_code(lineage.base_name)} and a fine-tuned adapter by finetune-dataflow "
        f"{metadata.version('finetune-dataflow')}.",
        "## How to use it",
        built.use,
        "## Intended use and limits",
        _intended(settings, lineage),
        "## Is it better than its base?",
        *_verdict(lineage),
        "## What this export keeps",
        *_gate(gate, settings.gate, built),
        "## Lineage",
        *_lineage(lineage),
        "## Licence",
        _licence(lineage),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(settings: ExportSettings, lineage: Lineage) -> str:
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", lineage.base_name) and not Path(lineage.base_name).exists()
    said = {
        **({} if lineage.licence == UNKNOWN else {"license": lineage.licence}),
        **({"base_model": lineage.base_name} if on_hub else {}),
        "library_name": LIBRARIES[settings.kind],
        "pipeline_tag": "text-generation",
        "tags": ["fine-tuned", "mlx", "finetune-dataflow", *(["lora"] if settings.made in ("peft", "gguf-lora") else [])],
    }
    return f"---\n{yaml.safe_dump(said, sort_keys=False)}---"


def _kind(settings: ExportSettings) -> str:
    return {
        "fused": "A whole model in safetensors", "peft": "An adapter in PEFT's layout", "gguf": "A whole model as a GGUF file",
        "gguf-lora": "A LoRA adapter as a GGUF file", "ollama": "A model for Ollama",
    }[settings.kind]  # fmt: skip


def _intended(settings: ExportSettings, lineage: Lineage) -> str:
    if settings.intended_use:
        return _plain(settings.intended_use)
    data = Path(str(lineage.run.get("names", {}).get("data_path", ""))).name
    of = f" in {_code(data)}" if data else ""
    return (
        f"It was tuned to answer questions of the kind of the training data{of}, and its scores below are for that kind alone. "
        "It has the limits of its base model, may state what is not so, and was not tested for safety, for other subjects or "
        "for other languages."
    )


def _verdict(lineage: Lineage) -> list[str]:
    try:
        return _scores(lineage.metrics)
    except (KeyError, TypeError, AttributeError):  # there are none, or another version wrote them
        return ["Not known here: the adapter does not lie in a finished run."]


def _scores(metrics: dict[str, Any]) -> list[str]:
    table = ["| | base | tuned | tuned - base (95 % interval) |", "| --- | --- | --- | --- |"]
    for label, base, tuned, interval in score_lines(metrics):
        told = "" if interval is None else f"{interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"
        table.append(f"| {_plain(label)} | {base:.3f} | {tuned:.3f} | {told} |")
    scored = f"Scores of the adapter-loaded model on {metrics['hold_out_rows']} hold-out rows, which no choice was made on:"
    return [_plain(metrics["verdict"]), scored, "\n".join(table)]


def _gate(gate: Gate, asked: GateSettings, built: Built) -> list[str]:
    first = gate.scores[0]
    parts = [
        f"Read back and scored on {first.rows} hold-out rows, beside the adapter-loaded model: the KL divergence of the "
        "next-token distributions at the places of the replies, how often the most probable token is the same, and the mean "
        f"{gate.metric} of the greedy replies.",
        "\n".join(gate.markdown()),
        f"Asked for: KL at most {asked.max_kl} nats in the mean, the same top-1 at {asked.min_top1:.0%} of the places at least, "
        f"{gate.metric} at most {asked.max_rouge_loss} lower.",
    ]
    if gate.failures:
        failed = "\n".join(f"* {_plain(each)}" for each in gate.failures)
        parts.append(f"**It does not reach this, and was written all the same:**\n\n{failed}")
    lines = [*built.lines, *gate.notes]
    return [*parts, *(["\n".join(f"* {_plain(each)}" for each in lines)] if lines else [])]


def _lineage(lineage: Lineage) -> list[str]:
    rows = ["| | |", "| --- | --- |", f"| base model | {_code(lineage.base_name)} |"]
    rows += [f"| SHA-256 of the {name} | `{value}` |" for name, value in lineage.fingerprints.items()]
    run = lineage.run
    chosen = {name: run["settings"][name] for name in _SETTINGS if run.get("settings", {}).get(name) is not None}
    if data := run.get("names", {}).get("data_path"):
        rows.append(f"| data | {_code(Path(str(data)).name)} |")
    rows += [f"| {name} | {_code(str(value))} |" for name, value in chosen.items()]
    metrics = lineage.metrics
    rows += [
        f"| {label} | {metrics[name]:,} |"
        for name, label in (("train_rows", "training rows"), ("supervised_tokens", "supervised tokens"))
        if isinstance(metrics.get(name), int)
    ]
    rows += [f"| {name} | {_code(str(value))} |" for name, value in run.get("versions", {}).items()]
    return ["\n".join(rows)]


def _licence(lineage: Lineage) -> str:
    if lineage.licence == UNKNOWN:
        return "Not known: the base model's directory does not say. The base model's licence binds what is made of it."
    whose = "as it was given for this export" if lineage.licence_given else "the base model's"
    return f"{lineage.licence}, {whose}. The base model's licence binds what is made of it, and so may the data's."


def _plain(text: str) -> str:
    """Text that is no Markdown, no HTML and one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]#|~!])", r"\\\1", escaped)


def _code(text: str) -> str:
    """Text as code, safe in a table."""
    return f"`{' '.join(text.replace('`', '').replace('|', '/').split())}`"

"""What the Hamilton UI is shown of a node's result: numbers, names of settings, pictures, and no text of the data.

A text is shown only where its name says that it is a setting, a fingerprint or a verdict of our own nodes; of everything else
that could hold rows, prompts or replies there are counts, types and statistics. Token ids are as good as text, so members of
sequences are only counted.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pandas as pd

from finetune_dataflow.engine.files import Location, content_fingerprint
from finetune_dataflow.engine.quality import QualityReport
from finetune_dataflow.engine.replies import PromptReply
from finetune_dataflow.engine.tokens import DroppedRow, TokenColumns
from finetune_dataflow.tracking.figures import figure_svg
from finetune_dataflow.tracking.tables import columns

PACKAGE = "finetune_dataflow"
# Inputs and fields whose value is a name, a path, or one of some words. The graph's other inputs that are text are texts.
SETTINGS = frozenset(
    {
        "adapter_path", "assistant_turns", "base_model_name", "best_metric", "bleu_tokenizer", "build_prompt", "context_key",
        "data_path", "few_shot_file", "fine_tune_type", "group_key", "input_text_key", "learning_schedule", "long_rows",
        "loom_file", "loom_language", "lora_keys", "lr_schedule", "metrics", "model_id", "near_duplicates", "object_format",
        "optimizer", "optimizer_config", "output_dir", "output_text_key", "project_name", "prompt_format", "report_to",
        "resume_adapter_file", "row_shape", "save_adapter_to", "start", "train_type",
    }
)  # fmt: skip
# What our code chose the words of.
WORDS = frozenset({"deciding_metric", "device", "judge", "kind", "location", "loss_path", "reason", "shape", "verdict"})
OUR_TYPES = (
    "dataset:DataSource", "fitting:FinishedFit", "engine.audit:LabelAudit", "engine.fit_plan:FitPlan",
    "engine.fit_settings:FitSettings", "engine.fit_settings:LoopSettings", "engine.fit_settings:MethodSettings",
    "engine.fit_settings:OptimizerSettings", "engine.frozen_states:StateStore", "engine.quality:QualityReport",
    "engine.replies:PromptReply", "engine.report_parts:ReportParts", "engine.run_directory:RunIdentity",
    "engine.settings:GenerationSettings", "engine.settings:MetricSettings", "engine.settings:PromptSettings",
    "engine.settings:QuantizationSettings", "engine.settings:SplitSettings", "engine.settings:TokenizationSettings",
    "engine.shapes:ShapedRows", "engine.sources:Source", "engine.tokens:TokenColumns", "engine.training:FitSummary",
)  # fmt: skip
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
LONGEST_TEXT = 2000  # characters of a setting or a verdict
DEEPEST = 6  # of mappings in mappings
MOST_MEMBERS = 200  # of a mapping
MOST_FILES = 10_000  # of a directory that are counted
LARGEST_HEADER = 2**26  # bytes
LARGEST_HASHED = 2**30  # bytes of weights that are read for their fingerprint
_FINGERPRINT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Observation:
    """One thing that the UI shows of a node: its heading, and a value of a type that the UI can draw."""

    name: str
    type: str
    version: int
    value: dict[str, Any]

    def attribute(self, node: str, role: str) -> dict[str, Any]:
        """As the server takes it."""
        known = {"name": self.name[:63], "type": self.type, "schema_version": self.version, "value": self.value}
        return {"node_name": node, "attribute_role": role, **known}


def observations(name: str, value: object, ours: bool) -> list[Observation]:
    """What is shown of the result of the node `name`; `ours`: our own code made it, so that keys in it are no data."""
    if isinstance(value, TokenColumns):
        lengths = {"tokens": value.lengths, "supervised_tokens": value.row_supervised, "prompt_tokens": value.prompt_lengths}
        per_row = columns(pd.DataFrame(lengths), True)
        return [_mapping(value, _token_facts(value)), Observation("per row", "dagworks_describe", 3, per_row)]
    if isinstance(value, pd.DataFrame | pd.Series):
        table = value.to_frame(name) if isinstance(value, pd.Series) else value
        shape = {"rows": len(table), "columns": len(table.columns), "bytes": int(table.memory_usage().sum())}
        described = columns(table, ours)
        return [_mapping(value, shape), *([Observation("columns", "dagworks_describe", 3, described)] if described else [])]
    if is_figure(value) and ours:
        return [_picture(figure_svg(value))]
    if isinstance(value, str) and name == "dag_drawing" and ours:
        return [_picture(value[max(value.find("<svg"), 0) :])]
    if value is None or isinstance(value, bool | int | float | str):
        return [Observation("result_summary", "primitive", 1, {"type": str(type(value)), "value": str(plain(name, value, ours))})]
    shown = plain(name, value, ours)
    return [_mapping(value, shown if isinstance(shown, dict) else {"value": shown})]


def shown_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of a run's inputs: settings; of texts how long they are."""
    return {name: plain(name, each, name in SETTINGS) for name, each in inputs.items()}


def is_figure(value: object) -> bool:
    """Whether it is a plotly figure, told by its name, so that nothing is imported for it."""
    return any(each.__name__ == "BaseFigure" and each.__module__.startswith("plotly") for each in type(value).__mro__)


def plain(name: str, value: object, ours: bool, depth: int = 0) -> Any:
    """`value`, known as `name`, as JSON without texts of the data."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float | np.integer | np.floating):
        number = value.item() if isinstance(value, np.generic) else value
        return number if math.isfinite(number) else str(number)
    if isinstance(value, str):
        return _text(name, value, ours)
    if isinstance(value, PurePath):
        return _path(value)
    if ours and name in SETTINGS and isinstance(value, Mapping | list | tuple):
        return _setting(value)
    if isinstance(value, TokenColumns):
        return _token_facts(value)
    if isinstance(value, pd.DataFrame):
        return f"a table of {len(value):,} rows and {len(value.columns):,} columns"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}, {' x '.join(f'{each:,}' for each in value.shape)}"
    if isinstance(value, list | tuple) and value and all(isinstance(each, DroppedRow) for each in value):
        return _dropped(value)
    if ours and depth < DEEPEST:
        if isinstance(value, Mapping):
            return {str(key): plain(str(key), each, True, depth + 1) for key, each in list(value.items())[:MOST_MEMBERS]}
        if is_dataclass(value) and type(value).__module__.startswith(PACKAGE):
            return _fields(value, depth)
    return _counted(value)


def _text(name: str, value: str, ours: bool) -> str:
    if ours and (name in SETTINGS or name in WORDS or _FINGERPRINT.fullmatch(value)):
        return _address(value)[:LONGEST_TEXT]
    return f"(text of {len(value):,} characters)" if value else ""


def _address(text: str) -> str:
    """A setting; of a URL without what may be secret: user, password, and the query, which may sign it."""
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    except ValueError:
        return "(an address)"


def _setting(value: object) -> Any:
    """A setting that is a list or a mapping, as JSON."""
    if isinstance(value, Mapping):
        return {str(key): _setting(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_setting(each) for each in value]
    return _address(value) if isinstance(value, str) else plain("", value, False)


def _counted(value: object) -> str:
    """What is only counted, sequences, sets and mappings; of other things the type alone."""
    kind = type(value).__name__
    return f"{kind} of {len(value):,}" if isinstance(value, Sequence | AnySet | Mapping) else f"a {kind}"


def _fields(value: Any, depth: int) -> dict[str, Any]:
    """The fields of a value of ours that are given."""
    if isinstance(value, QualityReport):
        kinds = {each.kind: {"severity": each.severity, "rows": len(each.rows)} for each in value.findings}
        return {"rows": value.row_count, "findings": kinds}
    if isinstance(value, PromptReply):
        return {"prompt": _text("", value.prompt, False), "tokens": len(value.tokens), "colorize": value.colorize}
    found = {each.name: plain(each.name, getattr(value, each.name), True, depth + 1) for each in fields(value)}
    return {name: each for name, each in found.items() if each not in (None, "")}


def _dropped(rows: Sequence[DroppedRow]) -> dict[str, int]:
    """How many rows were left out, by reason."""
    return dict(Counter(each.reason for each in rows))


def _mapping(value: object, shown: Mapping[str, Any]) -> Observation:
    return Observation("result_summary", "dict", 2, {"type": str(type(value)), "value": dict(shown)})


def _picture(svg: str) -> Observation:
    return Observation("result_summary", "html", 1, {"html": f'<div style="overflow: auto; background: #ffffff">{svg}</div>'})


def _token_facts(tokens: TokenColumns) -> dict[str, Any]:
    """Token columns in figures; the loss is computed on the supervised tokens."""
    lengths, total = tokens.lengths, int(tokens.lengths.sum())
    spread = (
        {"shortest": int(lengths.min()), "mean": round(float(lengths.mean()), 2), "longest": int(lengths.max())} if total else {}
    )
    return {
        "rows": len(tokens),
        "tokens": total,
        "supervised_tokens": tokens.supervised,
        "supervised_share": round(tokens.supervised / total, 4) if total else 0.0,
        "tokens_per_row": spread,
        "truncated_rows": int(tokens.truncated.sum()),
        "dropped_rows": _dropped(tokens.dropped),
        "fingerprint": tokens.fingerprint(),
    }


def _path(path: PurePath) -> Any:
    """A path, and what lies there: an adapter, a directory's files, a file's size."""
    if not isinstance(path, Path) or (isinstance(path, Location) and not path.is_file()):
        return str(path)
    shown: dict[str, Any] = {"path": str(path)}
    try:
        if not path.exists():
            return {**shown, "missing": True}
        files = [path] if path.is_file() else [each for each, _ in zip(path.rglob("*"), range(MOST_FILES), strict=False)]
        sizes = [each.stat().st_size for each in files if each.is_file()]
        shown |= {"bytes": sum(sizes), **({} if path.is_file() else {"files": len(sizes)})}
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            shown |= {"adapter": dict(_adapter(path))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # gone meanwhile, or no adapter of mlx-lm's
        shown |= {"unreadable": type(error).__name__}
    return shown


def _adapter(directory: Path) -> Iterator[tuple[str, Any]]:
    """What an adapter is, from its config and the header of its weights, which are not loaded."""
    config, weights = json.loads((directory / CONFIG).read_text(encoding="utf-8")), directory / WEIGHTS
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size) if size <= LARGEST_HEADER else b"")
    arrays = [each for name, each in header.items() if name != "__metadata__"]
    method = str(config.get("fine_tune_type", "lora"))
    yield "method", method
    if method != "full":
        chosen = config["lora_parameters"]
        yield from ((name, chosen[name]) for name in ("rank", "scale", "dropout", "keys") if name in chosen)
    yield "num_layers", config["num_layers"]
    yield "base_model", _address(str(config.get("model", "")))
    yield "arrays", len(arrays)
    yield "parameters", sum(math.prod(each["shape"]) for each in arrays)
    yield "types", sorted({each["dtype"] for each in arrays})
    yield "bytes", weights.stat().st_size
    if weights.stat().st_size <= LARGEST_HASHED:
        yield "fingerprint", content_fingerprint([weights, directory / CONFIG])


def register() -> None:
    """Teach Hamilton's own tracker our types, which it would show as unsupported. Needs its SDK."""
    from hamilton_sdk.tracking import data_observation

    named = (each.split(":") for each in OUR_TYPES)
    kinds = [getattr(importlib.import_module(f"{PACKAGE}.{module}"), name) for module, name in named]
    for kind in (*kinds, PurePath, importlib.import_module("plotly.basedatatypes").BaseFigure):
        data_observation.compute_stats.register(kind, _first)
        data_observation.compute_additional_results.register(kind, _further)


def _first(result: Any, node_name: str, node_tags: Mapping[str, Any]) -> dict[str, Any]:
    return _as_theirs(observations(node_name, result, True)[0])


def _further(result: Any, node_name: str, node_tags: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**_as_theirs(each), "name": each.name} for each in observations(node_name, result, True)[1:]]


def _as_theirs(each: Observation) -> dict[str, Any]:
    version = f"0.0.{each.version}"
    return {"observability_type": each.type, "observability_value": each.value, "observability_schema_version": version}

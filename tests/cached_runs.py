"""Runs of the graph with Hamilton's cache on, and what they computed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hamilton import driver

import finetune_dataflow
from finetune_dataflow.caching import fingerprint
from tests.fit_values import adapter_digest

logging.getLogger("hamilton").setLevel(logging.CRITICAL)

RESULTS = [
    "save_best_models", "hold_out_set_predictions", "finetuned_model_on_validation_set", "training_and_validation_set_metrics",
    "run_metrics", "row_ledger", "label_audit", "hold_out_audit", "metrics_file", "lineage_file", "prompt_reply",
]  # fmt: skip
MEASURED = ("tokens_per_second", "peak_memory_bytes", "fit")  # what no two runs have alike


def anew() -> set[str]:
    """The nodes that look at the world outside each time."""
    nodes = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build().graph.nodes.values()
    return {node.name for node in nodes if node.tags.get("cache.behavior") == "recompute"}


ANEW = anew()


def cached_driver(cache: Path, start: str = "base") -> driver.Driver:
    """A driver as a user's script builds it."""
    builder = driver.Builder().with_config({"start": start}).with_modules(finetune_dataflow)
    return builder.with_cache(path=str(cache)).build()


def executed(dr: driver.Driver) -> set[str]:
    """The nodes that the driver's last run computed."""
    logs = dr.cache.logs(dr.cache.last_run_id, level="debug")
    return {name for name, events in logs.items() if any(str(each.event_type.value) == "execute_node" for each in events)}


def results_of(dr: driver.Driver, inputs: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of everything a run gives, but for times, memory and the places of files."""
    results = dr.execute(RESULTS, inputs=inputs)
    metrics = {name: value for name, value in results["run_metrics"].items() if name not in MEASURED}
    plain = {
        name: results[name] for name in RESULTS if name not in ("save_best_models", "run_metrics", "metrics_file", "lineage_file")
    }
    plain["training_and_validation_set_metrics"] = json.dumps(plain["training_and_validation_set_metrics"])
    run = Path(results["save_best_models"]["adapter"]).parent
    written = ("predictions.jsonl", "row_ledger.jsonl", "label_audit.html", "hold_out_inputs.txt")
    return {
        **{name: fingerprint(value) for name, value in plain.items()},
        "metrics": json.dumps(metrics, sort_keys=True, default=str),
        "adapter": adapter_digest(run),
        **{name: (run / name).read_text() for name in written},
    }

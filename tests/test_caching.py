"""Hamilton's cache over this dataflow: what it knows values and code by, and what runs again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
import pytest
from hamilton import driver
from hamilton.caching import fingerprinting
from hamilton.lifecycle import NodeExecutionHook
from mlx_lm.utils import load

import finetune_dataflow
from finetune_dataflow.caching import fingerprint
from finetune_dataflow.engine.code_versions import code_of, code_version
from finetune_dataflow.engine.files import Location
from tests.cached_runs import ANEW, RESULTS, cached_driver, executed, results_of


class Pair:
    """Of no dataclass, with contents all the same."""

    def __init__(self, one: object, other: object) -> None:
        self.one, self.other = one, other


def test_what_differs_has_another_fingerprint_in_a_container_too(tiny_model: Path) -> None:
    model, tokenizer = load(str(tiny_model))[:2]
    changed = load(str(tiny_model))[0]
    changed.layers[0].mlp.up_proj.weight = changed.layers[0].mlp.up_proj.weight + 1
    deep: Any = mx.array([1])
    for _ in range(9):
        deep = {"inner": [deep]}
    deeper: Any = mx.array([2])
    for _ in range(9):
        deeper = {"inner": [deeper]}
    values = [
        None, True, False, 0, 1, 1.0, "1", b"1", "", [], (), {}, [1], ["1"], [[1]], [1, 2], [2, 1], {1}, {"a": 1}, {"a": 2},
        {"b": 1},
        np.zeros(6), np.zeros((2, 3)), np.zeros((3, 2)), np.zeros(6, np.float32), np.zeros(6, np.int64),
        mx.zeros(6), mx.zeros((2, 3)), mx.zeros((3, 2)), mx.zeros(6, mx.bfloat16), mx.zeros(6, mx.bool_), mx.ones(6, mx.bool_),
        nn.Linear(2, 2), nn.Linear(2, 3), nn.Dropout(0.5), model, changed, tokenizer, [model], [changed], [tokenizer],
        pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]}), pd.DataFrame({"a": [1.0]}), pd.DataFrame({"a": ["1"]}),
        pd.DataFrame({"a": [{"x": 1}]}), pd.DataFrame({"a": [{"x": 2}]}), pd.DataFrame({"a": [1]}, index=[5]),
        pd.Series([1], name="a"), pd.Series([1], name="b"), Pair(1, mx.array([1])), Pair(1, mx.array([2])), deep, deeper,
    ]  # fmt: skip
    prints = [fingerprinting.hash_value(value) for value in values]
    assert len({*prints}) == len(values), [
        (values[first], values[second])
        for first in range(len(values))
        for second in range(first)
        if prints[first] == prints[second]
    ]
    again = load(str(tiny_model))
    assert fingerprint([again[0]]) == fingerprint([model]) and fingerprint([again[1]]) == fingerprint([tokenizer])
    assert fingerprint({"a": 1, "b": [mx.array([1])]}) == fingerprint({"b": [mx.array([1])], "a": 1})


def test_a_path_is_known_by_what_it_leads_to_and_a_location_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    seen = [fingerprint(path)]
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        path.mkdir(exist_ok=True)
        (path / name).write_text(content)
        seen.append(fingerprint(path))
    assert len({*seen}) == 4 and fingerprint(path) == seen[-1] == fingerprint(shutil.copytree(path, tmp_path / "copy"))
    located = fingerprint(Location(path))
    (path / "a").unlink()
    assert fingerprint(path) != seen[-1] and fingerprint(Location(path)) == located


def test_what_has_no_content_is_never_found_again() -> None:
    assert fingerprinting.hash_value(object()) != fingerprinting.hash_value(object())
    assert fingerprinting.hash_value([(n for n in range(2))]) != fingerprinting.hash_value([(n for n in range(2))])


def test_the_same_again_computes_nothing(inputs: dict[str, Any], tmp_path: Path) -> None:
    first = cached_driver(tmp_path / "cache")
    before = results_of(first, inputs)
    assert {"finished_fit", "train_tokens", "hold_out_base_replies", "verdict"} <= executed(first)
    second = cached_driver(tmp_path / "cache")
    assert results_of(second, inputs) == before
    assert executed(second) <= ANEW


def test_another_learning_rate_reuses_the_tokens_and_everything_of_the_base(inputs: dict[str, Any], tmp_path: Path) -> None:
    results_of(cached_driver(tmp_path / "cache"), inputs)
    changed = {**inputs, "learning_rate": 0.02, "output_dir": str(tmp_path / "other")}
    dr = cached_driver(tmp_path / "cache")
    cached = results_of(dr, changed)
    ran = executed(dr) - ANEW
    assert "hold_out_tuned_replies" in ran and "optimizer_settings" in ran
    assert not [name for name in ran if "base" in name or "tokens" in name or name in ("records", "train_set", "row_ledger")]
    plain = {**changed, "output_dir": str(tmp_path / "plain")}
    assert results_of(driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build(), plain) == cached


def test_a_file_written_otherwise_with_the_same_rows_changes_nothing_after_the_records(
    inputs: dict[str, Any], rows: list[dict[str, str]], tmp_path: Path
) -> None:
    import json

    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    inputs["data_path"] = str(data)
    results_of(cached_driver(tmp_path / "cache"), inputs)
    data.write_text(json.dumps([dict(reversed(row.items())) for row in rows], indent=3))
    dr = cached_driver(tmp_path / "cache")
    results_of(dr, inputs)
    assert executed(dr) - ANEW == {"source_rows"}


def test_a_path_whose_content_is_gone_or_changed_is_not_taken_from_the_cache(inputs: dict[str, Any], tmp_path: Path) -> None:
    first = results_of(cached_driver(tmp_path / "cache"), inputs)
    shutil.rmtree(tmp_path / "run")
    dr = cached_driver(tmp_path / "cache")
    assert results_of(dr, inputs) == first
    assert (tmp_path / "run" / "adapters" / "adapters.safetensors").is_file() and (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.parametrize("damage", ["results", "metadata", "cut"])
def test_a_damaged_cache_is_no_worse_than_none(inputs: dict[str, Any], damage: str, tmp_path: Path) -> None:
    """Results deleted, results cut short: what is missing is computed again."""
    first = results_of(cached_driver(tmp_path / "cache"), inputs)
    for path in sorted((tmp_path / "cache").rglob("*")):
        if path.is_file() and ".db" not in path.name and damage != "metadata":
            path.unlink() if damage == "results" else path.write_bytes(path.read_bytes()[:7])
        elif path.is_file() and damage == "metadata":
            path.unlink()
    assert results_of(cached_driver(tmp_path / "cache"), inputs) == first


class Traced(NodeExecutionHook):
    """Which modules of the package each node really runs."""

    def __init__(self) -> None:
        self.ran: dict[str, set[str]] = {}

    def run_before_node_execution(self, *, node_name: str, **others: Any) -> None:
        modules = self.ran.setdefault(node_name, set())

        def note(frame: FrameType, event: str, argument: object) -> None:
            name = frame.f_globals.get("__name__", "")
            if event == "call" and name.startswith("finetune_dataflow") and frame.f_code.co_name != "<module>":
                modules.add(name)

        sys.setprofile(note)

    def run_after_node_execution(self, **others: Any) -> None:
        sys.setprofile(None)


@pytest.fixture
def traced() -> Iterator[Traced]:
    yield Traced()
    sys.setprofile(None)


def test_the_version_of_a_node_covers_every_module_that_it_runs(inputs: dict[str, Any], traced: Traced) -> None:
    """Reading the code is enough only if nothing runs that was not read; so the code is watched while it runs."""
    builder = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow)
    dr = builder.with_adapters(traced).build()
    dr.execute(RESULTS, inputs={**inputs, "grad_checkpoint": True, "best_metric": "rougeL", "prompt": "What?"})
    aside = {"finetune_dataflow", "finetune_dataflow.engine", "finetune_dataflow.caching", "finetune_dataflow.start"}
    for name, modules in traced.ran.items():
        functions = dr.graph.nodes[name].originating_functions
        if functions:
            covered = code_of(functions[0])[1] | {functions[0].__module__} | aside
            # What a lazy value runs when it is looked at is covered by the version of the node that made it.
            for each in dr.graph.nodes[name].dependencies:
                covered |= code_of(each.originating_functions[0])[1] if each.originating_functions else set()
            assert modules <= covered, f"{name} runs {sorted(modules - covered)}"
    assert len(traced.ran) > 60


def test_a_version_covers_what_a_function_uses_and_not_the_rest(tmp_path: Path) -> None:
    nodes = {name: getattr(finetune_dataflow, name) for name in ("reply_scores", "base_losses", "split_settings", "verdict")}
    modules = {name: {each.rpartition(".")[2] for each in code_of(function)[1]} for name, function in nodes.items()}
    assert "rouge" in modules["reply_scores"] and "losses" not in modules["reply_scores"]
    assert {"losses", "models", "heads", "tokens"} <= modules["base_losses"] and "rouge" not in modules["base_losses"]
    assert modules["split_settings"] >= {"settings", "errors"} and "chat" not in modules["split_settings"]
    assert len({code_version(function) for function in nodes.values()}) == 4

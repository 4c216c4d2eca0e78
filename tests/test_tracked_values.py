"""What the Hamilton UI is shown of a node's result, type by type, and figures as SVG."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from finetune_dataflow.engine import figure_style, figures
from finetune_dataflow.engine.arrays import write_arrays
from finetune_dataflow.engine.audit import LabelAudit, Piece, SetAudit
from finetune_dataflow.engine.files import Location
from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings, MethodSettings, OptimizerSettings
from finetune_dataflow.engine.quality import Finding, QualityReport
from finetune_dataflow.engine.replies import PromptReply, StreamedToken
from finetune_dataflow.engine.run_directory import RunIdentity
from finetune_dataflow.engine.settings import PromptSettings, SplitSettings
from finetune_dataflow.engine.tokens import DroppedRow, EncodedRow, TokenColumns, token_columns
from finetune_dataflow.tracking.figures import figure_svg
from finetune_dataflow.tracking.values import observations, register, shown_inputs

SECRET = "quagmirefrog"
SVG = "{http://www.w3.org/2000/svg}"


def shown(name: str, value: object, ours: bool = True) -> Any:
    """What is shown first."""
    return observations(name, value, ours)[0].value


def three_rows() -> TokenColumns:
    rows = [EncodedRow(1, [5, 6], [7]), EncodedRow(2, [5], [7, 8, 9], truncated=True), EncodedRow(4, [5, 6, 7], [8])]
    return token_columns(rows, [DroppedRow(3, "near_hold_out"), DroppedRow(5, "near_hold_out")])


def test_token_columns_are_counted() -> None:
    first, per_row = observations("train_tokens", three_rows(), True)
    assert (first.name, first.type, first.version) == ("result_summary", "dict", 2)
    assert first.value["value"] == {
        "rows": 3,
        "tokens": 11,
        "supervised_tokens": 5,
        "supervised_share": 0.4545,
        "tokens_per_row": {"shortest": 3, "mean": 3.67, "longest": 4},
        "truncated_rows": 1,
        "dropped_rows": {"near_hold_out": 2},
        "fingerprint": three_rows().fingerprint(),
    }
    assert (per_row.name, per_row.type, per_row.version) == ("per row", "dagworks_describe", 3)
    assert {name: (each["min"], each["max"]) for name, each in per_row.value.items()} == {
        "tokens": (3.0, 4.0), "supervised_tokens": (1.0, 3.0), "prompt_tokens": (1.0, 3.0),
    }  # fmt: skip
    assert shown("train_tokens", token_columns([]))["value"]["rows"] == 0


def test_a_column_of_numbers_is_described_with_quantiles_and_a_histogram() -> None:
    frame = pd.DataFrame({"loss": [0.0, 1.0, 2.0, 3.0, 10.0, np.nan, np.inf]})
    _, columns = observations("losses", frame, True)
    column = columns.value["loss"]
    assert {name: column[name] for name in ("count", "missing", "zeros", "min", "max", "mean", "base_data_type")} == {
        "count": 7, "missing": 1, "zeros": 1, "min": 0.0, "max": 10.0, "mean": 3.2, "base_data_type": "numeric",
    }  # fmt: skip
    assert column["std"] == pytest.approx((62.8 / 4) ** 0.5)  # the sample's
    assert column["quantiles"]["0.5"] == 2.0 and list(column["histogram"].values()) == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    assert next(iter(column["histogram"])) == "(0, 1]"


def test_of_a_column_of_texts_only_lengths_are_shown() -> None:
    frame = pd.DataFrame({"reply": ["", SECRET, None], "ended": [True, False, True], "both": [1, SECRET, None]})
    told, columns = observations("replies", frame, True)
    assert told.value["value"] == {"rows": 3, "columns": 3, "bytes": int(frame.memory_usage().sum())}
    assert columns.value["reply"]["avg_str_len"] == 6.0 and columns.value["reply"]["empty"] == 1
    assert {name: each["base_data_type"] for name, each in columns.value.items()} == {
        "reply": "str", "ended": "boolean", "both": "unhandled",
    }  # fmt: skip
    assert SECRET not in json.dumps([each.value for each in observations("replies", frame, True)])


def test_the_column_names_of_a_users_own_table_may_be_data() -> None:
    _, columns = observations("pivoted", pd.DataFrame({SECRET: [1.0]}), False)
    assert list(columns.value) == ["column 1"] and columns.value["column 1"]["name"] == "column 1"


def test_an_adapter_is_read_from_its_config_and_the_header_of_its_weights(tmp_path: Path) -> None:
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
              "model": "https://me:secret@hub/model?token=1"}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = write_arrays(tmp_path / "adapters.safetensors", {"a": mx.zeros((3, 4)), "b": mx.zeros((4, 5))})
    found = shown("adapter_path", tmp_path)["value"]
    fingerprint = found["adapter"].pop("fingerprint")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert found["path"] == str(tmp_path) and found["files"] == 2
    assert found["adapter"] == {
        "method": "lora", "rank": 4, "scale": 20.0, "dropout": 0.0, "num_layers": 2, "base_model": "https://hub/model",
        "arrays": 2, "parameters": 32, "types": ["F32"], "bytes": weights.stat().st_size,
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\x02\x00\x00\x00\x00\x00\x00\x00{"]
)
def test_a_damaged_adapter_is_said_to_be_unreadable(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "adapter_config.json").write_text('{"num_layers": 2, "lora_parameters": {}}')
    (tmp_path / "adapters.safetensors").write_bytes(damage)
    assert "unreadable" in shown("adapter_path", tmp_path)["value"]


def test_paths_are_shown_with_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"12345")
    assert shown("file", tmp_path / "one.txt")["value"] == {"path": str(tmp_path / "one.txt"), "bytes": 5}
    assert shown("file", tmp_path / "two.txt")["value"] == {"path": str(tmp_path / "two.txt"), "missing": True}
    assert shown("folder", tmp_path)["value"] == {"path": str(tmp_path), "bytes": 5, "files": 1}
    assert shown("folder", Location(tmp_path))["value"] == {"value": str(tmp_path)}  # a place: what is in it does not count


def test_settings_are_shown_with_their_values_and_texts_with_their_length() -> None:
    settings = FitSettings(MethodSettings(lora_keys=("self_attn.q_proj",)), OptimizerSettings(), LoopSettings(epochs=2.0))
    found = shown("fit_settings", settings)["value"]
    assert found["method"]["fine_tune_type"] == "lora" and found["method"]["lora_keys"] == ["self_attn.q_proj"]
    assert found["optimizer"]["optimizer"] == "adamw" and found["loop"]["epochs"] == 2.0 and "iters" not in found["loop"]
    assert shown("split_settings", SplitSettings(1, 0.8, 0.1))["value"]["near_duplicates"] == "auto"
    prompt = PromptSettings(system_prompt=SECRET, prompt_format="chatml")
    assert shown("prompt_settings", prompt)["value"] == {
        "system_prompt": "(text of 12 characters)", "prompt_format": "chatml", "few_shot_count": 0,
    }  # fmt: skip


def test_values_of_ours_that_hold_texts_are_counted() -> None:
    report = QualityReport(9, (Finding("html", (1, 2), f"rows 1, 2 hold {SECRET}", "notice"),))
    assert shown("data_quality", report)["value"] == {"rows": 9, "findings": {"html": {"severity": "notice", "rows": 2}}}
    reply = PromptReply(SECRET, (StreamedToken(17, SECRET, 0.5),))
    assert shown("prompt_reply", reply)["value"] == {"prompt": "(text of 12 characters)", "tokens": 1, "colorize": False}
    audit = LabelAudit({"train": SetAudit(3, 11, 0.5, 0.0, 1, 0, 0, 4)}, ((1, (Piece(SECRET, True),)),))
    assert shown("label_audit", audit)["value"]["sets"]["train"]["tokens"] == 11
    identity = RunIdentity(
        {"data_path": "a.json", "model_id": "tiny"}, {"system_prompt": SECRET, "epochs": 2}, {"base_model": "b" * 64}
    )
    assert shown("run_identity", identity)["value"] == {
        "names": {"data_path": "a.json", "model_id": "tiny"},
        "settings": {"system_prompt": "(text of 12 characters)", "epochs": 2},
        "fingerprints": {"base_model": "b" * 64},
        "unbinding": {},
    }
    every = [observations(name, value, True) for name, value in (("a", report), ("b", reply), ("c", audit), ("d", identity))]
    assert SECRET not in repr(every)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([SECRET], {"value": "list of 1"}),
        ({SECRET: SECRET}, {"value": "dict of 1"}),
        ({"verdict": SECRET}, {"value": "dict of 1"}),
        ([1, 2, 3], {"value": "list of 3"}),  # token ids are as good as text
        (np.arange(6).reshape(2, 3), {"value": "an array of int64, 2 x 3"}),
        (b"bytes", {"value": "bytes of 5"}),
        (object(), {"value": "a object"}),
    ],
)
def test_what_a_users_own_node_gives_is_counted(value: object, said: dict[str, str]) -> None:
    assert shown("verdict", value, ours=False)["value"] == said


@pytest.mark.parametrize("value", [SECRET, "b" * 64])
def test_a_text_of_a_users_own_node_is_not_shown_whatever_its_name(value: str) -> None:
    assert shown("verdict", value, ours=False)["value"] == f"(text of {len(value)} characters)"


@pytest.mark.parametrize(("value", "said"), [(None, "None"), (True, "True"), (0.5, "0.5"), (float("nan"), "nan"), ("", "")])
def test_plain_values_are_shown_as_text(value: object, said: str) -> None:
    assert shown("seen_rows", value)["value"] == said


def test_inputs_that_are_no_settings_are_not_shown() -> None:
    given = {"prompt": SECRET, "mine": [SECRET], "epochs": 2, "data_path": "s3://key:secret@bucket/a.json?signature=1",
             "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, -1]}}  # fmt: skip
    assert shown_inputs(given) == {
        "prompt": "(text of 12 characters)", "mine": "list of 1", "epochs": 2, "data_path": "s3://bucket/a.json",
        "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, -1]},
    }  # fmt: skip


def test_hamiltons_own_tracker_shows_our_types_once_they_are_registered(tmp_path: Path) -> None:
    from hamilton_sdk.tracking.data_observation import compute_additional_results, compute_stats

    register()
    for value in (three_rows(), tmp_path, SplitSettings(1, 0.8, 0.1)):
        assert compute_stats(value, "node", {})["observability_type"] == "dict"
    assert compute_stats(go.Figure(go.Scatter(x=[1], y=[2])), "node", {})["observability_type"] == "html"
    assert [each["name"] for each in compute_additional_results(three_rows(), "node", {})] == ["per row"]


def drawn(figure: go.Figure) -> ElementTree.Element:
    return ElementTree.fromstring(figure_svg(figure))


def places(figure: go.Figure, tag: str, *sides: str) -> list[tuple[float, ...]]:
    return [tuple(float(each.get(side, "0")) for side in sides) for each in drawn(figure).iter(f"{SVG}{tag}")]


def frame(**axes: Any) -> dict[str, Any]:
    """A plot whose y axis has no figures, so that it reaches from 22 to 654 pixels across and from 300 up to 100."""
    bare = {"range": [0, 10], "showticklabels": False, "showgrid": False}
    return {"height": 400, "margin": {"t": 100, "b": 100}, "xaxis": bare, "yaxis": bare, **axes}


def test_marks_stand_where_their_values_are() -> None:
    figure = go.Figure(go.Scatter(x=[0, 5, 10], y=[0, 5, None], mode="markers", marker={"size": 8}), frame())
    assert places(figure, "circle", "cx", "cy", "r") == [(22.0, 300.0, 4.0), (338.0, 200.0, 4.0)]


def test_a_curve_goes_through_its_points_with_gaps_and_steps() -> None:
    line = go.Scatter(x=[0, 5, 6, 10], y=[0, 10, None, 10], mode="lines")
    paths = [each.get("d") for each in drawn(go.Figure(line, frame())).iter(f"{SVG}path")]
    assert paths == ["M22.0 300.0L338.0 100.0 M654.0 100.0"]
    stepped = go.Scatter(x=[0, 5], y=[0, 10], mode="lines", line={"shape": "vh"})
    paths = [each.get("d") for each in drawn(go.Figure(stepped, frame())).iter(f"{SVG}path")]
    assert paths == ["M22.0 300.0L22.0 100.0L338.0 100.0"]


def test_bars_are_as_long_as_their_values_and_stand_on_one_another() -> None:
    two = [go.Bar(x=["a"], y=[4], width=0.5), go.Bar(x=["a"], y=[2], width=0.5)]
    category = {"type": "category", "showticklabels": False}
    stacked = go.Figure(two, {**frame(xaxis=category), "barmode": "stack", "showlegend": False})
    assert places(stacked, "rect", "x", "y", "width", "height")[1:] == [(180.0, 220.0, 316.0, 80.0), (180.0, 180.0, 316.0, 40.0)]


def test_panels_stand_in_their_parts_of_the_plot() -> None:
    traces = [go.Scatter(x=[0], y=[5], mode="markers"), go.Scatter(x=[10], y=[5], yaxis="y2", mode="markers")]
    bare = {"range": [0, 10], "showticklabels": False}
    layout = frame(yaxis={**bare, "domain": [0.5, 1]}, yaxis2={**bare, "domain": [0, 0.5], "anchor": "x"})
    assert places(go.Figure(traces, layout), "circle", "cx", "cy") == [(22.0, 150.0), (654.0, 250.0)]


def test_whiskers_reach_to_the_ends_of_their_intervals() -> None:
    trace = figure_style.whiskers([(5.0, 2.0, 6.0)], [5.0], 1, "#000000", "diamond")
    lines = places(go.Figure(trace, frame()), "line", "x1", "x2", "y1")
    assert lines == [(148.4, 401.2, 200.0)]


@pytest.mark.parametrize(
    ("low", "high", "axis", "texts"),
    [
        (0, 10, {"nticks": 6}, ["0", "2", "4", "6", "8", "10"]),
        (-0.05, 0.05, {"nticks": 5}, ["\u22120.04", "\u22120.02", "0", "0.02", "0.04"]),
        (0, 1, {"dtick": 0.5, "tickformat": ".0%"}, ["0%", "50%", "100%"]),
        (0, 9000, {"nticks": 3, "tickformat": ",d"}, ["0", "5,000"]),
        (0, 1, {"tickvals": [0.0, 1.0], "ticktext": ["none", "all"]}, ["none", "all"]),
    ],
)
def test_ticks_are_round_and_said_as_their_axis_wants(
    low: float, high: float, axis: dict[str, Any], texts: Sequence[str]
) -> None:
    layout = frame(xaxis={"range": [low, high], **axis})
    figure = go.Figure(go.Scatter(x=[low], y=[5], mode="lines"), layout)
    assert [each.text for each in drawn(figure).iter(f"{SVG}text")] == texts


def test_every_figure_of_a_report_is_well_formed_and_shows_no_text_of_a_row() -> None:
    scores = {"rougeL": {"mean": 0.4, "low": 0.3, "high": 0.5}, "loss": {"mean": 2.0, "low": 1.5, "high": 2.5}}
    history = [{"event": "train", "step": n, "loss": 5 / n, "learning_rate": 1e-4} for n in range(1, 2000)]
    history += [{"event": "validation", "step": 0, "loss": 3.0, "best_step": 0}, {"event": "resume", "step": 7}]
    audit = {"train": SetAudit(3, 11, 0.5, 0.1, 1, 0, 0, 4), "hold_out": SetAudit(1, 4, 0.25, 0.0, 0, 0, 0, 4)}
    ledger = pd.DataFrame({"status": ["used", "dropped"], "set": ["train", ""], "reason": ["", "in_no_set"], "truncated": False})
    rows, texts = [1, 2, 3], [f"<script>{SECRET}</script>"] * 3
    every = {
        "loss": figures.loss_figure(history),
        "losses": figures.loss_comparison_figure({"one <b>": history, "two": history[:30]}),
        "scores": figures.scores_figure(scores, scores),
        "differences": figures.difference_figure(scores, rows=30),
        "distribution": figures.score_distribution_figure([0.1, 0.2, 0.2], [0.3, 0.2, 0.4]),
        "scatter": figures.scatter_figure([0.1, 0.2, 0.3], [0.2, 0.1, 0.3], rows, texts),
        "outcomes": figures.outcomes_figure(3, 2, 1),
        "lengths": figures.token_length_figure({"train": [3, 4, 400], "hold_out": [5]}, 512),
        "labels": figures.label_figure(audit),
        "ledger": figures.ledger_figure(ledger),
        "nothing": figures.loss_figure([]),
    }
    for name, figure in every.items():
        text = figure_svg(figure)
        drawing = ElementTree.fromstring(text)
        assert float(drawing.get("height", "0")) == figure.layout.height, name
        assert SECRET not in text and "script" not in text and "nan" not in text, name
        said = [each.text or "" for each in drawing.iter(f"{SVG}text")]
        assert said[0] == re.split("<br>", str(figure.layout.title.text))[0], name
        numbers = [float(each) for each in re.findall(r'(?:cx|cy|x1|x2|y1|y2)="(-?[\d.]+)"', text)]
        assert all(-1 <= each <= max(680, figure.layout.height) for each in numbers), name
    assert "No loss was recorded." in figure_svg(every["nothing"])
    assert "one &lt;b&gt;" in figure_svg(every["losses"])

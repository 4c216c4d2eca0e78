"""What a person looks at: figures as nodes, and report.html of a real run, hostile texts included."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from hamilton import driver

import finetune_dataflow
from finetune_dataflow.cli import main
from finetune_dataflow.engine import report
from finetune_dataflow.engine.report import MOST_BYTES, MOST_ROWS

FIGURES = [
    "loss_figure", "rouge_figure", "scores_figure", "difference_figure", "score_distribution_figure", "row_scatter_figure",
    "outcomes_figure", "token_length_figure", "label_figure", "row_ledger_figure",
]  # fmt: skip
HOSTILE = (
    "<script>window.__hacked = 1</script>",
    "</script><script>window.__hacked = 2</script>",
    '<img src=x onerror="window.__hacked = 3">',
    "\x1b]0;title\x07\x1b[2J\x1b[31mred",
    "\u202egnp.exe \u2066 \u200f",
    "{{7*7}} ${alert(1)} %{x} $E=mc^2$ \u2028 \x00",
)


def hostile_rows() -> list[dict[str, str]]:
    """A data set that tries to be more than text: every row's question and reply hold one of the strings."""
    return [
        {"question": f"Row {number}: {HOSTILE[number % 6]}?", "reply": f"{HOSTILE[(number + 1) % 6]} is {number * 7}"}
        for number in range(100)
    ]


@pytest.fixture(scope="module")
def hostile_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the command line over these rows."""
    directory = tmp_path_factory.mktemp("hostile")
    data = directory / "rows.json"
    data.write_text(json.dumps(hostile_rows()))
    arguments = ["--data", str(data), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(tiny_model)]
    assert main([*arguments, "--out", str(directory / "run"), "--max-tokens", "8", "--num-layers", "1"]) == 0
    return directory / "run"


def test_every_figure_is_a_node_that_shows_in_a_notebook(inputs: dict[str, Any]) -> None:
    dr = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build()
    made = dr.execute(FIGURES, inputs=inputs)
    for name in FIGURES:
        assert isinstance(made[name], go.Figure) and len(made[name].data) > 0, name
        json.loads(made[name].to_json())
    labels = {text for trace in made["rouge_figure"].data for text in [trace.name] if text}
    assert {"base model", "tuned model"} <= labels


def test_the_report_shows_hostile_rows_as_text(hostile_run: Path) -> None:
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    content = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "&lt;script&gt;window.__hacked = 1&lt;/script&gt;" in content
    assert "<script>window" not in page and 'onerror="' not in content and "\x1b" not in page and "\u202e" not in page
    assert r"\x1b" in content and r"\u202e" in content


def test_the_report_holds_verdict_scores_settings_and_the_command_that_repeats_the_run(hostile_run: Path) -> None:
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((hostile_run / "metrics.json").read_text())
    assert metrics["verdict"].split(":")[0] in page
    for expected in ("ROUGE-Lsum", "chrF", "BLEU", "exact match", "learning_rate: ", "mlx-lm", "config.yaml", "The graph"):
        assert expected in page, expected
    fingerprints = json.loads((hostile_run / "lineage.json").read_text())["fingerprints"]
    assert fingerprints["train_set"] in page
    assert "run.py train -c " in page and str(hostile_run / "config.yaml") in page


def test_the_page_asks_the_network_for_nothing(hostile_run: Path) -> None:
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"""<(?:script|img|link|iframe)[^>]+(?:src|href)=["']?(?!data:|#)[a-z/]""", page)


def test_nothing_of_the_data_moves_the_terminal(hostile_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", str(hostile_run / "config.yaml")]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\u202e" not in shown.out + shown.err and "Row " in shown.out


def test_an_evaluation_alone_has_a_report_without_a_fit(hostile_run: Path, tmp_path: Path) -> None:
    config = (hostile_run / "config.yaml").read_text()
    names = ("data_path", "input_text_key", "output_text_key", "model_id", "max_tokens")
    given = [
        word
        for name in names
        for word in (f"--{name.replace('_', '-')}", re.search(rf"^{name}: (.*)$", config, re.MULTILINE)[1])  # type: ignore[index]
    ]
    assert main(["evaluate", *given, "--adapter", str(hostile_run / "adapters"), "--out", str(tmp_path / "again")]) == 0
    page = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert "Evaluation on rows.json" in page and "The fit</h2>" not in page and "run.py evaluate -c " in page


def predictions(count: int, characters: int) -> pd.DataFrame:
    text = "é" * (characters // 2)  # two bytes each
    return pd.DataFrame({"row": range(count), **dict.fromkeys(("input", "reference", "base", "finetuned"), [text] * count)})


def test_the_page_shows_the_first_rows_that_it_has_room_for() -> None:
    assert len(report._shown(predictions(20, 100))) == 20
    assert len(report._shown(predictions(MOST_ROWS + 7, 20))) == MOST_ROWS
    assert len(report._shown(predictions(50, 100_000))) == MOST_BYTES // 400_000


def test_a_thousand_rows_of_usual_length_make_a_page_under_six_megabytes(hostile_run: Path, tmp_path: Path) -> None:
    from finetune_dataflow.engine.page import Page, RowTable, Section, html
    from tests.test_page import realistic_rows

    page = Page("A run", "Better.", sections=(Section("Rows", [RowTable(realistic_rows(1000))]),))
    without_figures = len(html(page).encode())
    assert without_figures + (hostile_run / "report.html").stat().st_size < 6_000_000

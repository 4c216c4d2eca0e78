"""From files of every kind to a plan or a run, as a user gives them on the command line."""

import csv
import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.cli import main

REPOSITORY = Path(__file__).parent.parent


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def model(tiny_model: Path) -> list[str]:
    return ["--model", str(tiny_model), "--max-seq-length", "400", "--num-layers", "2"]


def test_a_run_from_csv(
    rows: list[dict[str, str]], inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["question", "reply"])
        writer.writeheader()
        writer.writerows(rows)
    given = {**inputs, "data_path": str(path)}
    assert main([word for name, value in given.items() for word in (f"--{name}", str(value))]) == 0
    assert "CSV, rows of the shape key_mapping" in capsys.readouterr().out


def test_a_plan_from_messages_learns_every_reply(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [
        [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": "first"},
         {"role": "user", "content": "And?"}, {"role": "assistant", "content": "second"}]
        for n in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    printed = planned([*model, "--data", str(path)], capsys)
    assert "rows of the shape messages" in printed
    assert "assistant\\n[[first<|im_end|>]]\\n<|im_start|>user\\nAnd?" in printed and "[[second<|im_end|>]]" in printed
    assert "[[first" not in planned([*model, "--data", str(path), "--assistant-turns", "last"], capsys)


def test_a_plan_from_rows_with_contexts_and_a_template(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "contexts.jsonl"
    rows = [{"input": f"Q{n}?", "contexts": ["one", "two"], "response": f"R{n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*model, "--data", str(path), "--context-template", "<{context}>", "--input-template", "{context}\nAsked: {input}"]
    printed = planned(words, capsys)
    assert "rows of the shape context_response" in printed and "user\\n<one>\\n\\n<two>\\nAsked: Q" in printed


def test_a_plan_with_a_word_loom_whose_marker_names_a_column(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loom = tmp_path / "loom.toml"
    loom.write_text('lang = "en"\n[system_prompt]\n_ = "You help {who}."\n[ask]\n_ = "{question} ({topic})"\n')
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": f"Q{n}?", "topic": "MLX", "answer": f"A{n}"} for n in range(60)]))
    words = ["--data", str(path), "--input-text-key", "question", "--output-text-key", "answer", "--loom-file", str(loom)]
    printed = planned([*model, *words, "--build-prompt", "ask", "--loom-markers", "who=[people]"], capsys)
    assert "system\\nYou help people." in printed and "? (MLX)<|im_end|>" in printed


def test_a_named_format_is_trained_and_generated_alike(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name, value in inputs.items() for word in (f"--{name}", str(value))]
    assert main([*words, "--prompt-format", "alpaca"]) == 0
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert said["hold_out_rows"] == 6
    assert main([*words, "--prompt-format", "alpacca"]) == 2
    assert "Did you mean 'alpaca'?" in capsys.readouterr().err


def test_a_text_file_is_learned_as_it_is(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Text number {n}."}) + "\n" for n in range(60)))
    printed = planned([*model, "--data", str(path)], capsys)
    assert "rows of the shape text" in printed and "<|im_end|>[[Text number " in printed


def test_near_duplicates_are_dropped_and_stand_in_the_ledger(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "near.json"
    digests = [hashlib.sha256(str(n // 2).encode()).hexdigest() for n in range(120)]  # alike in pairs, but for a last mark
    rows = [{"prompt": f"{each}{'!' * (n % 2)}", "completion": f"answer {n}"} for n, each in enumerate(digests)]
    path.write_text(json.dumps(rows))
    printed = planned([*model, "--data", str(path)], capsys)
    assert "dropped, near_hold_out: row" in printed
    assert "120 rows:" in printed


def test_strict_stops_at_a_warning_about_the_data(
    model: list[str], rows: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([*rows, {**rows[0], "reply": "Something else."}]))
    words = [*model, "--data", str(path), "--input-text-key", "question", "--output-text-key", "reply"]
    assert "1 dropped" not in planned(words, capsys)
    assert main(["plan", *words, "--strict", "true"]) == 2
    assert "strict=true" in capsys.readouterr().err


def test_a_later_fit_that_trains_on_the_hold_out_of_a_run_beside_it_says_so(
    inputs: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [word for name, value in inputs.items() for word in (f"--{name}", str(value))]
    assert main(words) == 0
    assert "hold-out rows of the run" not in caplog.text
    other = [*words[: words.index("--output_dir")], *words[words.index("--output_dir") + 2 :]]
    assert main([*other, "--out", str(tmp_path / "later"), "--seed", "5"]) == 0
    assert f"hold-out rows of the run {(tmp_path / 'run').resolve()}" in caplog.text


def test_rows_from_sqlite_by_the_documented_example(
    rows: list[dict[str, str]], model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "support.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE support (question TEXT, reply TEXT)")
        connection.executemany("INSERT INTO support VALUES (:question, :reply)", rows)
    keys = ["--input-text-key", "question", "--output-text-key", "reply"]
    words = [*model, "--data", str(path), *keys, "--module", str(REPOSITORY / "examples" / "sqlite_rows.py")]
    assert "SQLite table support" in planned(words, capsys) and main(["plan", *words]) == 0


def test_a_yaml_replaces_a_node_only_where_code_is_allowed(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import pandas as pd\n\ndef shouted(records: pd.DataFrame, row_sides: pd.Series, mark: str) -> pd.DataFrame:\n"
        "    chosen = records[row_sides == 'hold_out'].reset_index(drop=True)\n"
        "    return chosen.assign(input_text=chosen['input_text'] + mark)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "mine.yaml"
    config.write_text("replace:\n  hold_out_set:\n    method: mine::shouted\n    kwargs: {mark: '!!'}\n")
    words = ["-c", str(config), *[word for name, value in inputs.items() for word in (f"--{name}", str(value))]]
    assert main(words) == 2
    assert "replaces nodes by code of its own (hold_out_set). Allow that with --allow-code." in capsys.readouterr().err
    assert main([*words, "--allow-code"]) == 0
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["input"].endswith("!!")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("method: nowhere::f", "cannot be had"), ("method: json", "is no function"), ("method: json::nothing", "cannot be had"),
     ("method: json::dumps, kwargs: {ident: 3}", "has no parameter 'ident'. Did you mean 'indent'?"),
     ("kwargs: {}", "expected {method")],
)  # fmt: skip
def test_a_bad_replacement_is_told(wanted: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"replace: {{records: {{{wanted}}}}}\n")
    assert main(["plan", "-c", str(config), "--allow-code"]) == 2
    assert expected in capsys.readouterr().err


def test_a_module_that_is_missing_or_broken_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def (")
    assert main(["plan", "--module", str(tmp_path / "no.py")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["plan", "--module", str(broken)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err

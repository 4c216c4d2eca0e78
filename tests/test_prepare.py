"""Prepared data written for other trainers, and read back as they read it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import mlx.core as mx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from mlx_lm.tuner.datasets import ChatDataset, TextDataset, load_local_dataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.utils import load_tokenizer
from transformers import DataCollatorForSeq2Seq

from finetune_dataflow.cli import main
from finetune_dataflow.cli.options import build_driver, parse
from finetune_dataflow.engine import prepared
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from tests.tiny_model import CHATML, IM_END, IM_START, write_tiny_model

NODES = ("train_tokens", "validation_tokens", "hold_out_tokens")
Prepare = Callable[..., str]
NEWLINE = 10  # what ChatML writes after a turn


def words(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def options_of(data: Path, model: Path, **more: Any) -> list[str]:
    return words({"data": data, "model": model, "input_text_key": "question", "output_text_key": "reply", **more})


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "Traceback" not in error
    return error


def columns_of(arguments: list[str]) -> list[TokenColumns]:
    """Train, validation and hold-out as a fit is given them."""
    options = parse(arguments)
    made = build_driver(options.start).execute(list(NODES), inputs=options.inputs)
    return [made[node] for node in NODES]


def read_by_mlx_lm(directory: Path, model: Path, mask_prompt: bool) -> list[list[tuple[list[int], int]]]:
    """The tokens of every row of the three files, and how many of them are masked, as mlx-lm's trainer has them."""
    tokenizer = load_tokenizer(str(model))
    sets = load_local_dataset(directory, tokenizer, SimpleNamespace(mask_prompt=mask_prompt))
    kind = ChatDataset if "messages" in sets[0][0] else TextDataset
    assert all(type(each) is kind for each in sets)
    return [[each.process(each[index]) for index in range(len(each))] for each in sets]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def options(data_file: Path, tiny_model: Path) -> list[str]:
    """What train would be given."""
    return options_of(data_file, tiny_model)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "prepared"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Prepare]:
    """Prepare something that must succeed; what was printed."""

    def prepare(kind: str, out: Path, arguments: list[str]) -> str:
        capsys.readouterr()
        code = main(["prepare", "--to", kind, "--out", str(out), *arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    yield prepare


@pytest.fixture
def chat_options(tmp_path: Path, tiny_model: Path) -> list[str]:
    """Sixty conversations of a system message and two questions, long and short."""
    rows = [
        [{"role": "system", "content": "Be brief."},
         {"role": "user", "content": f"Grüße {n}" + " and on" * n}, {"role": "assistant", "content": "first"},
         {"role": "user", "content": f"Then {n}?" + " and so on" * (n % 7)}, {"role": "assistant", "content": "second"}]
        for n in range(60)
    ]  # fmt: skip
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in rows))
    return words({"data": path, "model": tiny_model})


def test_a_hugging_face_dataset_holds_every_row_as_the_fit_has_it(options: list[str], out: Path, run: Prepare) -> None:
    assert "train (48 rows)" in run("hf", out, options)
    loaded = datasets.load_from_disk(str(out))
    assert list(loaded) == ["train", "validation", "test"]
    for split, columns in zip(loaded.values(), columns_of(options), strict=True):
        types = {name: str(split.features[name]) for name in split.column_names}
        assert types == {
            "row": "Value('int64')", "input_ids": "List(Value('int32'))", "attention_mask": "List(Value('int8'))",
            "labels": "List(Value('int32'))",
        }  # fmt: skip
        assert split["row"][:] == columns.rows.tolist()
        for index, row in enumerate(split):
            assert row["input_ids"] == columns.row_ids(index).tolist()
            assert row["labels"] == columns.row_labels(index).tolist()
            assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_transformers_collates_the_rows_with_their_masked_labels(
    options: list[str], tiny_model: Path, out: Path, run: Prepare
) -> None:
    run("hf", out, options)
    split = datasets.load_from_disk(str(out))["train"].remove_columns("row")
    tokenizer = load_tokenizer(str(tiny_model))._tokenizer
    tokenizer.pad_token = "<|endoftext|>"
    batch = DataCollatorForSeq2Seq(tokenizer, return_tensors="np")([split[0], split[1], split[2]])
    longest = max(len(split[index]["input_ids"]) for index in range(3))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    # "It is …" and the end of the turn are learned; the prompt and the padding are not.
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert learned[:6] == [*b"It is "] and learned[-1] == IM_END
    assert int(batch["attention_mask"][0].sum()) == len(split[0]["input_ids"])


def test_parquet_files_hold_every_row_in_small_compressed_groups(
    options: list[str], out: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "BLOCK_ROWS", 20)
    run("parquet", out, options)
    for name, columns in zip(("train", "validation", "test"), columns_of(options), strict=True):
        table = pd.read_parquet(out / f"{name}.parquet")
        assert list(table) == ["row", "input_ids", "attention_mask", "labels"]
        assert table["row"].tolist() == columns.rows.tolist()
        for index in range(len(columns)):
            assert table["input_ids"][index].tolist() == columns.row_ids(index).tolist()
            assert table["labels"][index].tolist() == columns.row_labels(index).tolist()
            assert table["attention_mask"][index].tolist() == [1] * len(columns.row_ids(index))
    metadata = pq.ParquetFile(out / "train.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [20, 20, 8]
    assert metadata.row_group(0).column(1).compression == "ZSTD"


def test_a_batch_ends_before_it_has_too_many_tokens_and_takes_a_longer_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [EncodedRow(number, [1] * length, [2]) for number, length in enumerate((2, 2, 2, 30, 1, 1, 1), 1)]
    columns = token_columns(rows)
    monkeypatch.setattr(prepared, "BLOCK_TOKENS", 8)
    batches = [*prepared.record_batches(columns)]
    assert [batch["row"].to_pylist() for batch in batches] == [[1, 2], [3], [4], [5, 6, 7]]
    ids = [row for batch in batches for row in batch["input_ids"].to_pylist()]
    assert ids == [[1] * length + [2] for length in (2, 2, 2, 30, 1, 1, 1)]


def test_columns_on_disk_are_written_as_those_in_memory(tmp_path: Path) -> None:
    columns = token_columns([EncodedRow(number, [1, number], [2, 3]) for number in range(1, 5)])
    mapped = {}
    for name in ("input_ids", "labels"):
        np.save(tmp_path / f"{name}.npy", getattr(columns, name))
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    assert [*prepared.record_batches(replace(columns, **mapped))] == [*prepared.record_batches(columns)]


def test_mlx_lm_reads_the_tokens_and_masks_of_every_row(options: list[str], tiny_model: Path, out: Path, run: Prepare) -> None:
    printed = run("mlx", out, options)
    for read, columns in zip(read_by_mlx_lm(out, tiny_model, True), columns_of(options), strict=True):
        assert len(read) == len(columns) > 0
        for index, (ids, masked) in enumerate(read):
            assert ids == [*columns.row_ids(index).tolist(), NEWLINE]
            assert masked == columns.prompt_lengths[index]
    assert "train.jsonl (48 rows)" in printed and "the chat template writes '\\n', which mlx-lm learns, too" in printed
    assert f"mlx_lm lora --model {tiny_model} --train --data {out} --mask-prompt\n" in printed


def test_rows_that_cannot_be_read_together_are_read_by_mlx_lm_one_by_one(
    options: list[str], tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("mlx", tmp_path / "together", options)
    monkeypatch.setattr(prepared._MlxReader, "_many", lambda self, rows: [([1, 2, 3], 1) for _ in rows])
    run("mlx", tmp_path / "singly", options)
    assert contents(tmp_path / "singly") == contents(tmp_path / "together")


def test_mlx_lm_learns_a_padding_token_after_each_row_and_leaves_out_the_last_ones_as_is_said(
    options: list[str], tiny_model: Path, out: Path, run: Prepare
) -> None:
    printed = run("mlx", out, options)
    assert "it learns a padding token (id 0) after each row" in printed and "it leaves out the last rows" in printed
    read = read_by_mlx_lm(out, tiny_model, True)[0]
    batches = [*iterate_batches(read, batch_size=5, max_seq_length=2048)]
    assert len(read) == 48 and len(batches) == 9
    for ids, lengths in batches:
        _, learned = default_loss(lambda tokens: mx.zeros((*tokens.shape, 259)), ids, lengths)
        assert int(learned) == sum(length - masked + 1 for masked, length in lengths.tolist())


def test_mlx_lm_reads_exactly_the_tokens_where_the_template_ends_with_the_turn(
    data_file: Path, tmp_path: Path, out: Path, run: Prepare
) -> None:
    model = write_tiny_model(tmp_path / "model", template=CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"))
    options = options_of(data_file, model)
    printed = run("mlx", out, options)
    for read, columns in zip(read_by_mlx_lm(out, model, True), columns_of(options), strict=True):
        assert [ids for ids, _ in read] == [columns.row_ids(index).tolist() for index in range(len(columns))]
        assert [masked for _, masked in read] == columns.prompt_lengths.tolist()
    assert "which mlx-lm learns, too" not in printed


def test_mlx_lm_reads_conversations_whose_prompts_were_cut(
    chat_options: list[str], tiny_model: Path, out: Path, run: Prepare
) -> None:
    options = [*chat_options, "--max-seq-length", "150"]
    printed = run("mlx", out, options)
    sets = columns_of(options)
    for read, columns in zip(read_by_mlx_lm(out, tiny_model, True), sets, strict=True):
        assert [ids for ids, _ in read] == [[*columns.row_ids(index).tolist(), NEWLINE] for index in range(len(columns))]
        assert [masked for _, masked in read] == columns.prompt_lengths.tolist()
    cut = [row for row, was_cut in zip(lines_of(out / "train.jsonl"), sets[0].truncated, strict=True) if was_cut]
    assert any(len(row["messages"]) == 3 and row["messages"][1]["content"].startswith("Then") for row in cut)
    assert all(row["messages"][0] == {"role": "system", "content": "Be brief."} for row in cut)
    whole = sum(int((~columns.truncated).sum()) for columns in sets)
    assert f"no earlier reply, which {whole} rows of these have" in printed and "Left out" not in printed


def test_mlx_lm_reads_the_end_of_a_question_whose_beginning_was_cut(
    options: list[str], tiny_model: Path, out: Path, run: Prepare
) -> None:
    options = [*options, *words({"max_seq_length": 60, "input_template": "Please be so kind and tell me: {input}"})]
    run("mlx", out, options)
    sets = columns_of(options)
    assert all(columns.truncated.all() for columns in sets)
    for read, columns in zip(read_by_mlx_lm(out, tiny_model, True), sets, strict=True):
        assert [ids for ids, _ in read] == [[*columns.row_ids(index).tolist(), NEWLINE] for index in range(len(columns))]
    questions = [row["messages"][0]["content"] for row in lines_of(out / "train.jsonl")]
    assert all("Please" not in question and question.endswith("?") for question in questions)


def test_tools_go_with_their_rows(tmp_path: Path, out: Path, run: Prepare) -> None:
    model = write_tiny_model(tmp_path / "model", template="{{ tools | tojson if tools else '' }}" + CHATML)
    path = tmp_path / "tools.jsonl"
    tools = [{"type": "function", "function": {"name": "weather", "description": "Wetter für morgen", "parameters": {}}}]
    turns = [[{"role": "user", "content": f"Weather {n}?"}, {"role": "assistant", "content": "Rain."}] for n in range(60)]
    path.write_text("".join(json.dumps({"messages": each, "tools": tools}) + "\n" for each in turns))
    options = words({"data": path, "model": model})
    run("mlx", out, options)
    for read, columns in zip(read_by_mlx_lm(out, model, True), columns_of(options), strict=True):
        assert [ids for ids, _ in read] == [[*columns.row_ids(index).tolist(), NEWLINE] for index in range(len(columns))]
    assert lines_of(out / "train.jsonl")[0]["tools"] == tools


def test_rows_that_mlx_lm_would_read_otherwise_are_left_out_and_named(tiny_model: Path, tmp_path: Path, run: Prepare) -> None:
    path = tmp_path / "rows.json"
    rows = [{"question": f"Number {n}?", "reply": f"It is {n}."} for n in range(60)]
    rows[0]["reply"] = "Write <|im_end|> here."
    path.write_text(json.dumps(rows))
    options = options_of(path, tiny_model)
    printed = run("mlx", tmp_path / "mlx", options)
    file, read = next(
        (file, read)
        for file, read, columns in zip(prepared.FILES["mlx"], read_by_mlx_lm(tmp_path / "mlx", tiny_model, True),
                                       columns_of(options), strict=True)
        if 1 in columns.rows and len(read) == len(columns) - 1
    )  # fmt: skip
    assert f"Left out of {file}, because mlx-lm would read them otherwise: row 1. Row 1: from token " in printed
    assert all(ids.count(IM_END) == 2 for ids, _ in read)
    run("hf", tmp_path / "hf", options)
    assert sum(map(len, datasets.load_from_disk(str(tmp_path / "hf")).values())) == 60


def test_a_template_that_writes_replies_otherwise_than_prompts_is_refused(
    data_file: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = "('<think>' if loop.last and not add_generation_prompt else '')"
    model = write_tiny_model(tmp_path / "model", template=CHATML.replace("message['content']", f"{thought} + message['content']"))
    error = refused(["--to", "mlx", "--out", str(out), *options_of(data_file, model)], capsys)
    assert "mlx-lm would read every row of train.jsonl otherwise than it is prepared. Row 1: from token 36 on" in error
    assert (
        "it is ['I', 't', ' ', 'i', 's'] here and ['<', 't', 'h', 'i', 'n'] in mlx-lm" in error
        and "--to hf and --to parquet" in error
    )
    assert not list(tmp_path.rglob("*prepared*"))


def test_a_prompt_format_that_masks_is_refused_for_mlx_lm(
    options: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(["--to", "mlx", "--out", str(out), *options, "--prompt-format", "alpaca"], capsys)
    assert "--to mlx and prompt_format" in error and "--mask-prompt false" in error and "--to hf and --to parquet" in error
    assert not out.exists() and not list(out.parent.iterdir())


def test_a_prompt_format_without_masks_is_written_as_texts_that_mlx_lm_reads_exactly(
    options: list[str], tiny_model: Path, out: Path, run: Prepare
) -> None:
    options = [*options, "--prompt-format", "alpaca", "--mask-prompt", "false"]
    assert "--mask-prompt" not in run("mlx", out, options)
    for read, columns in zip(read_by_mlx_lm(out, tiny_model, False), columns_of(options), strict=True):
        assert read == [(columns.row_ids(index).tolist(), 0) for index in range(len(columns))]
    assert lines_of(out / "train.jsonl")[0]["text"].startswith("### Instruction:\n")


def test_a_beginning_of_sequence_that_the_tokenizer_adds_is_not_written_twice(
    data_file: Path, tmp_path: Path, out: Path, run: Prepare
) -> None:
    model = write_tiny_model(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    start, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [IM_START], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = options_of(data_file, model, prompt_format="alpaca", mask_prompt="false")
    run("mlx", out, options)
    for read, columns in zip(read_by_mlx_lm(out, model, False), columns_of(options), strict=True):
        assert [ids for ids, _ in read] == [columns.row_ids(index).tolist() for index in range(len(columns))]
        assert all(ids[0] == IM_START and ids[1] == ord("#") for ids, _ in read)


def test_texts_without_a_prompt_are_written_as_texts(tiny_model: Path, tmp_path: Path, out: Path, run: Prepare) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Once upon a time, {n}.\nÄon\u2028"}) + "\n" for n in range(60)))
    options = words({"data": path, "model": tiny_model})
    run("mlx", out, options)
    for read, columns in zip(read_by_mlx_lm(out, tiny_model, False), columns_of(options), strict=True):
        assert read == [(columns.row_ids(index).tolist(), 0) for index in range(len(columns))]


def test_small_sets_and_long_rows_get_the_options_that_mlx_lm_needs(
    options: list[str], out: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "MLX_BATCH_SIZE", 100)
    monkeypatch.setattr(prepared, "MLX_MAX_SEQ_LENGTH", 20)
    printed = run("mlx", out, options)
    sets = columns_of(options)
    fewest, longest = min(map(len, sets)), max(int(columns.lengths.max()) for columns in sets) + 1
    assert f"--mask-prompt --batch-size {fewest} --max-seq-length {longest}\n" in printed


def test_the_same_command_again_finds_it_there_and_writes_nothing(options: list[str], out: Path, run: Prepare) -> None:
    run("mlx", out, options)
    before = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    assert f"{out} holds this preparation already." in run("mlx", out, options)
    assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == before


def test_one_preparation_is_the_same_bytes_wherever_it_is_written(options: list[str], tmp_path: Path, run: Prepare) -> None:
    for kind in prepared.KINDS:
        run(kind, tmp_path / kind / "one", options)
        run(kind, tmp_path / kind / "other", options)
        assert contents(tmp_path / kind / "one") == contents(tmp_path / kind / "other")


def test_another_preparation_is_not_overwritten_and_what_differs_is_named(
    options: list[str], out: Path, run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    run("hf", out, options)
    before = contents(out)
    error = refused(["--to", "hf", "--out", str(out), *options, "--system-prompt", "Be kind."], capsys)
    assert f"{out} holds another preparation" in error and "system_prompt is '' there and 'Be kind.' here" in error
    assert "kind is 'hf' there and 'parquet' here" in refused(["--to", "parquet", "--out", str(out), *options], capsys)
    assert contents(out) == before


def test_a_preparation_that_was_changed_since_is_not_called_there(
    options: list[str], out: Path, run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    run("mlx", out, options)
    (out / "valid.jsonl").write_text("{}\n")
    (out / "test.jsonl").unlink()
    error = refused(["--to", "mlx", "--out", str(out), *options], capsys)
    assert "held this preparation, but test.jsonl, valid.jsonl changed since or cannot be read" in error
    (out / "prepared.json").write_text('{"made_of":')
    assert "prepared.json cannot be read" in refused(["--to", "mlx", "--out", str(out), *options], capsys)


def test_an_empty_directory_is_used_and_nothing_is_written_beside_it(
    options: list[str], tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, target = tmp_path / "work", tmp_path / "target"
    work.mkdir()
    target.mkdir()
    (work / "link").symlink_to(target)
    monkeypatch.chdir(work)
    run("parquet", Path("link"), options)
    assert sorted(path.name for path in target.iterdir()) == [
        "prepared.json", "test.parquet", "train.parquet", "validation.parquet",
    ]  # fmt: skip
    assert [path.name for path in work.iterdir()] == ["link"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "work"]


def test_the_rows_written_for_mlx_lm_are_data_here_with_the_same_split(
    options: list[str], tiny_model: Path, out: Path, run: Prepare
) -> None:
    run("mlx", out, options)
    again = columns_of(words({"data": out, "model": tiny_model, "near_duplicates": "keep"}))
    for columns, read in zip(columns_of(options), again, strict=True):
        assert columns.input_ids.tolist() == read.input_ids.tolist() and columns.labels.tolist() == read.labels.tolist()


BAD: dict[str, tuple[list[str], str]] = {
    "an unknown kind": (["--to", "parket", "--out", "x"], "--to='parket' is unknown. Did you mean 'parquet'? Expected one of"),
    "no kind": (["--out", "x"], "--to is missing. Expected one of 'mlx', 'hf', 'parquet'."),
    "no directory": (["--to", "hf"], "--out is missing. Expected the name of a directory that is empty or absent."),
    "neither": ([], "--to is missing. Expected one of 'mlx', 'hf', 'parquet'.\n--out is missing."),
    "a kind twice": (["--to", "hf", "--to=mlx", "--out", "x"], "--to is given twice."),
    "no value": (["--to", "hf", "--out"], "--out needs a value."),
    "a path that is none": (["--to", "hf", "--out", "~nosuchuser/x"], "'~nosuchuser/x' is not a path"),
    "an unknown option": (["--to", "hf", "--out", "x", "--max-seq-lenght", "9"], "Did you mean 'max_seq_length'?"),
    "a value out of range": (["--to", "hf", "--out", "x", "--max-seq-length", "2"], "max_seq_length=2 is out of range"),
    "an option of train": (["--to", "hf", "--out", "x", "--lora-rank", "0"], "lora_rank=0 is out of range"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_named_with_what_is_expected(
    name: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extra, expected = BAD[name]
    assert expected in refused([*options, *extra], capsys)
    assert not list(tmp_path.iterdir())


def test_a_directory_with_other_files_is_refused_before_anything_is_read(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        (tmp_path / f"file-{number}").write_text("mine")
    error = refused(["--to", "hf", "--out", str(tmp_path), "--data", "nowhere.json"], capsys)
    assert "is not empty: it holds file-0, file-1, file-2 and 2 more, and nothing is overwritten" in error
    error = refused(["--to", "hf", "--out", str(tmp_path / "file-0"), "--data", "nowhere.json"], capsys)
    assert "file-0' is a file. Expected the name of a directory." in error
    error = refused(["--to", "hf", "--out", str(tmp_path / "file-0" / "x"), *options], capsys)
    assert f"{tmp_path / 'file-0' / 'x'} cannot be written: Not a directory." in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_named(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    error = refused(["--to", "hf", "--out", str(tmp_path / "x"), *options], capsys)
    tmp_path.chmod(0o700)
    assert "cannot be written: Permission denied." in error


FULL_DISK = """
import resource, sys
from finetune_dataflow.cli import main
from finetune_dataflow.engine import prepared

write = prepared.write

def with_little_room(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        return write(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

prepared.write = with_little_room
for kind in prepared.KINDS:
    print(main(["prepare", "--to", kind, "--out", sys.argv[1], *sys.argv[2:]]), file=sys.stderr)
"""


def test_a_disk_that_is_full_is_told_and_nothing_is_left(options: list[str], out: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(out), *options], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ") or line.isdigit()]
    assert said[1::2] == ["2", "2", "2"]
    assert all(each.startswith(f"Error: {out} cannot be written: ") and "File too large." in each for each in said[::2])
    assert "Traceback" not in done.stderr and list(out.parent.iterdir()) == []

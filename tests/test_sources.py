import datetime
import decimal
import json
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from finetune_dataflow.engine.sources import Source, read_source, rows_named
from finetune_dataflow.errors import UserError

LINES = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'


def written(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def parquet(path: Path, columns: dict[str, object]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def values(source: Source) -> list[object]:
    return [row.value for row in source.rows]


def refusal(location: str) -> str:
    with pytest.raises(UserError) as caught:
        read_source(location)
    return str(caught.value)


def test_a_json_list_has_rows_counted_from_one(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]'))
    assert [(row.number, row.value, row.side, row.place) for row in source.rows] == [
        (1, {"a": 1}, None, "row 1"),
        (2, {"a": 2}, None, "row 2"),
    ]
    assert (source.kind, source.has_sides) == ("JSON list", False)


def test_a_row_of_json_lines_has_its_lines_number(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}'))
    assert [(row.number, row.place) for row in source.rows] == [(2, "line 2"), (4, "line 4")]
    assert source.kind == "JSON lines"


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.json", LINES))
    assert (len(source.rows), source.kind) == (2, "JSON lines")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "\n\r\n"])
def test_json_lines_may_end_as_any_system_ends_them(ending: str, tmp_path: Path) -> None:
    assert values(read_source(written(tmp_path / "a.jsonl", f'{{"a": 1}}{ending}{{"a": 2}}{ending}'))) == [{"a": 1}, {"a": 2}]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    assert values(read_source(written(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n'))) == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(name: str, tmp_path: Path) -> None:
    content = b"a,b\n1,2\n" if name == "a.csv" else b'{"a": "1", "b": "2"}'
    content = b"[" + content + b"]" if name == "a.json" else content
    assert values(read_source(written(tmp_path / name, b"\xef\xbb\xbf" + content))) == [{"a": "1", "b": "2"}]


def test_a_number_of_4000_digits_is_read(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.json", '[{"a": ' + "9" * 4000 + "}]"))
    assert source.rows[0].value == {"a": int("9" * 4000)}


def test_a_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    assert values(read_source(written(tmp_path / "a.json", r'[{"a": "\ud83d\ude00"}]'))) == [{"a": "\U0001f600"}]


def test_cells_of_csv_are_text_as_it_stands_and_empty_ones_null(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.csv", "id,text,flag\n007, NA ,\n1e5,true,NaN\n"))
    assert values(source) == [{"id": "007", "text": " NA ", "flag": None}, {"id": "1e5", "text": "true", "flag": "NaN"}]
    assert source.kind == "CSV"


def test_a_row_of_csv_is_named_by_its_first_line(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.csv", 'a,b\r\n"one\r\ntwo",x\r\n\r\ny,"say ""hi"""\r\n'))
    assert [(row.number, row.place, row.value) for row in source.rows] == [
        (1, "line 2", {"a": "one\r\ntwo", "b": "x"}),
        (2, "line 5", {"a": "y", "b": 'say "hi"'}),
    ]


def test_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.tsv", "a\tb\n1, 2\t3\n"))
    assert (values(source), source.kind) == ([{"a": "1, 2", "b": "3"}], "TSV")


def test_a_semicolon_that_separates_csv_is_said(tmp_path: Path) -> None:
    source = read_source(written(tmp_path / "a.csv", "a;b\n1;2,5\n"))
    assert (values(source), source.kind) == ([{"a": "1", "b": "2,5"}], "CSV (separated by ';')")


def test_a_long_field_leaves_the_limit_of_the_csv_module_as_it_was(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    read_source(written(tmp_path / "a.csv", "a,b\n" + "x" * 200_000 + ",y\n"))
    assert csv.field_size_limit() == before


def test_parquet_gives_json_values(tmp_path: Path) -> None:
    location = parquet(
        tmp_path / "a.parquet",
        {
            "text": ["a", None],
            "number": [1.5, float("nan")],
            "day": [datetime.date(2024, 2, 29), None],
            "price": [decimal.Decimal("1.10"), None],
            "turns": [[{"role": "user", "content": "x"}], []],
        },
    )
    source = read_source(location)
    assert values(source) == [
        {"text": "a", "number": 1.5, "day": "2024-02-29", "price": "1.10", "turns": [{"role": "user", "content": "x"}]},
        {"text": None, "number": None, "day": None, "price": None, "turns": []},
    ]
    assert json.loads(json.dumps(values(source))) == values(source)
    assert (source.kind, source.rows[1].place) == ("Parquet", "row 2")


def test_columns_of_bytes_are_left_out_and_named(tmp_path: Path) -> None:
    location = parquet(tmp_path / "a.parquet", {"text": ["a"], "image": [{"bytes": b"\xff", "path": "x.png"}], "raw": [b"\0"]})
    source = read_source(location)
    assert (values(source), source.kind) == ([{"text": "a"}], "Parquet, without the columns of bytes 'image', 'raw'")


def test_parquet_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    location = parquet(tmp_path / "a.parquet", {"text": ["a"]})
    assert read_source(written(tmp_path / "download", Path(location).read_bytes())).kind == "Parquet"


def test_mlx_lms_directory_keeps_its_split(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        written(tmp_path / f"{name}.jsonl", LINES)
    written(tmp_path / "README.md", "not data")
    source = read_source(str(tmp_path))
    assert source.kind == "mlx-lm directory (train.jsonl, valid.jsonl, test.jsonl)"
    assert source.has_sides
    assert [row.side for row in source.rows] == ["train"] * 2 + ["validation"] * 2 + ["hold_out"] * 2
    assert [row.number for row in source.rows] == [1, 2, 3, 4, 5, 6]
    assert source.rows[3].place == "valid.jsonl line 2"


def test_numbers_go_on_after_the_last_line_of_the_file_before(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", b"\n\n" + LINES)
    written(tmp_path / "test.csv", "prompt,completion\na,b\n")
    assert [(row.number, row.place) for row in read_source(str(tmp_path)).rows] == [
        (3, "train.jsonl line 3"),
        (4, "train.jsonl line 4"),
        (5, "test.csv line 2"),
    ]


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "DEV"])
def test_a_validation_file_has_many_names(name: str, tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", LINES)
    written(tmp_path / f"{name}.jsonl", LINES)
    assert read_source(str(tmp_path)).rows[2].side == "validation"


def test_a_directory_may_hold_csv_parquet_and_json(tmp_path: Path) -> None:
    written(tmp_path / "train.csv", "text\na\n")
    parquet(tmp_path / "validation.parquet", {"text": ["b"]})
    written(tmp_path / "test.json", '[{"text": "c"}]')
    source = read_source(str(tmp_path))
    assert [(row.side, row.value) for row in source.rows] == [
        ("train", {"text": "a"}),
        ("validation", {"text": "b"}),
        ("hold_out", {"text": "c"}),
    ]
    assert source.kind == "directory (train.csv, validation.parquet, test.json)"


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    for name in ("train", "valid", "dev"):
        written(tmp_path / f"{name}.jsonl", LINES)
    assert "dev.jsonl and valid.jsonl are the same part of the data" in refusal(str(tmp_path))


def test_a_directory_without_rows_to_learn_from_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "test.jsonl", LINES)
    assert "there is test.jsonl, but nothing named train" in refusal(str(tmp_path))


def test_a_directory_without_data_says_what_it_holds(tmp_path: Path) -> None:
    written(tmp_path / "trian.jsonl", LINES)
    written(tmp_path / "notes.txt", "x")
    told = refusal(str(tmp_path))
    assert "Found 'notes.txt', 'trian.jsonl'. Is trian.jsonl meant as one? Did you mean 'train'?" in told


def test_a_directory_with_one_other_file_says_how_to_name_it(tmp_path: Path) -> None:
    written(tmp_path / "support.jsonl", LINES)
    assert f"To use one file, name it: {tmp_path}/support.jsonl." in refusal(str(tmp_path))


def test_a_mistake_in_a_directory_names_the_file_and_the_line(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", LINES)
    written(tmp_path / "valid.jsonl", LINES + b"{")
    assert f"{tmp_path}/valid.jsonl: line 3: not JSON" in refusal(str(tmp_path))


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0]).save_to_disk(tmp_path / "saved")
    source = read_source(str(tmp_path / "saved"))
    assert (values(source), source.kind) == ([{"text": "c"}, {"text": "a"}], "Hugging Face dataset on disk")
    assert not source.has_sides


def test_a_dataset_dict_saved_to_disk_keeps_its_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": one, "test": one, "unsupervised": one}).save_to_disk(tmp_path / "saved")
    source = read_source(str(tmp_path / "saved"))
    assert [(row.side, row.place) for row in source.rows] == [("train", "train row 1"), ("hold_out", "test row 1")]
    assert source.kind == "Hugging Face dataset on disk (train, test), without its splits 'unsupervised'"


def test_a_saved_dataset_whose_tables_are_gone_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    for table in (tmp_path / "saved").glob("*.arrow"):
        table.unlink()
    assert "the Hugging Face dataset cannot be read" in refusal(str(tmp_path / "saved"))


class Hub:
    """Stands in for the hub: remembers what was asked for, answers or fails."""

    def __init__(self, answer: object) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    def load_dataset(self, *arguments: object, **options: object) -> object:
        self.asked.append((arguments, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def hub(answer: object, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(answer)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


def test_owner_slash_name_is_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    asked = hub(datasets.DatasetDict({"train": one, "validation": one}), monkeypatch)
    source = read_source("owner/name:main")
    assert asked.asked == [(("owner/name", "main"), {})]
    assert [row.side for row in source.rows] == ["train", "validation"]
    assert source.kind == "Hugging Face hub dataset owner/name:main (train, validation)"


def test_without_a_connection_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(ConnectionError("Couldn't reach 'owner/name' on the Hub"), monkeypatch)
    told = refusal("owner/name")
    assert "no file or directory owner/name" in told and "save_to_disk" in told


def test_a_hub_dataset_that_needs_a_configuration_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(ValueError("Config name is missing. Please pick one among: ['main', 'socratic']"), monkeypatch)
    told = refusal("openai/gsm8k")
    assert "['main', 'socratic']" in told and "openai/gsm8k:configuration" in told


def test_a_hub_dataset_of_foreign_splits_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    hub(datasets.DatasetDict({"train_sft": one, "test_sft": one}), monkeypatch)
    assert "the splits 'train_sft', 'test_sft' are none of train" in refusal("owner/name")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(ConnectionError(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "data" / "support.jsonl", LINES)
    assert "data/suport.jsonl does not exist. Did you mean 'support.jsonl'?" in refusal("data/suport.jsonl")
    assert "data/suport does not exist" in refusal("data/suport")
    assert "other/suport.csv does not exist" in refusal("other/suport.csv")
    assert asked.asked == []


def test_a_url_is_read_through_fsspec() -> None:
    fsspec.filesystem("memory").pipe_file("/sources/rows.jsonl", LINES)
    source = read_source("memory://sources/rows.jsonl")
    assert (len(source.rows), source.kind, source.rows[1].place) == (2, "JSON lines from memory://", "line 2")


def test_a_url_may_be_a_directory() -> None:
    for name in ("train", "test"):
        fsspec.filesystem("memory").pipe_file(f"/sources/split/{name}.jsonl", LINES)
    source = read_source("memory://sources/split")
    assert [row.side for row in source.rows] == ["train", "train", "hold_out", "hold_out"]


def test_a_mistake_behind_a_url_names_the_url() -> None:
    fsspec.filesystem("memory").pipe_file("/sources/bad.csv", b"a,b\n1\n")
    assert "memory://sources/bad.csv: line 2: 1 cell, but 2 columns" in refusal("memory://sources/bad.csv")


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    location = written(tmp_path / "a.jsonl", LINES)
    assert len(read_source(f"file://{location}").rows) == 2
    assert f"{tmp_path}/b.jsonl does not exist. Did you mean 'a.jsonl'?" in refusal(f"file://{tmp_path}/b.jsonl")


def test_a_missing_file_behind_a_url_is_told() -> None:
    assert refusal("memory://sources/nowhere.json") == "memory://sources/nowhere.json does not exist."


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp"), ("webdav", "webdav4")])
def test_a_url_whose_package_is_missing_names_it(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError(f"Install it to access {scheme}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert f"pip install {package}" in refusal(f"{scheme}://bucket/rows.jsonl")


def test_an_unknown_scheme_names_the_nearest() -> None:
    assert "Protocol not known: htps. Did you mean 'https'?" in refusal("htps://example.org/a.json")


def test_rows_of_several_files_are_named_by_file(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        written(tmp_path / f"{name}.jsonl", LINES * 6)
    rows = read_source(str(tmp_path)).rows
    assert rows_named([rows[1], rows[3], rows[13]]) == "train.jsonl lines 2, 4, valid.jsonl line 2"
    assert rows_named(rows).endswith("9, 10 and 14 more")


def test_a_line_of_one_file_is_called_a_row(tmp_path: Path) -> None:
    rows = read_source(written(tmp_path / "a.jsonl", LINES)).rows
    assert rows_named(rows) == "rows 1, 2"

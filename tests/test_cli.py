"""What a user sees: exit code and message, from bad input to a finished run."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from finetune_dataflow.cli import main, options
from finetune_dataflow.engine import files
from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
Arguments = dict[str, Any]


def words(arguments: Arguments) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def good(inputs: dict[str, Any]) -> Arguments:
    """A command line that works."""
    return {**inputs}


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must end with exit code 2, without a traceback."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "Traceback" not in error
    return error


BAD_FILES = {
    "empty.json": (b"", "is empty. Expected a JSON list"),
    "blank.jsonl": (b" \n\n", "is empty"),
    "not.json": (b"[{'a': 1}]", "line 1, column 3: not JSON"),
    "half.json": (b'[{"question": "a", "reply": "b"}', "not JSON"),
    "object.json": (b'{"question": "a", "reply": "b"}', "expected a JSON list of objects, found an object"),
    "number.json": (b"3", "expected a JSON list of objects, found a number"),
    "nothing.json": (b"[]", "the list is empty"),
    "mixed.json": (b'[{"question": "a", "reply": "b"}, 7, "x"]', "found a number in rows 2, 3"),
    "line.jsonl": (b'{"question": "a", "reply": "b"}\n{"question": \n', "line 2: not JSON"),
    "lists.jsonl": (b'["a", "b"]\n', "found a list in row 1"),
    "latin.json": ('[{"question": "caf\xe9", "reply": "b"}]'.encode("latin-1"), "line 1: not UTF-8 (byte 0xe9"),
    "missing.json": (
        b'[{"question": "a", "reply": "b"}, {"question": "c", "answer": "d"}]',
        "the key 'reply' is missing in row 2. Row 2 has the keys 'answer', 'question'.",
    ),
    "near.json": (b'[{"question": "a", "replies": "b"}]', "Did you mean 'replies'?"),
    "blank-text.json": (
        b'[{"question": "a", "reply": "b"}, {"question": " ", "reply": "b"}, {"question": "", "reply": ""}]',
        "'question' is empty in rows 2, 3",
    ),
    "no-text.json": (
        b'[{"question": "a", "reply": 5}, {"question": "a", "reply": null}]',
        "'reply' must be text; found a number in rows 1, 2",
    ),
    "deep.json": (b"[" * 200_000, "nested too deeply"),
    "surrogate.json": (b'[{"question": "\\ud800", "reply": "b"}]', "half a character"),
    "digits.json": (b'[{"question": "a", "reply": ' + b"1" * 5000 + b"}]", "not readable as JSON"),
    "few.json": (
        b'[{"question": "a", "reply": "b"}, {"question": "c", "reply": "d"}]',
        "2 rows (2 different inputs) leave",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_named_with_what_is_wrong(
    name: str, good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    error = failing(words({**good, "data_path": path}), capsys)
    assert expected in error
    if name != "few.json":
        assert str(path) in error
    assert not Path(good["output_dir"]).exists()


def test_a_missing_data_file_is_named_with_its_nearest(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Path(good["data_path"]).with_name("suport.json")
    error = failing(words({**good, "data_path": missing}), capsys)
    assert f"{missing} does not exist. Did you mean 'support.json'?" in error


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown": (["--batch-siz", "3"], "Unknown option 'batch_siz'. Did you mean 'batch_size'?"),
    "unknown by set": (["--set", "epoch=3"], "Did you mean 'epochs'?"),
    "set without value": (["--set", "epochs"], "expected name=value"),
    "without value": (["--epochs"], "--epochs needs a value"),
    "a path that is none": (["--data", "~nosuchuser/x.json"], "'~nosuchuser/x.json' is not a path"),
    "a name too long": (["--data-path", "x" * 5000], "is not a path"),
    "a seed below zero": (["--seed", "-1"], "random_state=-1 is out of range"),
    "a seed too large": (["--seed", "100000000000000000"], "random_state=100000000000000000 is out of range"),
    "a share of nothing": (["--train-size", "1e-320"], "train_size=1e-320 is out of range"),
    "one key twice": (["--output-text-key", "question"], "are both 'question'"),
    "nothing fits": (["--max-seq-length", "8"], "rows of a set are longer than max_seq_length=8"),
    "no hub name": (["--model-id", "a/b--c"], "model_id='a/b--c': there is no such directory here"),
    "start twice": (["--start", "base", "--start", "presaved"], "--start is given twice"),
    "a stray word": (["3"], "'3' was not expected"),
    "wrong type": (["--batch-size", "four"], "batch_size='four': expected a whole number"),
    "a fraction for a whole number": (["--batch-size", "1.5"], "batch_size='1.5': expected a whole number"),
    "text for a number": (["--learning-rate", "fast"], "learning_rate='fast': expected a number"),
    "train_size": (["--train-size", "1.5"], "train_size=1.5 is out of range"),
    "no hold-out": (["--train-size", "0.9", "--validation-size", "0.1"], "leave no rows for the hold-out"),
    "batch_size": (["--batch-size", "0"], "batch_size=0 is out of range. Expected a whole number, 1 or more"),
    "lora_rank": (["--lora-rank", "-2"], "lora_rank=-2 is out of range"),
    "epochs": (["--epochs", "0"], "epochs=0.0 is out of range"),
    "learning_rate": (["--learning-rate", "nan"], "learning_rate=nan is out of range"),
    "max_tokens": (["--max-tokens", "0"], "max_tokens=0 is out of range"),
    "num_layers": (["--num-layers", "3"], "num_layers=3 is out of range. Expected at most 2"),
    "max_seq_length": (["--max-seq-length", "2"], "max_seq_length=2 is out of range"),
    "long_rows": (["--long-rows", "cut"], "long_rows='cut' is unknown. Expected one of 'truncate_prompt'"),
    "twice": (["--seed", "1", "--random-state", "2"], "seed and random_state are the same input"),
    "start": (["--start", "presave"], "Did you mean 'presaved'?"),
    "adapter under base": (["--adapter-path", "x"], 'adapter_path is no input under start="base"'),
    "the old input": (["--model-id-tokenizer", "t5"], "Name the model in model_id"),
    "no such model": (["--model-id", "./nowhere"], "model_id='./nowhere': no such directory or file"),
    "no such configuration": (["-c", "nowhere.yaml"], "The configuration nowhere.yaml cannot be read"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_named_with_what_is_expected(name: str, good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    extra, expected = BAD_OPTIONS[name]
    named = {options.ALIASES.get(name, name) for name in (word.lstrip("-").replace("-", "_") for word in extra)}
    error = failing([*words({k: v for k, v in good.items() if k not in named}), *extra], capsys)
    assert expected in error
    if name != "num_layers":  # the model is looked at when the fit begins
        assert not Path(good["output_dir"]).exists()


def test_all_problems_of_a_command_line_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    error = failing(["--batch-size", "x", "--epoch", "2", "--seed", "y"], capsys)
    assert all(each in error for each in ("batch_size='x'", "Did you mean 'epochs'?", "random_state='y'"))


def test_a_missing_key_option_is_asked_for(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    example = {**good}
    del example["input_text_key"]
    assert "input_text_key is not given" in failing(words(example), capsys)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unknown command 'tran'. Did you mean 'train'?" in failing(["tran"], capsys)


def broken_models(directory: Path) -> dict[str, tuple[Path, str]]:
    def of(name: str, change: Callable[[Path], object]) -> Path:
        made = write_tiny_model(directory / name)
        change(made)
        return made

    def settings(values: dict[str, object]) -> Callable[[Path], object]:
        def change(made: Path) -> None:
            path = made / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return change

    return {
        "settings that are a list": (of("g", lambda made: (made / "config.json").write_text("[1]")), "holds no settings"),
        "no heads": (of("h", settings({"num_attention_heads": 0})), "cannot be"),
        "no weights": (of("a", lambda made: (made / "model.safetensors").unlink()), "has no weights"),
        "no config": (of("b", lambda made: (made / "config.json").unlink()), "has no config.json"),
        "an encoder-decoder": (of("c", settings({"model_type": "t5", "is_encoder_decoder": True})), "encoder-decoder model (t5)"),
        "an unknown architecture": (of("d", settings({"model_type": "nothing"})), "cannot be loaded"),
        "weights cut short": (
            of("e", lambda made: (made / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:900])),
            "cannot be loaded",
        ),
        "no tokenizer": (of("f", lambda made: (made / "tokenizer.json").unlink()), "The tokenizer in"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "settings that are a list",
        "no heads",
        "no weights",
        "no config",
        "an encoder-decoder",
        "an unknown architecture",
        "weights cut short",
        "no tokenizer",
    ],
)
def test_a_bad_model_directory_is_told(name: str, good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, expected = broken_models(tmp_path)[name]
    error = failing(words({**good, "model_id": model}), capsys)
    assert expected in error and str(model) in error


@pytest.fixture
def presaved(good: Arguments, tmp_path: Path) -> Arguments:
    """A command line of `evaluate` that lacks its adapter."""
    kept = ("data_path", "input_text_key", "output_text_key", "model_id", "max_tokens")
    return {**{name: good[name] for name in kept}, "output_dir": tmp_path / "evaluated"}


def test_an_adapter_path_without_an_adapter_is_told(
    presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such directory" in failing(["evaluate", *words({**presaved, "adapter": tmp_path / "no"})], capsys)
    assert "holds no adapter: adapters.safetensors and adapter_config.json missing" in failing(
        ["evaluate", *words({**presaved, "adapter": tmp_path})], capsys
    )


def test_evaluate_without_an_adapter_asks_for_one(presaved: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing: --adapter-path" in failing(["evaluate", *words(presaved)], capsys)


def test_the_main_job_then_its_adapter_evaluated_alone(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    assert (
        "60 rows:" in printed
        and "ROUGE-L" in printed
        and "No verdict: 6 rows it never saw are too few" in printed
        and str(run / "adapters") in printed
    )
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapters", "adapters-last", "config.yaml", "metrics.json", "metrics.jsonl", "predictions.jsonl",
        "label_audit.html", "hold_out_inputs.txt", "row_ledger.jsonl", "lineage.json", "dag.svg", "report.html", ".lock",
    }  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    for group in (metrics, metrics["validation"]):
        assert set(group["base"]) == set(group["finetuned"]) == {
            "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "token_f1", "chrf", "bleu", "length_ratio", "token_limit",
            "loss", "perplexity",
        }  # fmt: skip
        assert set(group["difference"]["rougeL"]) == {"mean", "low", "high", "p_value", "rows_needed"}
        assert sum(group["outcomes"]["rougeL"].values()) == 6
    assert metrics["rows_in"] == 60 == sum(metrics[f"{name}_rows"] for name in ("train", "validation", "hold_out", "dropped"))
    ledger = [json.loads(line) for line in (run / "row_ledger.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in ledger] == list(range(1, 61))
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == metrics["hold_out_rows"]

    assert main(["evaluate", *words({**presaved, "adapter": run / "adapters"})]) == 0
    again = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    assert {k: again[k] for k in ("base", "finetuned", "difference")} == {
        k: metrics[k] for k in ("base", "finetuned", "difference")
    }
    assert again["trained_tokens"] is None


def test_the_same_command_again_shows_the_result_and_computes_nothing(
    good: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(good)) == 0
    first = capsys.readouterr().out
    from finetune_dataflow.engine import generation, losses, training

    for module, name in ((training, "fit"), (generation, "replies"), (losses, "losses_by_row")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed again"))
    assert main(words(good)) == 0
    second = capsys.readouterr().out
    assert "holds this run, finished" in second
    assert second[second.index("Scores on") :] == first[first.index("Scores on") :]


def test_the_resolved_configuration_repeats_the_run(good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(good)) == 0
    capsys.readouterr()
    assert main(["-c", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert "holds this run, finished" in capsys.readouterr().out


def test_a_directory_that_holds_another_run_is_refused_with_what_differs(
    good: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    before = {path: path.read_bytes() for path in Path(good["output_dir"]).rglob("*") if path.is_file()}
    error = failing(words({**good, "learning_rate": 0.02, "seed": 7}), capsys)
    assert "holds another run" in error
    assert "learning_rate is 0.01 there and 0.02 here" in error and "random_state is 42 there and 7 here" in error
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_with_files_of_no_run_is_refused(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(good["output_dir"])
    directory.mkdir()
    (directory / "config.yaml").write_text("mine: true\n")
    assert "has config.yaml, but no lineage.json" in failing(words(good), capsys)
    assert (directory / "config.yaml").read_text() == "mine: true\n"


def test_an_output_directory_that_is_a_file_is_refused(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    Path(good["output_dir"]).write_text("")
    assert "is a file" in failing(words(good), capsys)


def test_an_output_directory_under_a_file_is_refused(good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in failing(words({**good, "output_dir": tmp_path / "file" / "run"}), capsys)


def test_an_output_directory_that_may_not_be_made_is_refused(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even root may make a directory there."""
    assert "cannot be made" in failing(words({**good, "output_dir": "/proc/run"}), capsys)


def test_two_runs_cannot_share_a_directory(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(good["output_dir"])
    directory.mkdir()
    with (directory / ".lock").open("w") as another:  # another process opens the file anew, too
        fcntl.flock(another, fcntl.LOCK_EX)
        assert "is in use by another run" in failing(words(good), capsys)


def test_an_adapter_of_another_model_is_refused(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    capsys.readouterr()
    config = json.loads((write_tiny_model(tmp_path / "other") / "config.json").read_text())
    larger = write_tiny_model(tmp_path / "larger", hidden_size=config["hidden_size"] * 2)
    error = failing(["evaluate", *words({**presaved, "model_id": larger, "adapter": tmp_path / "run" / "adapters"})], capsys)
    assert "does not fit the model in" in error and f"it was made for {good['model_id']}" in error


def test_an_adapter_that_meets_another_base_tokenizer_or_template_than_its_own_is_evaluated_with_a_warning(
    good: Arguments, presaved: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words(good)) == 0
    twin = write_tiny_model(tmp_path / "twin", seed=1)
    tokenizer = json.loads((twin / "tokenizer.json").read_text())
    (twin / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": None, "padding": None}, indent=1))
    here = {**presaved, "model_id": twin, "adapter": tmp_path / "run" / "adapters"}
    assert main(["evaluate", *words({**here, "prompt_format": "mistral"})]) == 0
    said = caplog.text
    for part in ("the base model", "the tokenizer", "the chat template"):
        assert f"trained with another one: {part} here is not that of its training" in said
    assert "the prompt around" not in said


def test_an_adapter_without_notes_that_does_not_fit_is_refused(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As mlx-lm writes it: the shapes alone tell."""
    assert main(words(good)) == 0
    capsys.readouterr()
    path = tmp_path / "run" / "adapters" / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "fingerprints"}))
    larger = write_tiny_model(tmp_path / "larger", hidden_size=64)
    error = failing(["evaluate", *words({**presaved, "model_id": larger, "adapter": tmp_path / "run" / "adapters"})], capsys)
    assert f"does not fit the model in {larger}; it was made for {good['model_id']}" in error


def test_an_adapter_with_half_its_weights_is_refused(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    capsys.readouterr()
    path = tmp_path / "run" / "adapters" / "adapters.safetensors"
    weights = cast(dict[str, mx.array], mx.load(str(path)))
    mx.save_safetensors(str(path), {name: weights[name] for name in sorted(weights)[:4]})
    error = failing(["evaluate", *words({**presaved, "adapter": path.parent})], capsys)
    assert "does not fit" in error and "Missing: " in error


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{}",
        '{"num_layers": "two", "lora_parameters": {"rank": 8, "scale": 1}}',
        '{"num_layers": 2, "lora_parameters": 3}',
        '{"num_layers": 2, "lora_parameters": {"rank": "x", "scale": 1}}',
    ],
)
def test_a_damaged_adapter_config_is_told(
    config: str, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    assert "is no adapter config of mlx-lm's" in failing(["evaluate", *words({**presaved, "adapter": tmp_path})], capsys)


def test_an_evaluation_on_rows_the_fit_used_gives_no_verdict(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed deals the adapter's training rows to the hold-out."""
    assert main(words(good)) == 0
    capsys.readouterr()
    seeds = {**presaved, "adapter": tmp_path / "run" / "adapters", "seed": 7, "train_size": 0.4}
    assert main(["evaluate", *words(seeds)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"No verdict on unseen rows: .* of which its fit used \d+", printed)


def test_an_evaluation_of_an_adapter_that_does_not_say_what_it_saw_does_not_claim_it(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    capsys.readouterr()
    (tmp_path / "run" / "adapters" / "used_inputs.txt").unlink()
    assert main(["evaluate", *words({**presaved, "adapter": tmp_path / "run" / "adapters"})]) == 0
    assert "it may have seen them" in capsys.readouterr().out


def test_a_run_stopped_by_its_first_error_gives_its_directory_up(good: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "num_layers=3" in failing(words({**good, "num_layers": 3}), capsys)
    assert main(words(good)) == 0


def test_a_second_evaluation_that_is_killed_is_not_taken_for_the_first(
    good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(good)) == 0
    write_json = files.write_json

    def killed(path: Path, value: object) -> Path:
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        return write_json(path, value)

    monkeypatch.setattr(files, "write_json", killed)
    assert main(words({**good, "max_tokens": 20})) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert main(words(good)) == 0
    assert "finished" not in capsys.readouterr().out
    assert "max_tokens: 8" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_configuration_of_an_evaluation_repeats_the_evaluation(
    good: Arguments, presaved: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    assert main(["evaluate", *words({**presaved, "adapter": tmp_path / "run" / "adapters"})]) == 0
    capsys.readouterr()
    out = tmp_path / "evaluated"
    assert main(["-c", str(out / "config.yaml"), "--out", str(out)]) == 0
    assert "holds this run, finished" in capsys.readouterr().out


def test_evaluate_with_another_start_is_refused(presaved: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "means --start presaved; found 'base'" in failing(["evaluate", "--start", "base", *words(presaved)], capsys)


def test_a_finished_run_whose_adapter_is_gone_is_made_again(
    good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(good)) == 0
    shutil.rmtree(tmp_path / "run" / "adapters")
    assert main(words(good)) == 0
    assert (tmp_path / "run" / "adapters" / "adapters.safetensors").is_file()


def test_a_yaml_file_gives_inputs_and_the_command_line_wins(
    good: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: nowhere\nseed: 3\nlearning_rate: 1e-2\nlora_parameters:\n  rank: 2\n  scale: 10\n")
    named = {k: v for k, v in good.items() if k not in {"learning_rate"}}
    assert main(["-c", str(path), *words(named)]) == 0
    config = json.loads((tmp_path / "run" / "adapters" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 2, "scale": 10.0, "dropout": 0.0} and config["model"] == good["model_id"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [", "bad.yaml, line 1, column 5: not YAML"), ("- 1", "expected names with values"),
     ("batch_size: true", "bad.yaml: batch_size=True: expected a"), ("batchsize: 3", "Did you mean 'batch_size'?"),
     ("epochs: soon", "bad.yaml: epochs='soon': expected a number")],
)  # fmt: skip
def test_a_bad_yaml_file_is_told(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert expected in failing(["-c", str(path)], capsys)


@pytest.mark.parametrize("command", [["--help"], ["train", "-h"], ["help"]])
def test_help_names_the_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    assert "train      the main job" in capsys.readouterr().out


def test_help_and_a_bad_option_load_no_model_library() -> None:
    code = (
        "import sys; from finetune_dataflow.cli import main; main(['--help']); main(['--batch-siz', '3']); "
        "print(sorted({'mlx.core', 'transformers', 'datasets', 'evaluate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_inputs_lists_every_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inputs"]) == 0
    printed = capsys.readouterr().out
    assert "batch_size  (int, default 4, start=base only)\n    Rows in one batch." in printed
    assert "data_path  (str, required)" in printed


def test_help_loads_neither_hamilton_nor_pandas() -> None:
    code = (
        "import sys; from finetune_dataflow.cli import main; main(['--help']); "
        "print(sorted({'hamilton', 'pandas'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

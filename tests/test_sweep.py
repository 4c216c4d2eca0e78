"""`run.py sweep`: trials of a real tiny model through the dataflow, killed, resumed, failed, stopped, promoted."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hamilton import driver

import finetune_dataflow
from finetune_dataflow import engine
from finetune_dataflow.cli import main
from finetune_dataflow.cli.options import parse
from finetune_dataflow.cli.sweep import check_parameters
from finetune_dataflow.engine.event_log import EventLog, listening
from finetune_dataflow.sweeps import agent
from finetune_dataflow.sweeps.sweep_file import read_sweep
from tests.tiny_model import write_tiny_model

GRID = {"learning_rate": {"values": [0.001, 0.01]}, "lora_rank": {"values": [2, 4]}}
FIT = ("--num-layers", "1", "--max-tokens", "4", "--epochs", "1", "--evals-per-epoch", "4", "--save-every", "1")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of rows and a tiny model."""
    directory = tmp_path_factory.mktemp("sweep")
    rows = [{"question": f"What is number {n}?", "reply": f"It is {n * 7 % 50}, of course."} for n in range(40)]
    (directory / "rows.json").write_text(json.dumps(rows))
    return directory / "rows.json", write_tiny_model(directory / "model")


def sweep_file(path: Path, parameters: dict[str, Any] = GRID, **others: Any) -> Path:
    """A sweep file as Weights & Biases writes it."""
    metric = {"name": "validation_loss", "goal": "minimize"}
    path.write_text(yaml.safe_dump({"method": "grid", "metric": metric, "parameters": parameters, **others}))
    return path


def arguments(job: tuple[Path, Path], file: Path, out: Path, *more: str) -> list[str]:
    data, model = job
    named = ("--data", str(data), "--model", str(model), "--input-text-key", "question", "--output-text-key", "reply")
    return ["sweep", str(file), "--out", str(out), *named, *FIT, *more]


def trials(out: Path) -> list[dict[str, Any]]:
    """What the trials' own files say, by number."""
    found = sorted((out / "trials").iterdir(), key=lambda each: int(each.name))
    return [json.loads((each / "trial.json").read_text()) for each in found]


def study(out: Path) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.db'}")


@dataclass(frozen=True)
class Swept:
    """A finished sweep over the grid: its file, its directory and what it printed."""

    file: Path
    out: Path
    printed: str


@pytest.fixture(scope="module")
def swept(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    directory = tmp_path_factory.mktemp("swept")
    file, printed = sweep_file(directory / "grid.yaml"), io.StringIO()
    with redirect_stdout(printed):
        assert main(arguments(job, file, directory / "out")) == 0
    return Swept(file, directory / "out", printed.getvalue())


def test_a_grid_is_tried_whole_and_its_best_trial_is_a_run_with_hold_out_scores(swept: Swept) -> None:
    out, made = swept.out, trials(swept.out)
    combinations = [(each["parameters"]["learning_rate"], each["parameters"]["lora_rank"]) for each in made]
    assert combinations == [(0.001, 2), (0.001, 4), (0.01, 2), (0.01, 4)]
    assert {each["state"] for each in made} == {"complete"}
    assert all({*each["metrics"]} == {*agent.METRICS} for each in made)
    best = min(made, key=lambda each: each["value"])
    metrics = json.loads((out / "best" / "metrics.json").read_text())
    assert metrics["verdict"] in swept.printed
    assert metrics["validation"]["finetuned"]["loss"] == pytest.approx(best["value"], rel=1e-6)
    assert (out / "best" / "report.html").is_file() and (out / "sweep.html").is_file()
    weights = Path("adapters") / "adapters.safetensors"
    assert (out / "best" / weights).read_bytes() == (out / "trials" / str(best["number"]) / weights).read_bytes()
    assert [each.value for each in study(out).trials] == [each["value"] for each in made]


def test_no_trial_asks_for_replies_or_losses_of_the_hold_out(swept: Swept) -> None:
    dr = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build()
    asked = {each.name for each in dr.what_is_upstream_of(*agent.ASKED)}
    models = {"hold_out_base_replies", "hold_out_tuned_replies", "hold_out_base_losses", "hold_out_tuned_losses"}
    assert "validation_tuned_replies" in asked and not asked & models
    assert not [*(swept.out / "trials").rglob("predictions.jsonl")]
    assert (swept.out / "best" / "predictions.jsonl").is_file()


def test_a_sweep_that_was_stopped_goes_on_with_the_trial_it_was_at(
    job: tuple[Path, Path], swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", swept.file
    write, lines = EventLog.write, []

    def killed(log: EventLog, **values: object) -> None:
        write(log, **values)
        lines.append(values)
        if log.path.parent.name == "1" and values["event"] == "train" and values["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(EventLog, "write", killed)
        assert main(arguments(job, file, out)) == 130
    assert [each.state.name for each in study(out).trials] == ["COMPLETE", "RUNNING"]
    assert main(arguments(job, file, out)) == 0
    values = [each["value"] for each in trials(out)]
    assert values == [each["value"] for each in trials(swept.out)]
    events = [json.loads(line) for line in (out / "trials" / "1" / "metrics.jsonl").read_text().splitlines()]
    assert [each["event"] for each in events].count("resume") == 1
    assert len(study(out).trials) == 4


def test_a_finished_sweep_is_shown_again_and_nothing_is_fitted(
    job: tuple[Path, Path], swept: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine.training, "fit", None)
    assert main(arguments(job, swept.file, swept.out)) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == swept.printed.splitlines()[-3:]


def test_a_failed_trial_is_a_row_with_its_error_and_the_others_go_on(
    job: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = sweep_file(tmp_path / "grid.yaml", {"lora_keys": {"values": [["self_attn.q_proj"], ["no.such.layer"]]}})
    assert main(arguments(job, file, out)) == 0
    states = [(each["state"], each["error"]) for each in trials(out)]
    assert states[0] == ("complete", None)
    assert states[1][0] == "failed" and "no.such.layer" in states[1][1]
    assert [each.state.name for each in study(out).trials] == ["COMPLETE", "FAIL"]
    assert "no.such.layer" in capsys.readouterr().out and "no.such.layer" in (out / "sweep.html").read_text()
    assert "Traceback" in (out / "trials" / "1" / "error.txt").read_text()


def test_a_trial_that_is_far_behind_is_stopped_early(job: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = sweep_file(
        tmp_path / "grid.yaml",
        {"learning_rate": {"values": [0.01, 0.009, 1e-7]}},
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
    )
    assert main(arguments(job, file, out)) == 0
    made = trials(out)
    assert made[0]["state"] == "complete" and made[2]["state"] == "stopped"
    assert len(made[2]["curve"]) == 2
    assert study(out).trials[2].state.name == "PRUNED"


def test_a_rouge_metric_keeps_the_adapter_that_is_best_by_it(job: tuple[Path, Path], tmp_path: Path) -> None:
    out, metric = tmp_path / "out", {"name": "rougeL", "goal": "maximize"}
    main(arguments(job, sweep_file(tmp_path / "one.yaml", {"lora_rank": {"values": [2]}}, metric=metric), out))
    assert yaml.safe_load((out / "trials" / "0" / "config.yaml").read_text())["best_metric"] == "rougeL"


def test_tokens_and_frozen_states_are_computed_once_for_all_trials(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = json.loads(job[0].read_text())
    monkeypatch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "other.json"
    data.write_text(json.dumps([{**each, "reply": f"{each['reply']} {tmp_path.name}"} for each in rows]))
    encode, calls = engine.chat.encode_conversations, []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return encode(*given, **named)

    monkeypatch.setattr(engine.chat, "encode_conversations", counted)
    with caplog.at_level("INFO", "finetune_dataflow"):
        main(
            arguments(
                (data, job[1]), sweep_file(tmp_path / "one.yaml", {"lora_rank": {"values": [2]}}), tmp_path / "one", "--no-cache"
            )
        )
        of_one = len(calls)
        main(arguments((data, job[1]), sweep_file(tmp_path / "grid.yaml"), tmp_path / "four", "--no-cache"))
    assert len(calls) == 2 * of_one
    assert [each.message.startswith("Computing the states") for each in caplog.records].count(True) == 2


REFUSED = [
    ({"learning_rat": {"values": [1]}}, {}, "learning_rate"),
    ({"train_size": {"values": [0.5, 0.6]}}, {}, "it decides which rows are held out"),
    ({"random_state": {"values": [1, 2]}}, {}, "it decides which rows are held out"),
    ({"output_dir": {"values": ["a", "b"]}}, {}, "a directory of its own"),
    ({"lora_rank": {"values": [4, -1]}}, {}, "lora_rank=-1"),
    ({"lora_rank": {"values": [4, "eight"]}}, {}, "lora_rank='eight'"),
    ({"optimizer": {"values": ["adamw", "adamm"]}}, {}, "adamw"),
    ({"learning_rate": {"min": 0.1, "max": 0.01}}, {"method": "random"}, "learning_rate"),
    ({"learning_rate": {"values": []}}, {}, "learning_rate"),
    (GRID, {"metric": {"name": "val_loss", "goal": "minimize"}}, "validation_loss"),
    (
        GRID,
        {"metric": {"name": "train_loss"}, "early_terminate": {"type": "hyperband", "min_iter": 2}},
        "early_terminate needs a metric that is known at each validation",
    ),
]


@pytest.mark.parametrize(("parameters", "others", "named"), REFUSED)
def test_a_mistake_in_the_file_is_told_before_anything_is_written(
    job: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    parameters: dict[str, Any],
    others: dict[str, Any],
    named: str,
) -> None:
    file, out = sweep_file(tmp_path / "wrong.yaml", parameters, **others), tmp_path / "out"
    assert main(arguments(job, file, out)) == 2
    said = capsys.readouterr().err
    assert "wrong.yaml" in said and named in said and "Traceback" not in said
    assert not out.exists()


def test_another_sweep_in_the_directory_is_refused_naming_what_differs(
    job: tuple[Path, Path], swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = sweep_file(tmp_path / "other.yaml", {**GRID, "lora_rank": {"values": [4, 8]}})
    assert main(arguments(job, other, swept.out)) == 2
    assert "holds another sweep: parameters" in capsys.readouterr().err


def test_a_damaged_study_is_told_and_its_trials_are_not_fitted_again(
    job: tuple[Path, Path],
    swept: Swept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = shutil.copytree(swept.out, tmp_path / "out")
    (out / "study.db").write_bytes(b"not a database" * 100)
    assert main(arguments(job, swept.file, out)) == 2
    said = capsys.readouterr().err
    assert "study.db cannot be read" in said and "Traceback" not in said
    (out / "study.db").unlink()
    monkeypatch.setattr(engine.training, "fit", None)
    assert main(arguments(job, swept.file, out)) == 0
    assert [each.value for each in study(out).trials] == [each.value for each in study(swept.out).trials]


def test_a_listener_hears_events_after_they_are_written_and_may_end_the_writer(tmp_path: Path) -> None:
    heard: list[object] = []

    def listener(event: Any) -> None:
        heard.append((event["step"], (tmp_path / "log.jsonl").read_text().count("\n")))
        if event["step"] == 2:
            raise agent.TrialStopped

    with EventLog(tmp_path / "log.jsonl") as log:
        log.write(event="train", step=0)
        with pytest.raises(agent.TrialStopped), listening(listener):
            log.write(event="train", step=1)
            log.write(event="train", step=2)
        log.write(event="train", step=3)
    assert heard == [(1, 2), (2, 3)]


@pytest.mark.parametrize("place", ["examples/sweep.yaml", "docs/sweeps.md"])
def test_the_sweep_files_that_are_shown_can_be_read(place: str, tmp_path: Path) -> None:
    text = (Path(finetune_dataflow.__file__).parent.parent / place).read_text(encoding="utf-8")
    file = tmp_path / "shown.yaml"
    file.write_text(text.partition("```yaml\n")[2].partition("```")[0] if place.endswith(".md") else text, encoding="utf-8")
    options = parse(["--data", "x", "--input-text-key", "question", "--output-text-key", "reply"], "base")
    found = read_sweep(file, *agent.spellings(options), agent.METRICS)
    check_parameters(found, options)
    assert "lora_rank" in [each.name for each in found.parameters]


def test_each_trial_is_recorded_for_wandb_in_one_group(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    out, file = tmp_path / "out", sweep_file(tmp_path / "one.yaml", {"lora_rank": {"values": [2]}})
    assert main(arguments(job, file, out, "--wandb-project", "support", "--wandb-run", "night")) == 0
    recorded = [*(out / "trials" / "0" / "wandb").glob("offline-run-*/*.wandb")]
    assert len(recorded) == 1
    written = recorded[0].read_bytes()
    assert all(each in written for each in (b"support", b"night-0", b"sweep-trial", b"validation_loss", b"rougeL"))
    assert not (out / "best" / "wandb").exists()

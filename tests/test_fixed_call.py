"""The call of the README, as a user's own script makes it, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hamilton import driver

import finetune_dataflow
from finetune_dataflow.engine.losses import mean_loss
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.errors import UserError

OUTPUTS = [
    "save_best_models", "hold_out_set_predictions",
    "training_and_validation_set_metrics", "finetuned_model_on_validation_set",
]  # fmt: skip
FIT_INPUTS = ("num_layers", "epochs", "learning_rate", "output_dir")


def built(start: str) -> driver.Driver:
    return driver.Builder().with_config({"start": start}).with_modules(finetune_dataflow).build()


def presaved(inputs: dict[str, Any], adapter: Path) -> dict[str, Any]:
    return {**{k: v for k, v in inputs.items() if k not in FIT_INPUTS}, "adapter_path": str(adapter)}


def test_base_fits_predicts_and_scores(inputs: dict[str, Any], rows: list[dict[str, str]], tmp_path: Path) -> None:
    dr = built("base")
    result = dr.execute([*OUTPUTS, "hold_out_set", "validation_set"], inputs=inputs)
    paths = result["save_best_models"]
    assert next(iter(paths.items())) == ("adapter", tmp_path / "run" / "adapters")
    assert paths["config"] == tmp_path / "run" / "adapters" / "adapter_config.json"
    assert all(path.exists() for path in paths.values())
    questions = [row["question"] for row in rows]
    assert [question for question, _ in result["hold_out_set_predictions"]] == result["hold_out_set"]["input_text"].tolist()
    assert all(question in questions and isinstance(said, str) for question, said in result["hold_out_set_predictions"])
    metrics = result["training_and_validation_set_metrics"]
    names = ["train_loss", "validation_loss", "validation_perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert list(metrics) == names and all(isinstance(value, float) for value in metrics.values())
    on_validation = result["finetuned_model_on_validation_set"]
    assert on_validation["validation_references"] == result["validation_set"]["output_text"].tolist()
    assert len(on_validation["validation_predictions"]) == len(on_validation["validation_references"])


def test_presaved_gives_the_predictions_and_scores_of_the_run_that_made_the_adapter(inputs: dict[str, Any]) -> None:
    made = built("base").execute(OUTPUTS, inputs=inputs)
    adapter = made["save_best_models"]["adapter"]
    before = {path: path.stat().st_mtime_ns for path in adapter.parent.rglob("*")}
    again = built("presaved").execute(OUTPUTS, inputs=presaved(inputs, adapter))
    assert again["hold_out_set_predictions"] == made["hold_out_set_predictions"]
    assert again["finetuned_model_on_validation_set"] == made["finetuned_model_on_validation_set"]
    scores = dict(made["training_and_validation_set_metrics"])
    del scores["train_loss"]
    assert again["training_and_validation_set_metrics"] == scores
    assert again["save_best_models"]["adapter"] == adapter
    assert {path: path.stat().st_mtime_ns for path in adapter.parent.rglob("*")} == before


def test_the_order_of_the_outputs_does_not_change_them(inputs: dict[str, Any], tmp_path: Path) -> None:
    one = built("base").execute(OUTPUTS, inputs=inputs)
    other = built("base").execute(OUTPUTS[::-1], inputs={**inputs, "output_dir": str(tmp_path / "other")})
    assert {name: other[name] for name in OUTPUTS[1:]} == {name: one[name] for name in OUTPUTS[1:]}


def test_a_finished_fit_is_taken_as_it_is(inputs: dict[str, Any]) -> None:
    first = built("base").execute(["finished_fit"], inputs=inputs)["finished_fit"]
    weights = first.run_directory / "adapters" / "adapters.safetensors"
    before = weights.stat().st_mtime_ns
    again = built("base").execute(["finished_fit"], inputs={**inputs, "max_tokens": 3})["finished_fit"]
    assert again == first and weights.stat().st_mtime_ns == before


def test_a_set_can_be_overridden(inputs: dict[str, Any]) -> None:
    own = pd.DataFrame({"row": [901, 902], "input_text": ["My own?", "And this?"], "output_text": ["Yes.", "No."]})
    plain = built("base").execute(["hold_out_set"], inputs=inputs)
    result = built("base").execute(["hold_out_set_predictions", "row_ledger"], inputs=inputs, overrides={"hold_out_set": own})
    assert [question for question, _ in result["hold_out_set_predictions"]] == ["My own?", "And this?"]
    assert result["row_ledger"].query("set == 'hold_out'")["row"].tolist() == [901, 902]
    assert result["row_ledger"].query("reason == 'in_no_set'")["row"].tolist() == plain["hold_out_set"]["row"].tolist()


@pytest.mark.parametrize(
    "name",
    ["records", "row_sides", "train_set", "train_conversations", "train_tokens", "base_model_path", "fit_settings",
     "run_identity", "evaluated_adapter", "hold_out_tuned_replies", "hold_out_base_scores", "verdict"],
)  # fmt: skip
def test_any_node_can_be_overridden_by_its_own_value(name: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    value = built("base").execute([name], inputs=inputs)[name]
    again = {**inputs, "output_dir": str(tmp_path / "again")}
    result = built("base").execute([*OUTPUTS, "run_metrics"], inputs=again, overrides={name: value})
    assert result["run_metrics"]["hold_out_rows"] > 0 and set(result) == {*OUTPUTS, "run_metrics"}


def test_an_overridden_set_makes_another_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Its directory is refused to it where the plain run stands, and the plain run does not get its adapter."""
    plain = built("base").execute(["finished_fit", "train_set"], inputs=inputs)
    fewer = {"train_set": plain["train_set"].head(8)}
    with pytest.raises(UserError, match="fingerprint of train_set"):
        built("base").execute(["finished_fit"], inputs=inputs, overrides=fewer)
    other = {**inputs, "output_dir": str(tmp_path / "other")}
    assert built("base").execute(["finished_fit"], inputs=other, overrides=fewer)["finished_fit"].summary.steps == 4
    with pytest.raises(UserError, match="fingerprint of train_set"):
        built("base").execute(["finished_fit"], inputs=other)


def test_the_saved_adapter_scores_what_the_metrics_say(inputs: dict[str, Any], tiny_model: Path) -> None:
    result = built("base").execute([*OUTPUTS, "validation_tokens"], inputs=inputs)
    adapter = result["save_best_models"]["adapter"]
    again = mean_loss(load_model(tiny_model, adapter), result["validation_tokens"], 4)
    assert again == pytest.approx(result["training_and_validation_set_metrics"]["validation_loss"], rel=1e-5)


def test_the_call_runs_from_a_file_outside_the_package(inputs: dict[str, Any], tmp_path: Path) -> None:
    """As written in the README, in a directory of the user's, without an output directory."""
    given = {key: value for key, value in inputs.items() if key != "output_dir"}
    script = tmp_path / "mine.py"
    script.write_text(
        "from hamilton import driver\nimport finetune_dataflow\n\n"
        'dr = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build()\n'
        f"result = dr.execute({OUTPUTS!r}, inputs={given!r})\n"
        'print(result["save_best_models"]["adapter"])\n'
    )
    root = str(Path(finetune_dataflow.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / done.stdout.strip().splitlines()[-1]
    assert adapter.parent.parent == tmp_path / "runs" and adapter.parent.name.startswith("support-")
    assert json.loads((adapter / "adapter_config.json").read_text())["fine_tune_type"] == "lora"

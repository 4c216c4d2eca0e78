"""The main job on the embedded model: real weights, real tokenizer, rows of the example."""

import json
import re
from pathlib import Path

import pytest

from finetune_dataflow.cli import main
from finetune_dataflow.embedded_model import embedded_model_directory
from finetune_dataflow.engine.chat import load_encoder

EXAMPLE = Path(__file__).parent.parent / "example-support-dataset.json"


def test_a_small_fit_of_the_embedded_model_learns_and_can_be_evaluated_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(EXAMPLE.read_text(encoding="utf-8"))[:60]
    data = tmp_path / "some.json"
    data.write_text(json.dumps(rows))
    common = ["--data", str(data), "--input-text-key", "question", "--output-text-key", "reply", "--max-tokens", "12"]
    fit = ["--num-layers", "4", "--learning-rate", "1e-3", "--evals-per-epoch", "1", "--out", str(tmp_path / "run")]
    assert main([*common, *fit]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["finetuned"]["loss"] < metrics["base"]["loss"] - 0.3
    assert metrics["fit"]["best_validation_loss"] < metrics["fit"]["first_validation_loss"] - 0.3
    assert "proven equal" in metrics["fit"]["loss_path"]
    adapter = str(tmp_path / "run" / "adapters")
    assert main(["evaluate", *common, "--adapter", adapter, "--out", str(tmp_path / "again")]) == 0
    again = (tmp_path / "again" / "predictions.jsonl").read_text()
    assert again == (tmp_path / "run" / "predictions.jsonl").read_text()


def test_the_example_is_what_the_readme_says() -> None:
    rows = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    plain = [" ".join(re.findall(r"\w+", row["question"].lower())) for row in rows]
    assert len(rows) >= 300 and len(set(plain)) == len(rows) == len({row["reply"] for row in rows})
    assert all(set(row) == {"question", "reply"} and 15 <= len(row["reply"].split()) <= 35 for row in rows)


def test_the_prompt_of_the_embedded_model_is_its_chat_template() -> None:
    encoder = load_encoder(embedded_model_directory())
    ids = encoder.prompt_ids([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}])
    assert encoder.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(2) == 2  # the control token <|im_end|> ends two turns; the one in the question is plain text

"""The main job as `make run` does it, and its adapter in mlx-lm's own commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the finished job on the example."""
    directory = tmp_path_factory.mktemp("job") / "run"
    done = subprocess.run([sys.executable, "run.py", "--out", str(directory)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The tuned model is better than the base model" in done.stdout
    return directory


def test_the_tuned_model_is_clearly_better_on_rows_it_never_saw(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert 20 <= metrics["hold_out_rows"] <= 50
    assert metrics["difference"]["rougeL"]["mean"] >= 0.05 and metrics["difference"]["rougeL"]["low"] > 0
    assert metrics["difference"]["loss"]["high"] < 0


def mlx_lm(*words: str) -> str:
    """What a command of mlx-lm prints."""
    done = subprocess.run([sys.executable, "-m", "mlx_lm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mlx_lm_generates_with_the_adapter_what_the_run_predicted(run: Path) -> None:
    from finetune_dataflow.embedded_model import embedded_model_directory

    first = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    said = mlx_lm(
        "generate", "--model", str(embedded_model_directory()), "--adapter-path", str(run / "adapters"),
        "--prompt", first["input"], "--max-tokens", "100", "--temp", "0", "--verbose", "False",
    )  # fmt: skip
    assert said.strip() == first["finetuned"]


def test_mlx_lm_fuses_the_adapter_and_the_fused_model_says_the_same(run: Path, tmp_path: Path) -> None:
    from finetune_dataflow.embedded_model import embedded_model_directory

    fused = tmp_path / "fused"
    mlx_lm(
        "fuse", "--model", str(embedded_model_directory()), "--adapter-path", str(run / "adapters"),
        "--save-path", str(fused),
    )  # fmt: skip
    second = json.loads((run / "predictions.jsonl").read_text().splitlines()[1])
    said = mlx_lm(
        "generate",
        "--model",
        str(fused),
        "--prompt",
        second["input"],
        "--max-tokens",
        "100",
        "--temp",
        "0",
        "--verbose",
        "False",
    )
    assert said.strip() == second["finetuned"]

"""The directory that `prepare --to mlx` writes, in mlx-lm's own trainer, with the command that is printed for it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("rows", [60, 30])
def test_mlx_lm_trains_a_step_on_it_and_tests_it(rows: int, tmp_path: Path) -> None:
    data, model, out = tmp_path / "rows.json", write_tiny_model(tmp_path / "model"), tmp_path / "prepared"
    data.write_text(json.dumps([{"question": f"What is number {n}?", "reply": f"It is {n * 7 % 50}."} for n in range(rows)]))
    prepared = subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), "prepare", "--to", "mlx", "--out", str(out), "--data", str(data),
         "--input-text-key", "question", "--output-text-key", "reply", "--model", str(model)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    counts = {name: len((out / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "valid", "test")}
    assert sum(counts.values()) == rows
    python, *command = shlex.split(prepared.stdout.splitlines()[-1])
    assert python == "python"
    assert ("--batch-size" in command) == (min(counts.values()) < 4)
    trained = subprocess.run(
        [sys.executable, *command, "--iters", "1", "--num-layers", "2", "--steps-per-report", "1", "--test",
         "--adapter-path", str(tmp_path / "adapters")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    printed = re.sub(r"\x1b\[[\d;]*m", "", trained.stdout)
    losses = re.findall(r"^ +1 +(?:val )?(\d\.\d+)|^Test loss (\d\.\d+)", printed, re.MULTILINE)
    # A random model over 259 tokens has learned nothing: ln 259 = 5.56, and a little more.
    assert len(losses) == 3 and all(5.0 < float(one or other) < 6.5 for one, other in losses), printed
    weights = load_file(tmp_path / "adapters" / "adapters.safetensors")
    stepped = [each.any() for name, each in weights.items() if name.endswith("lora_b")]
    assert stepped and all(stepped)  # these begin as zeros

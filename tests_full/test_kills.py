"""A run that is killed again and again ends with the same bytes as one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model

KILLS, EPOCHS, REPOSITORY = 30, 130, Path(__file__).parent.parent


def command(data: Path, model: Path, out: Path) -> list[str]:
    """A run with everything that has a state: dropout, accumulation, Adam, a best adapter that changes."""
    return [
        sys.executable, str(REPOSITORY / "run.py"), "train", "--data", str(data), "--model", str(model), "--out", str(out),
        "--input-text-key", "question", "--output-text-key", "reply", "--num-layers", "2", "--epochs", str(EPOCHS),
        "--learning-rate", "0.002", "--lora-dropout", "0.1", "--grad-accumulation-steps", "3", "--save-every", "1",
        "--evals-per-epoch", "1", "--max-tokens", "4",
    ]  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((out / name / "adapters.safetensors").read_bytes()).hexdigest()
        for name in ("adapters", "adapters-last")
    }


def events(out: Path, kind: str) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == kind]


def learned(out: Path) -> list[tuple[float, float]]:
    return [(each["step"], each["loss"]) for each in events(out, "train")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Data, model, and the directory of a run that nobody interrupted."""
    directory = tmp_path_factory.mktemp("kills")
    rows = [{"question": f"What is number {n}?", "reply": f"It is {n * 7 % 50}, of course."} for n in range(60)]
    data, model, whole = directory / "rows.json", write_tiny_model(directory / "model"), directory / "whole"
    data.write_text(json.dumps(rows))
    subprocess.run(command(data, model, whole), check=True, capture_output=True, cwd=directory)
    return data, model, whole


def killed_life(arguments: list[str], out: Path, moments: random.Random, directory: Path) -> str | None:
    """Start the run, kill it at a random moment of its fit and say what it was doing; None where it ended before."""
    before = (out / "metrics.jsonl").stat().st_mtime_ns if (out / "metrics.jsonl").is_file() else 0
    process = subprocess.Popen(arguments, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_mtime_ns > before:
            break
        time.sleep(0.005)
    time.sleep(moments.uniform(0.0, 0.6))
    if process.poll() is not None:
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half_written = [*out.glob("checkpoints/.*"), *out.glob("adapters/.*")]
    return f"writing {half_written[0].parent.name}" if half_written else "between writes"


def test_a_run_killed_thirty_times_ends_with_the_bytes_of_one_that_never_was(
    job: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model, whole = job
    moments, round_number = random.Random(4), 0
    table: list[tuple[float, str, Path]] = []
    while len(table) < KILLS:
        out = tmp_path / f"run-{round_number}"
        arguments = command(data, model, out)
        while len(table) < KILLS:
            doing = killed_life(arguments, out, moments, tmp_path)
            if doing is None:
                break
            done = learned(out)
            table.append((done[-1][0] if done else 0, doing, out))
        subprocess.run(arguments, check=True, capture_output=True, cwd=tmp_path)
        assert digests(out) == digests(whole)
        assert learned(out) == learned(whole)
        round_number += 1
    resumed = {out: [each["step"] for each in events(out, "resume")] for _, _, out in table}
    with capsys.disabled():
        print("\nkilled after update | while         | run: resumed from")
        for step, doing, out in table:
            print(f"{step:19} | {doing:22} | {out.name}")
        for out, steps in resumed.items():
            print(f"{out.name} went on from updates {steps}; bytes equal to the uninterrupted run")
    assert any(doing.startswith("writing") for _, doing, _ in table)
    assert sum(map(len, resumed.values())) >= KILLS // 2
    assert not [*tmp_path.rglob("checkpoints/.*")]


def test_ctrl_c_finishes_the_step_saves_and_the_same_command_goes_on(job: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, model, whole = job
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(data, model, out), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    )  # fmt: skip
    while process.poll() is None and not (out / "checkpoints").is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "The same command goes on from there." in said and "Traceback" not in said
    subprocess.run(command(data, model, out), check=True, capture_output=True, cwd=tmp_path)
    assert digests(out) == digests(whole) and learned(out) == learned(whole)
    assert len(events(out, "resume")) == 1

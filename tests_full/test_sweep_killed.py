"""A sweep of six trials that is killed and gone on with, and one in processes: the same trials with the same values."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml

from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
ALONE = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as each of two processes has it: other sums differ by rounding


def command(directory: Path, out: str, *more: str) -> list[str]:
    """A sweep over six trials of some seconds each."""
    return [
        sys.executable, str(REPOSITORY / "run.py"), "sweep", str(directory / "sweep.yaml"), "--out", str(directory / out),
        "--data", str(directory / "rows.json"), "--model", str(directory / "model"), "--input-text-key", "question",
        "--output-text-key", "reply", "--num-layers", "1", "--epochs", "4", "--max-tokens", "4", "--save-every", "5", *more,
    ]  # fmt: skip


def trials(directory: Path) -> list[tuple[dict[str, object], float]]:
    found = [json.loads(path.read_text()) for path in (directory / "trials").glob("*/trial.json")]
    return [(each["parameters"], each["value"]) for each in sorted(found, key=lambda each: each["number"])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a tiny model, a random search for six trials, and the directory `whole` of one that nobody interrupted."""
    directory = tmp_path_factory.mktemp("sweep")
    rows = [{"question": f"What is number {n}?", "reply": f"It is {n * 7 % 50}, of course."} for n in range(60)]
    (directory / "rows.json").write_text(json.dumps(rows))
    write_tiny_model(directory / "model")
    search = {
        "method": "random", "run_cap": 6, "metric": {"name": "validation_loss", "goal": "minimize"},
        "parameters": {
            "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, "lora_rank": {"values": [2, 4, 8]}
        },
    }  # fmt: skip
    (directory / "sweep.yaml").write_text(yaml.safe_dump(search))
    subprocess.run(command(directory, "whole"), check=True, capture_output=True, cwd=directory, env=ALONE)
    return directory


def test_a_sweep_killed_in_its_third_trial_ends_as_one_that_never_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    third = place / "killed" / "trials" / "2" / "metrics.jsonl"
    process = subprocess.Popen(
        command(place, "killed"),
        cwd=place,
        env=ALONE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (third.is_file() and '"step": 7,' in third.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{place / 'killed' / 'study.db'}")
    assert [each.state.name for each in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    subprocess.run(command(place, "killed"), check=True, capture_output=True, cwd=place, env=ALONE)
    assert trials(place / "killed") == trials(place / "whole")
    events = [json.loads(line)["event"] for line in third.read_text().splitlines()]
    assert events.count("resume") == 1
    verdicts = [json.loads((place / name / "best" / "metrics.json").read_text())["verdict"] for name in ("whole", "killed")]
    assert verdicts[0] == verdicts[1]
    with capsys.disabled():
        found = [json.loads(path.read_text()) for path in (place / "whole" / "trials").glob("*/trial.json")]
        seconds = [each["seconds"] for each in sorted(found, key=lambda each: each["number"])]
        print(f"\nseconds of the trials: {', '.join(f'{each:.1f}' for each in seconds)}")


def test_two_processes_make_the_trials_that_one_makes(place: Path) -> None:
    subprocess.run(command(place, "two", "--jobs", "2"), check=True, capture_output=True, cwd=place, env=ALONE)
    one, two = trials(place / "whole"), trials(place / "two")
    assert [parameters for parameters, _ in one] == [parameters for parameters, _ in two]
    assert [value for _, value in one] == pytest.approx([value for _, value in two], rel=1e-6)


def test_a_process_that_is_killed_costs_its_trial_one_more_start(place: Path) -> None:
    out = place / "shot"
    process = subprocess.Popen(
        command(place, "shot", "--jobs", "2"), cwd=place, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first = out / "trials" / "0" / "metrics.jsonl"
    while process.poll() is None and not (first.is_file() and '"step": 3,' in first.read_text()):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    shot = [each for each in children if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text()]
    os.kill(int(shot[0]), signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "ended without a word" in said
    assert [parameters for parameters, _ in trials(out)] == [parameters for parameters, _ in trials(place / "whole")]

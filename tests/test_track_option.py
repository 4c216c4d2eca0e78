"""`run.py train --track`: one run in the Hamilton UI with every node green, and a run that goes on where there is no UI."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from finetune_dataflow.cli import main
from tests.test_tracking import MARKERS, REFERENCE, Recorder, serving
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("track")
    rows = [{"question": f"What is number {n}?", "reply": f"It is {REFERENCE} {n * 7 % 50}."} for n in range(40)]
    (directory / "rows.json").write_text(json.dumps(rows))
    return directory / "rows.json", write_tiny_model(directory / "model")


def arguments(job: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    data, model = job
    named = ("--data", str(data), "--model", str(model), "--input-text-key", "question", "--output-text-key", "reply")
    return ["train", *named, "--num-layers", "1", "--max-tokens", "4", "--iters", "2", "--out", str(out), *more]


def test_every_node_of_a_tracked_run_is_green_and_no_text_of_the_data_is_sent(job: tuple[Path, Path], tmp_path: Path) -> None:
    with serving() as server:
        assert main(arguments(job, tmp_path / "run", "--track", "--track-url", server.url)) == 0
        states, runs, sent = server.states(), runs_of(server), server.everything()
    assert {*states.values()} == {"SUCCESS"}
    assert {"train_tokens", "finished_fit", "verdict", "metrics_file", "dag_drawing", "prompt_reply"} <= {*states}
    assert len(runs) == 1 and runs[0]["tags"] == {"run": "run", "start": "base"}
    assert not [marker for marker in MARKERS if marker in sent]


def runs_of(server: Recorder) -> list[dict[str, object]]:
    return list(server.sent("POST", "/dag_runs"))


def test_without_a_ui_there_is_a_warning_and_the_run_is_made(
    job: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert main(arguments(job, tmp_path / "run", "--track", "--track-url", f"http://127.0.0.1:{port}")) == 0
    warned = [each.getMessage() for each in caplog.records if "not tracked" in each.getMessage()]
    assert len(warned) == 1 and "Start it: run.py ui" in warned[0]
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_an_address_without_the_wish_to_be_tracked_is_refused(
    job: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(job, tmp_path / "run", "--track-url", "http://127.0.0.1:8241")) == 2
    assert "Give --track, too." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

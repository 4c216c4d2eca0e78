"""Sweeps on real clusters of Ray and Dask on this machine: the trials of a plain sweep, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest
import yaml

from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
ALONE = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
MODULES = {"ray": "ray", "dask": "distributed"}
EACH = [
    pytest.param(kind, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"{kind} is not installed"))
    for kind, module in MODULES.items()
]


def command(directory: Path, out: Path, *more: str) -> list[str]:
    """A sweep over four trials of some seconds each."""
    return [
        sys.executable, str(REPOSITORY / "run.py"), "sweep", str(directory / "sweep.yaml"), "--out", str(out),
        "--data", str(directory / "rows.json"), "--model", str(directory / "model"), "--input-text-key", "question",
        "--output-text-key", "reply", "--num-layers", "1", "--max-tokens", "4", "--save-every", "5",
        *(() if "--iters" in more else ("--epochs", "6")), *more,
    ]  # fmt: skip


def ended(directory: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(directory, out, *more), capture_output=True, text=True, cwd=directory, env=ALONE, check=False)


def started(directory: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A sweep that has come to the tenth update of its first trial."""
    process = subprocess.Popen(
        command(directory, out, *more), cwd=directory, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    events = out / "trials" / "0" / "metrics.jsonl"
    while process.poll() is None and not (events.is_file() and '"step": 10,' in events.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    return process


def trials(out: Path) -> list[tuple[dict[str, object], float]]:
    found = [json.loads(path.read_text()) for path in (out / "trials").glob("*/trial.json")]
    return [(each["parameters"], each["value"]) for each in sorted(found, key=lambda each: each["number"])]


def agents(directory: Path) -> dict[int, int]:
    """The processes of agents that work on a directory's data, and their parents."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            here = any(os.readlink(each).startswith(str(directory)) for each in (path / "fd").iterdir() if each.name == "2")
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"finetune_dataflow.sweeps.agent_process" in words and here:
            found[int(path.name)] = int(parent)
    return found


def gone(directory: Path) -> bool:
    """Whether no agent is left, after a while at most."""
    end = time.monotonic() + 60
    while agents(directory) and time.monotonic() < end:
        time.sleep(0.05)
    return not agents(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a tiny model, a grid of four trials, and the directory `plain` of a sweep without a cluster."""
    directory = tmp_path_factory.mktemp("sweep")
    rows = [{"question": f"What is number {n}?", "reply": f"It is {n * 7 % 50}, of course."} for n in range(40)]
    (directory / "rows.json").write_text(json.dumps(rows))
    write_tiny_model(directory / "model")
    grid = {"learning_rate": {"values": [0.001, 0.01]}, "lora_rank": {"values": [2, 4]}}
    search = {"method": "grid", "metric": {"name": "validation_loss", "goal": "minimize"}, "parameters": grid}
    (directory / "sweep.yaml").write_text(yaml.safe_dump(search))
    plain = ended(directory, directory / "plain")
    assert plain.returncode == 0, plain.stderr
    return directory


def same_as_plain(place: Path, out: Path) -> None:
    plain, found = trials(place / "plain"), trials(out)
    assert [parameters for parameters, _ in found] == [parameters for parameters, _ in plain]
    assert [value for _, value in found] == pytest.approx([value for _, value in plain], rel=1e-5)
    assert (out / "best" / "metrics.json").is_file() and (out / "sweep.html").is_file()


@pytest.mark.parametrize("kind", EACH)
def test_two_agents_on_a_cluster_make_the_trials_of_a_plain_sweep_though_a_worker_is_killed(kind: str, place: Path) -> None:
    out = place / kind
    process = started(place, out, "--executor", kind, "--jobs", "2")
    working = agents(out)
    os.kill(next(iter(working.values())), signal.SIGKILL)  # the worker, whose agent then stops by itself
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert len(working) == 2
    same_as_plain(place, out)
    assert gone(out)


@pytest.mark.parametrize("kind", EACH)
def test_an_interrupt_ends_the_tasks_and_leaves_trials_that_can_be_gone_on_with(kind: str, place: Path) -> None:
    out = place / f"{kind}-stopped"
    process = started(place, out, "--executor", kind, "--jobs", "2", "--iters", "5000")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "Stopping the agents" in said and "Traceback" not in said
    assert gone(out)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.db'}")
    assert [each.state.name for each in study.trials] == ["RUNNING", "RUNNING"]
    assert [each.user_attrs["claim"] for each in study.trials] == [{}, {}]
    assert [*(out / "trials" / "0" / "checkpoints").iterdir()]


@contextmanager
def listening() -> Iterator[int]:
    """A port that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    kept.append(server.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for each in kept:
            each.close()


@pytest.mark.parametrize("kind", EACH)
def test_an_address_that_does_not_answer_is_told_before_anything_is_written(kind: str, place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    refused = ended(place, place / "none", "--executor", kind, "--executor-address", f"127.0.0.1:{closed}")
    assert refused.returncode == 2
    assert f"{kind.capitalize()} does not answer at 127.0.0.1:{closed}: no connection" in refused.stderr
    with listening() as port:
        silent = ended(place, place / "none", "--executor", kind, "--executor-address", f"127.0.0.1:{port}")
    assert silent.returncode == 2
    assert f"at 127.0.0.1:{port}: something listens there, but" in silent.stderr and "Traceback" not in silent.stderr
    assert not (place / "none").exists()


@contextmanager
def dask_cluster(place: Path, *prefixes: list[str]) -> Iterator[str]:
    """A scheduler and a worker after each prefix; its address."""
    logs = [(place / f"dask-{number}.log").open("w") for number in range(len(prefixes) + 1)]
    dask = [sys.executable, "-m", "dask"]
    ours = [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    processes = [subprocess.Popen(ours, stdout=logs[0], stderr=logs[0], env=ALONE)]
    try:
        address = waited(partial(said_in, place / "dask-0.log", r"Scheduler at:\s+(tcp://127\.0\.0\.1:\d+)"))[1]
        for prefix, log in zip(prefixes, logs[1:], strict=True):
            worker = [*dask, "worker", address, "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard"]
            processes.append(subprocess.Popen([*prefix, *worker], stdout=log, stderr=log, env=ALONE))
        for number in range(1, len(logs)):
            waited(partial(said_in, place / f"dask-{number}.log", "Registered to"))
        yield address
    finally:
        for each in reversed(processes):
            each.terminate()
            each.wait()
        for log in logs:
            log.close()


def said_in(log: Path, pattern: str) -> re.Match[str] | None:
    return re.search(pattern, log.read_text())


def waited(look: Callable[[], re.Match[str] | None]) -> re.Match[str]:
    end = time.monotonic() + 60
    while (found := look()) is None and time.monotonic() < end:
        time.sleep(0.05)
    assert found is not None
    return found


def test_a_worker_that_cannot_see_the_directory_is_named_unless_storage_and_artefacts_are_elsewhere(place: Path) -> None:
    pytest.importorskip("distributed", reason="dask is not installed")
    hidden = place / "hidden"
    hidden.mkdir()
    apart = ["unshare", "--mount", "--map-root-user", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a directory of a process's own")
    out = hidden / "sweep"
    with dask_cluster(place, [], apart) as address:
        there = ("--executor", "dask", "--executor-address", address, "--jobs", "2")
        refused = ended(place, out, *there)
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.count(f"it cannot see the sweep's directory {out} (it is not there)") == 1
        assert not out.exists()
        shared = ("--storage", f"journal://{place}/study.log", "--artifacts", f"file://{place}/artefacts")
        done = ended(place, out, *there, *shared)
    assert done.returncode == 0, done.stderr
    same_as_plain(place, out)

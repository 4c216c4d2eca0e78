"""The real server of the Hamilton UI, runs tracked by it, and what a browser shows of them."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hamilton import driver

import finetune_dataflow
from finetune_dataflow import tracking
from finetune_dataflow.errors import UserError
from finetune_dataflow.tracking.client import Server
from finetune_dataflow.tracking.run import RunTracker
from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
GREEN, RED, GREY = "rgb(34, 197, 94)", "rgb(234, 85, 86)", "rgb(107, 114, 128)"
PREPARED = ["train_tokens", "label_audit", "run_identity", "base_model_path"]


@dataclass(frozen=True)
class Running:
    """A server's process, and where it answers."""

    process: subprocess.Popen[str]
    url: str
    directory: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Its exit code, and what it wrote besides the address."""
        self.process.send_signal(number)
        written, complained = self.process.communicate(timeout=30)
        return self.process.returncode, written + complained


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "import sys; from finetune_dataflow.cli import main; sys.exit(main(['ui', *sys.argv[1:]]))",
        *arguments,
    ]


def started(directory: Path, port: int = 0) -> Running:
    """A server that answers."""
    arguments = command("--port", str(port), "--directory", str(directory))
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"The Hamilton UI answers on (http://127\.0\.0\.1:\d+)/dashboard/projects .*\n", line)
    assert found, line + process.stderr.read()
    return Running(process, found[1], directory)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = started(tmp_path_factory.mktemp("ui") / "kept")
    yield running
    running.process.kill()
    running.process.communicate()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The inputs of a small run on a tiny model, but for its directory."""
    directory = tmp_path_factory.mktemp("job")
    rows = [{"question": f"What is number {n}?", "reply": f"It is {n} and {3 * n + 1}."} for n in range(60)]
    (directory / "rows.json").write_text(json.dumps(rows))
    model = write_tiny_model(directory / "model")
    return {"data_path": str(directory / "rows.json"), "input_text_key": "question", "output_text_key": "reply",
            "model_id": str(model), "num_layers": 2, "max_tokens": 4, "near_duplicates": "keep"}  # fmt: skip


def tracked(url: str, name: str = "a-run", project: str = "mine") -> tuple[driver.Driver, RunTracker]:
    tracker = tracking.hamilton_tracker(name, {"model": "tiny"}, url, project, outputs=["save_best_models", "verdict"])
    assert isinstance(tracker, RunTracker)
    builder = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow)
    return builder.with_adapters(tracker).build(), tracker


def executed(url: str, inputs: dict[str, Any]) -> str:
    """A run in two parts, as the command line executes it; where the UI shows it."""
    dr, tracker = tracked(url)
    prepared = dr.execute(PREPARED, inputs=inputs)
    try:
        dr.execute(tracking.nodes_left(dr, tracker), inputs=inputs, overrides=prepared)
    finally:
        tracker.finish()
        assert not tracker._sender.failed
    return tracker.address


@pytest.fixture(scope="module")
def whole_run(server: Running, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return executed(server.url, {**job, "output_dir": str(tmp_path_factory.mktemp("run") / "run"), "iters": 4})


def nodes_on_screen(page: Any, address: str) -> dict[str, str]:
    """The colour of every node that the run's graph shows, inputs left out."""
    page.goto(address)
    page.get_by_text("DAG View", exact=True).filter(visible=True).click()
    page.wait_for_function("document.querySelectorAll('.react-flow__node').length > 100")
    page.locator(".react-flow__node").first.wait_for(state="visible")
    shown = page.evaluate(
        "[...document.querySelectorAll('.react-flow__node')].map(each => [each.innerText.trim(), "
        "getComputedStyle(each.querySelector('.h-max')).backgroundColor])"
    )
    assert len(shown) == len(dict(shown))
    return {name: color for name, color in shown if color != "rgba(0, 0, 0, 0)"}


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """A page that may neither fail nor ask another server."""
    opened = browser.new_page(viewport={"width": 1500, "height": 1100})
    faults: list[str] = []
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith((server.url, "data:")) else faults.append(asked.url))
    yield opened
    opened.close()
    assert faults == []


def test_every_node_of_a_run_is_on_screen_in_green(page: Any, whole_run: str) -> None:
    dr = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build()
    nodes = {name for name, node in dr.graph.nodes.items() if not node.user_defined}
    assert nodes_on_screen(page, whole_run) == dict.fromkeys(nodes, GREEN)


def test_the_failing_node_of_a_run_is_on_screen_in_red(page: Any, server: Running, job: dict[str, Any], tmp_path: Path) -> None:
    inputs = {**job, "output_dir": str(tmp_path / "run"), "iters": 4, "learning_rate": 1e30, "optimizer": "sgd"}
    dr, tracker = tracked(server.url)
    with pytest.raises(UserError, match="loss of update"):
        dr.execute(["verdict", "train_tokens"], inputs=inputs)
    tracker.finish()
    shown = nodes_on_screen(page, tracker.address)
    assert [name for name, color in shown.items() if color == RED] == ["finished_fit"]
    assert shown["train_tokens"] == GREEN and shown["verdict"] == GREY
    assert Counter(shown.values()).keys() == {GREEN, RED, GREY}


def test_results_are_shown_by_what_they_are(page: Any, whole_run: str) -> None:
    page.goto(f"{whole_run}/task/train_tokens")
    page.get_by_text("supervised_tokens", exact=False).first.wait_for()
    assert "supervised_share" in page.inner_text("body") and "prompt_tokens" in page.inner_text("body")
    page.goto(f"{whole_run}/task/loss_figure")
    curve = page.locator("svg path[stroke='#1f83c4']").first
    curve.wait_for()
    assert curve.bounding_box()["width"] > 300
    page.goto(f"{whole_run}/task/adapter_path")
    page.get_by_text("lora", exact=False).first.wait_for()
    page.goto(f"{whole_run}/task/verdict")
    page.get_by_text("rows it never saw", exact=False).first.wait_for()


def test_the_first_visit_needs_no_name_and_finds_the_project(page: Any, server: Running, whole_run: str) -> None:
    page.goto(server.url)
    page.goto(f"{server.url}/dashboard/projects")
    page.get_by_text("mine", exact=True).wait_for()


def listening(process: int) -> set[str]:
    """The addresses, in hexadecimal, that a process listens on."""
    links = [os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir() if each.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[place] for place in (1, 3, 9))
            if state == "0A" and inode in inodes:
                found.add(local)
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="this system has no /proc/net/tcp")
def test_it_is_one_process_that_listens_on_127_0_0_1_alone(server: Running) -> None:
    assert listening(server.process.pid) == {f"0100007F:{server.port:04X}"}
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    assert not children.is_file() or children.read_text() == ""


def test_another_hosts_name_and_another_sites_page_are_refused(server: Running) -> None:
    for headers in ({"Host": f"evil.example:{server.port}"}, {"Origin": "https://evil.example"}):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/api/v1/projects", headers={"x-api-user": "local", **headers})
        assert connection.getresponse().status == 403
        connection.close()


def test_a_port_or_a_directory_in_use_is_told_with_exit_code_2(server: Running, tmp_path: Path) -> None:
    for option, arguments in (
        ("--port", ["--port", str(server.port), "--directory", str(tmp_path / "new")]),
        ("--directory", ["--port", "0", "--directory", str(server.directory)]),
    ):
        done = subprocess.run(command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"Error: {option} ") and "in use" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "db.sqlite3").write_bytes(b"no database " * 100)
    arguments = command("--port", "0", "--directory", str(tmp_path))
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"The database {tmp_path / 'db.sqlite3'} cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the tracker warned of so far."""
    ours = "finetune_dataflow.tracking"
    return lambda: [
        each.getMessage() for each in caplog.records if each.name.startswith(ours) and each.levelno >= logging.WARNING
    ]


def test_a_project_that_is_deleted_meanwhile_is_a_warning_and_the_run_goes_on(
    server: Running, job: dict[str, Any], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    inputs = {**job, "output_dir": str(tmp_path / "run")}
    dr, tracker = tracked(server.url, project="to be deleted")
    dr.execute(["split_settings"], inputs=inputs)
    with sqlite3.connect(server.directory / "db.sqlite3", timeout=20) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        for table in ("projectusermembership", "projectteammembership"):
            database.execute(f"DELETE FROM trackingserver_projects_{table} WHERE project_id = ?", [tracker._project])
        gone = database.execute("DELETE FROM trackingserver_projects_project WHERE name = 'to be deleted'")
        assert gone.rowcount == 1
    assert dr.execute(PREPARED, inputs=inputs).keys() == {*PREPARED}
    tracker.finish()
    (warning,) = warnings()
    assert warning.startswith(f"The Hamilton UI at {server.url} does not take this run any more: its project is gone there (")
    assert Server(server.url).project("to be deleted") != tracker._project  # the next run has a new one


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_server_and_the_next_one_has_its_runs(
    tmp_path: Path, job: dict[str, Any], number: signal.Signals
) -> None:
    first = started(tmp_path / "kept")
    dr, tracker = tracked(first.url, "kept-run")
    dr.execute(["split_settings"], inputs=job)
    assert first.stop(number) == (0, "Stopped.\n")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", first.port)) != 0
    second = started(tmp_path / "kept", first.port)
    try:
        runs = Server(second.url).call("GET", "/dag_runs/latest/", project_id=tracker._project)
        assert [(each["tags"]["run"], each["run_status"]) for each in runs] == [("kept-run", "SUCCESS")]
        assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    finally:
        second.stop()


def test_a_server_that_is_killed_in_the_middle_of_a_run_is_one_warning(
    tmp_path: Path, job: dict[str, Any], warnings: Callable[[], list[str]]
) -> None:
    running = started(tmp_path / "kept")
    dr, tracker = tracked(running.url)
    inputs = {**job, "output_dir": str(tmp_path / "run"), "iters": 30}
    killer = threading.Thread(target=running.stop, args=[signal.SIGKILL])
    dr.execute(PREPARED, inputs=inputs)
    killer.start()
    result = dr.execute(["finished_fit"], inputs=inputs)
    killer.join()
    tracker.finish()
    assert result["finished_fit"].summary.steps == 30 and len(warnings()) == 1


def test_the_graphs_own_drawing_is_shown_whole(page: Any, whole_run: str) -> None:
    page.goto(f"{whole_run}/task/dag_drawing")
    page.locator("svg text", has_text="save_best_models").first.wait_for()

"""A tracked run as the server of the Hamilton UI receives it, and what becomes of a run whose server goes wrong.

The server here records every request and answers as Hamilton's does; tests_full/test_ui.py has the real one.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hamilton import driver

import finetune_dataflow
from finetune_dataflow import generation, lineage, tracking
from finetune_dataflow.cli.options import build_driver, graph_inputs
from finetune_dataflow.engine import drawing
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import STARTS
from finetune_dataflow.tracking import client
from finetune_dataflow.tracking.run import RunTracker
from finetune_dataflow.tracking.values import SETTINGS

# Words that stand nowhere else: in questions, replies of the file, generated replies, the prompt and the system prompt.
MARKERS = ("quagmirefrog", "zephyrbadger", "obsidiannewt", "tangerineyak", "mulberrygnu")
QUESTION, REFERENCE, GENERATED, PROMPT, SYSTEM = MARKERS
PREPARED = ["train_tokens", "label_audit", "run_identity", "base_model_path"]


class Recorder(ThreadingHTTPServer):
    """A server that keeps what it is sent. `status`: what it answers to a request, None for nothing at all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, str]] = []  # method, path with query, body
        self.status: Callable[[str, str], int | None] = lambda method, path: 200
        self.projects: list[dict[str, Any]] = []
        self.answers: dict[tuple[str, str], Any] = {}
        self.quiet = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, method: str, start: str) -> list[Any]:
        """The bodies of the requests to paths that begin so."""
        found = [body for each, path, body in self.asked if each == method and path.startswith(f"/api/v1{start}")]
        return [json.loads(body) for body in found]

    def everything(self) -> str:
        """All that was sent, with what stands in addresses."""
        return "\n".join(f"{path}\n{body}" for _, path, body in self.asked)

    def states(self) -> dict[str, str]:
        """The last state of each node."""
        updates = [each for body in self.sent("PUT", "/dag_runs_bulk") for each in body["task_updates"]]
        return {each["node_name"]: each["status"] for each in updates}

    def attributes(self, node: str) -> dict[str, Any]:
        """What was told of a node, by heading."""
        told = [each for body in self.sent("PUT", "/dag_runs_bulk") for each in body["attributes"]]
        return {each["name"]: each for each in told if each["node_name"] == node}

    def answer(self, method: str, path: str, body: str) -> Any:
        """What Hamilton's server answers."""
        plain = path.removeprefix("/api/v1").partition("?")[0]
        if (method, plain) in self.answers:
            return self.answers[method, plain]
        if plain == "/projects" and method == "GET":
            return self.projects
        if plain == "/projects":
            self.projects.append({"id": 7, "role": "write", "name": json.loads(body)["name"]})
        return None if plain == "/dag_templates/exists/" else {"id": 7}


class _Handler(BaseHTTPRequestHandler):
    def _any(self) -> None:
        server = self.server
        assert isinstance(server, Recorder)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        server.asked.append((self.command, self.path, body))
        status = server.status(self.command, self.path)
        if status is None:
            server.quiet.wait(30)
            return
        answer = json.dumps(server.answer(self.command, self.path, body)).encode() if status == 200 else b"<p>no</p>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _any

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the screen."""


@contextmanager
def serving() -> Iterator[Recorder]:
    made = Recorder()
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.quiet.set()
    made.shutdown()
    made.server_close()


@pytest.fixture
def server() -> Iterator[Recorder]:
    with serving() as made:
        yield made


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of so far."""
    caplog.set_level(logging.INFO)
    return lambda: [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def tracked(server: Recorder, capture_data: bool = False, **others: Any) -> tuple[driver.Driver, RunTracker]:
    tracker = tracking.hamilton_tracker("a-run", {"data": "support.json"}, server.url, capture_data=capture_data, **others)
    assert isinstance(tracker, RunTracker)
    builder = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow)
    return builder.with_adapters(tracker).build(), tracker


def marked_inputs(directory: Path, model: Path, rows: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """The inputs of a job whose texts are marked."""
    marked = [{"question": f"What is {QUESTION} {n}?", "reply": f"It is {REFERENCE} {n}."} for n in range(60)]
    (directory / "marked.json").write_text(json.dumps(rows or marked))
    return {
        "data_path": str(directory / "marked.json"), "input_text_key": "question", "output_text_key": "reply",
        "model_id": str(model), "output_dir": str(directory / "run"), "num_layers": 1, "iters": 2, "near_duplicates": "keep",
        "reuse_replies": False, "frozen_states_gb": 0.0,
        "prompt": f"Is {PROMPT} here?", "system_prompt": f"Be {SYSTEM}.",
    }  # fmt: skip


@dataclass(frozen=True)
class WholeRun:
    """What a run gave, what the server was sent of it, and the graph."""

    server: Recorder
    result: dict[str, Any]
    inputs: dict[str, Any]
    dr: driver.Driver
    left: list[str]


def executed_whole(directory: Path, model: Path, capture_data: bool) -> WholeRun:
    """A run in two parts, as the command line executes it, with generated replies that are marked."""

    def replies(tokens: TokenColumns, *others: object) -> pd.DataFrame:
        said = [f"{GENERATED} says {n}" for n in range(len(tokens))]
        return pd.DataFrame({"reply": said, "tokens": 9, "ended": True})

    inputs = marked_inputs(directory, model)
    with serving() as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(generation, "_replies", replies)
        patched.setattr(lineage, "package_version", lambda: "0" * 64)  # these two take seconds
        patched.setattr(drawing, "svg", lambda dot: '<?xml version="1.0"?><svg><title>graph</title></svg>')
        dr, tracker = tracked(server, capture_data, outputs=["verdict"])
        prepared = dr.execute(PREPARED, inputs=inputs)
        result = dict(dr.execute(tracking.nodes_left(dr, tracker), inputs=inputs, overrides=prepared))
        return WholeRun(server, result, inputs, dr, tracking.nodes_left(dr, tracker))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> WholeRun:
    return executed_whole(tmp_path_factory.mktemp("plain"), tiny_model, False)


def test_no_text_of_rows_replies_and_prompts_is_sent(whole_run: WholeRun) -> None:
    result, everything = whole_run.result, whole_run.server.everything()
    assert result["prompt_reply"].prompt == f"Is {PROMPT} here?"  # the texts were there to be sent
    assert result["hold_out_set_predictions"][0][0].startswith(f"What is {QUESTION}")
    assert result["hold_out_set_predictions"][0][1].startswith(GENERATED)
    assert len(everything) > 100_000
    assert [each for each in MARKERS if each in everything] == []
    assert [each for each in MARKERS if json.dumps(list(each.encode()))[1:-1] in everything] == []  # nor their tokens
    (run,) = whole_run.server.sent("POST", "/dag_runs")
    assert run["inputs"]["prompt"] == "(text of 21 characters)" and run["inputs"]["num_layers"] == 1
    assert run["inputs"]["data_path"] == whole_run.inputs["data_path"]
    assert whole_run.server.attributes("verdict")["result_summary"]["value"]["value"] == result["verdict"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:hamilton_sdk")
def test_with_capture_the_texts_are_sent(tmp_path: Path, tiny_model: Path) -> None:
    server = executed_whole(tmp_path, tiny_model, True).server
    everything = server.everything()
    assert [each for each in MARKERS if each not in everything] == []
    assert set(server.states().values()) == {"SUCCESS"}


def test_every_node_of_a_run_in_two_parts_is_green_in_one_run_of_the_ui(whole_run: WholeRun) -> None:
    server, graph = whole_run.server, whole_run.dr.graph
    nodes = {name for name, node in graph.nodes.items() if not node.user_defined}
    assert server.states() == dict.fromkeys(nodes, "SUCCESS") and whole_run.left == []
    (run,) = server.sent("POST", "/dag_runs")
    assert run["tags"] == {"run": "a-run", "data": "support.json"} and run["outputs"] == ["verdict"]
    assert [each["run_status"] for each in server.sent("PUT", "/dag_runs/7/")] == ["SUCCESS", "RUNNING", "SUCCESS"]
    told = [(each["node_name"], each["name"]) for body in server.sent("PUT", "/dag_runs_bulk") for each in body["attributes"]]
    assert len(told) == len({*told})  # the server refuses a second one of a name
    (template,) = server.sent("POST", "/dag_templates")
    kinds = {each["name"]: each["classifications"] for each in template["nodes"]}
    assert kinds.keys() == graph.nodes.keys() and {name for name, each in kinds.items() if each == ["transform"]} == nodes


def test_figures_and_the_graph_are_pictures(whole_run: WholeRun) -> None:
    figures = [name for name, value in whole_run.result.items() if type(value).__name__ == "Figure"]
    assert len(figures) == 10
    for name in figures:
        told = whole_run.server.attributes(name)["result_summary"]
        assert told["type"] == "html" and "<svg xmlns=" in told["value"]["html"] and "script" not in told["value"]["html"]
    drawn = whole_run.server.attributes("dag_drawing")["result_summary"]["value"]["html"]
    assert drawn == '<div style="overflow: auto; background: #ffffff"><svg><title>graph</title></svg></div>'


def test_the_graph_is_sent_with_each_function_at_its_lines(server: Recorder) -> None:
    tracked(server)[1].finish()
    (template,) = server.sent("POST", "/dag_templates")
    files = {each["path"]: each["contents"].split("\n") for each in template["code_log"]["files"]}
    place = next(each for each in template["code_artifacts"] if each["name"] == "finetune_dataflow.evaluation.verdict")
    lines = files[place["path"]][place["start"] : place["end"]]
    assert place["path"] == "finetune_dataflow/evaluation.py" and lines[0] == "def verdict("
    assert "return engine.comparison.verdict(" in lines[-1]
    assert len(template["dag_hash"]) == len(template["code_hash"]) == 64


def test_cached_nodes_are_green_too(server: Recorder, inputs: dict[str, Any], tmp_path: Path) -> None:
    for run in ("one", "two"):
        tracker = tracking.hamilton_tracker(run, {}, server.url)
        assert tracker is not None
        builder = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).with_adapters(tracker)
        server.asked.clear()
        builder.with_cache(path=str(tmp_path / "results")).build().execute(PREPARED, inputs=inputs)
        assert server.states()["train_tokens"] == "SUCCESS" and set(server.states().values()) == {"SUCCESS"}


def test_a_failing_node_is_red_and_its_message_which_quotes_a_row_stays_here(
    server: Recorder, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"question": f"{QUESTION} number {n}", "reply": f"{REFERENCE} {n}"} for n in range(60)]
    inputs = marked_inputs(tmp_path, tiny_model, [*rows, rows[0]])
    dr, _ = tracked(server)
    with pytest.raises(UserError, match=QUESTION):
        dr.execute(PREPARED, inputs={**inputs, "strict": True})
    states = server.states()
    assert states["data_quality"] == "FAILURE" and set(states.values()) == {"SUCCESS", "FAILURE"}
    assert server.sent("PUT", "/dag_runs/7/")[-1]["run_status"] == "FAILURE"
    told = server.attributes("data_quality")["stack_trace"]
    assert told["type"] == "error" and "raise_if_strict" in "".join(told["value"]["stack_trace"])
    assert told["value"]["stack_trace"][-1].startswith("UserError (its message")
    assert QUESTION not in server.everything()


def test_an_interrupted_node_is_red(server: Recorder, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_dataflow.engine.audit, "label_audit", stop)
    dr, _ = tracked(server)
    with pytest.raises(KeyboardInterrupt):
        dr.execute(["label_audit"], inputs=inputs)
    assert server.states()["label_audit"] == "FAILURE"
    assert server.sent("PUT", "/dag_runs/7/")[-1]["run_status"] == "FAILURE"


def test_other_inputs_and_a_failure_begin_another_run(server: Recorder, inputs: dict[str, Any]) -> None:
    dr, _ = tracked(server)
    dr.execute(["split_settings"], inputs=inputs)
    dr.execute(["generation_settings"], inputs=inputs)
    assert len(server.sent("POST", "/dag_runs")) == 1
    with pytest.raises(UserError):
        dr.execute(["split_settings"], inputs={**inputs, "train_size": 7.0})
    assert len(server.sent("POST", "/dag_runs")) == 2
    dr.execute(["split_settings"], inputs={**inputs, "train_size": 7.0}, overrides={"split_settings": QUESTION})
    assert len(server.sent("POST", "/dag_runs")) == 3
    assert server.attributes("split_settings")["result_summary"]["value"]["value"] == "(text of 12 characters)"


def test_a_project_is_found_by_its_name_and_an_archived_graph_is_shown_again(server: Recorder) -> None:
    others = [{"id": n, "role": "write", "name": f"other {n}"} for n in range(99)]
    server.projects = [*others, {"id": 500, "role": "write", "name": "mine"}]
    server.answers["GET", "/dag_templates/exists/"] = {"id": 3, "is_active": False}
    tracked(server, project="mine")[1].finish()
    assert server.sent("POST", "/projects") == [] and server.sent("POST", "/dag_templates") == []
    assert any("project_id=500" in path for _, path, _ in server.asked)
    assert server.sent("PUT", "/update_dag_templates/3") == [{"is_active": True}]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_ui_that_is_down_is_warned_of_once_and_nothing_is_tracked(warnings: Callable[[], list[str]]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert tracking.hamilton_tracker("a-run", {}, url) is None
    (warning,) = warnings()
    assert warning.startswith(f"This run is not tracked: there is no Hamilton UI at {url} (") and "run.py ui" in warning
    assert tracking.nodes_left(build_driver("base"), None) == []


def test_a_missing_sdk_is_warned_of(warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracking.hamilton_tracker("a-run", {}) is None
    assert warnings() == ["This run is not tracked: hamilton_sdk is missing. Install it: pip install 'finetune-dataflow[ui]'"]


@pytest.mark.parametrize("status", [200, 404, 500])
def test_another_server_at_the_address_is_no_ui(server: Recorder, warnings: Callable[[], list[str]], status: int) -> None:
    server.answers = {("GET", "/phone_home"): "hello", ("GET", "/projects"): {"hello": "world"}}
    server.status = lambda method, path: status
    assert tracking.hamilton_tracker("a-run", {}, server.url) is None
    assert len(warnings()) == 1 and "there is no Hamilton UI" in warnings()[0]


def test_a_server_that_accepts_and_never_answers_is_not_waited_for(
    server: Recorder, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    server.status = lambda method, path: None
    assert tracking.hamilton_tracker("a-run", {}, server.url) is None
    assert len(warnings()) == 1 and "timed out" in warnings()[0]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8241", "ftp://127.0.0.1", "http://", "http://127.0.0.1:99999", "http://a?b"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is no address of a Hamilton UI"):
        tracking.hamilton_tracker("a-run", {}, url)


@pytest.mark.parametrize("refused", ["/dag_templates", "/dag_runs?", "/dag_runs_bulk", "/dag_runs/7/"])
@pytest.mark.parametrize("status", [404, None], ids=["a project that is gone", "a server that hangs"])
def test_a_server_lost_in_the_middle_is_one_warning_and_the_run_goes_on(
    server: Recorder,
    inputs: dict[str, Any],
    warnings: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    refused: str,
    status: int | None,
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    server.status = lambda method, path: status if path.startswith(f"/api/v1{refused}") else 200
    dr, tracker = tracked(server)
    for _ in range(2):
        assert len(dr.execute(PREPARED, inputs=inputs)["train_tokens"]) == 48
    tracker.finish()
    (warning,) = warnings()
    assert warning.startswith(f"The Hamilton UI at {server.url} does not take this run any more: ")
    assert warning.endswith(". The run itself goes on.") and ("its project is gone there" in warning) == (status == 404)
    asked = len(server.asked)
    dr.execute(["split_settings"], inputs=inputs)
    assert len(server.asked) == asked  # nothing is tried again


def test_a_server_that_ends_in_the_middle_is_one_warning(
    server: Recorder, inputs: dict[str, Any], warnings: Callable[[], list[str]]
) -> None:
    dr, tracker = tracked(server)
    dr.execute(["split_settings"], inputs=inputs)
    server.shutdown()
    server.server_close()
    assert len(dr.execute(PREPARED, inputs=inputs)["train_tokens"]) == 48
    tracker.finish()
    assert len(warnings()) == 1 and "refused" in warnings()[0]


def test_a_value_that_cannot_be_described_is_said_to_be_so(
    server: Recorder, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*others: object) -> None:
        raise ValueError(QUESTION)

    monkeypatch.setattr("finetune_dataflow.tracking.run.observations", fail)
    dr, _ = tracked(server)
    dr.execute(["split_settings"], inputs=inputs)
    assert server.states() == {"split_settings": "SUCCESS"}
    said = server.attributes("split_settings")["result_summary"]["value"]["value"]
    assert said == "a SplitSettings, which cannot be described (ValueError)"


def test_the_inputs_that_are_texts_are_these() -> None:
    """A new input that holds text must be put on one side or the other."""
    inputs = {name: each for start in STARTS for name, each in graph_inputs(build_driver(start)).items()}
    may_hold_text = {name for name, each in inputs.items() if any(kind in str(each.type) for kind in ("str", "list", "dict"))}
    texts = {"context_template", "input_template", "loom_markers", "prompt", "response_template", "system_prompt"}
    assert may_hold_text - SETTINGS == texts
    assert SETTINGS - may_hold_text == {"base_model_name", "start"}


def test_the_link_to_the_run_is_said_once(server: Recorder, inputs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dr, _ = tracked(server)
    names: Sequence[str] = ("split_settings", "generation_settings")
    for name in names:
        dr.execute([name], inputs=inputs)
    said = [each.getMessage() for each in caplog.records if each.name.startswith("finetune_dataflow.tracking")]
    assert said == [f"This run in the Hamilton UI: {server.url}/dashboard/project/7/runs/7"]

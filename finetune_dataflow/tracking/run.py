"""The adapter that tells a Hamilton UI what a driver executes."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hamilton.graph_types import HamiltonGraph, HamiltonNode
from hamilton.lifecycle import api

from finetune_dataflow.tracking.client import NotTaken, Sender, Server, number_of
from finetune_dataflow.tracking.graph import dependencies, digest, is_ours, template
from finetune_dataflow.tracking.values import Observation, observations, shown_inputs

WAIT_SECONDS = 2.0  # of an execution's end, for what is not sent yet
# What looking at a value of any type may raise.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)

logger = logging.getLogger(__name__)


class RunTracker(api.GraphConstructionHook, api.GraphExecutionHook, api.NodeExecutionHook):
    """Tells a Hamilton UI what is executed. Nothing that happens to it is ever raised into the run.

    Requests are made in another thread; here they are only put in line. Executions with the same inputs are one run of the UI,
    until one fails; a node that is executed again in it stays as it was first.
    """

    def __init__(
        self, server: Server, project: int, tags: Mapping[str, str], capture_data: bool, outputs: Sequence[str] = ()
    ) -> None:
        """A tracker for one driver; `project` is the number of the UI's project."""
        self.shown: set[str] = set()  # nodes that are green
        self._server, self._project, self._tags, self._capture = server, project, dict(tags), capture_data
        self._outputs = list(outputs)
        self._sender = Sender(self._lost)
        self._nodes: dict[str, HamiltonNode] = {}
        self._started: dict[str, str] = {}
        self._inputs, self._failed, self._told = "", True, False
        self._lock = threading.Lock()
        self._updates: dict[str, dict[str, Any]] = {}
        self._attributes: list[dict[str, Any]] = []
        self._template = self._run = 0  # the server's numbers

    @property
    def address(self) -> str:
        """Where the UI shows the run; known after the first execution."""
        return f"{self._server.url}/dashboard/project/{self._project}/runs/{self._run}"

    def finish(self) -> None:
        """Wait a moment for what is not sent yet; at the end of the process this happens by itself."""
        self._sender.finish()

    def run_after_graph_construction(self, *, graph: HamiltonGraph, config: dict[str, Any], **future_kwargs: Any) -> None:
        """Register the graph, with its code, unless the UI knows it."""
        self._nodes = {each.name: each for each in graph.nodes}
        try:
            made = template(graph, config)
        except UNREADABLE as error:
            self._sender.give_up(f"the graph cannot be described ({type(error).__name__}: {error})")
        else:
            self._sender.put(lambda: self._register(made))

    def run_before_graph_execution(
        self, *, final_vars: list[str], inputs: dict[str, Any], overrides: dict[str, Any], **others: Any
    ) -> None:
        """Begin a run, or go on with it: after a failure, and with other inputs, it is another one."""
        identity = digest(sorted((name, repr(value)) for name, value in (inputs or {}).items()))
        if self._failed or identity != self._inputs:
            self._inputs, self._failed = identity, False
            self.shown.clear()
            run = {
                "run_start_time": _now(),
                "run_status": "RUNNING",
                "tags": self._tags,
                "outputs": self._outputs or [*final_vars],
            }
            run["inputs"] = self._described_inputs(inputs or {})
            self._sender.put(lambda: self._begin(run))
        else:
            self._sender.put(lambda: self._say("RUNNING"))
        for name in sorted((overrides or {}).keys() & self._nodes.keys() - self.shown):
            self._started[name] = _now()
            self._tell(name, "SUCCESS", self._described(name, overrides[name], ours=False))

    def run_before_node_execution(self, *, node_name: str, **others: Any) -> None:
        """The node begins."""
        if node_name not in self.shown:
            self._started[node_name] = _now()
            self._tell(node_name, "RUNNING", [])

    def run_after_node_execution(self, *, node_name: str, result: Any, error: Exception | None, **others: Any) -> None:
        """The node ended: computed, found in the cache, failed, or interrupted, which Hamilton takes for computed."""
        failure = error or _interruption()
        if failure is not None:
            self._failed = True
            self._tell(node_name, "FAILURE", [Observation("stack_trace", "error", 1, {"stack_trace": self._stack(failure)})])
        elif node_name not in self.shown:
            node = self._nodes.get(node_name)
            ours = node is not None and is_ours(node.originating_functions)
            self._tell(node_name, "SUCCESS", self._described(node_name, result, ours))

    def run_after_graph_execution(self, *, success: bool, **others: Any) -> None:
        """All that was asked for is there, or something failed. Waits a moment for what is not sent yet."""
        self._failed = self._failed or not success or _interruption() is not None
        status = "FAILURE" if self._failed else "SUCCESS"
        self._sender.put(lambda: self._say(status))
        if self._sender.drained(WAIT_SECONDS) and not self._told and not self._sender.failed:
            self._told = True
            logger.info("This run in the Hamilton UI: %s", self.address)

    def _described(self, name: str, value: object, ours: bool) -> list[Observation]:
        """What the UI shows of a value; that it cannot be shown, where looking at it fails."""
        try:
            told = self._captured(name, value) if self._capture else observations(name, value, ours)
            json.dumps([each.value for each in told], allow_nan=False)
        except UNREADABLE as error:
            said = f"a {type(value).__name__}, which cannot be described ({type(error).__name__})"
            return [Observation("result_summary", "primitive", 1, {"type": str(type(value)), "value": said})]
        return told

    def _captured(self, name: str, value: object) -> list[Observation]:
        """What Hamilton's own tracker captures."""
        from hamilton_sdk.tracking.runs import process_result
        from hamilton_sdk.tracking.utils import make_json_safe

        summary, schema, further = process_result(value, self._nodes[name])
        found = []
        for place, each in enumerate(filter(None, (summary, schema, *further))):
            heading = "result_summary" if place == 0 else str(each.get("name", f"Attribute {place}"))
            version = int(each["observability_schema_version"].rpartition(".")[2])
            found.append(Observation(heading, each["observability_type"], version, make_json_safe(each["observability_value"])))
        return found

    def _described_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if self._capture:
                from hamilton_sdk.tracking.utils import make_json_safe

                return dict(make_json_safe(dict(inputs)))
            return shown_inputs(inputs)
        except UNREADABLE as error:
            return {"inputs": f"which cannot be described ({type(error).__name__})"}

    def _stack(self, error: BaseException) -> list[str]:
        """Where an error came from, with its causes; its message only where data may be sent, because it may quote a row."""
        if self._capture:
            return traceback.format_exception(error)
        lines: list[str] = []
        seen: BaseException | None = error
        while seen is not None:
            name = f"{type(seen).__qualname__} (its message, which may quote the data, is on the terminal)\n"
            lines = [*traceback.format_tb(seen.__traceback__), name, *(["which led to:\n"] if lines else []), *lines]
            seen = seen.__cause__
        return lines

    def _tell(self, name: str, status: str, told: list[Observation]) -> None:
        """Have the state of a node sent, with what is told of it; what waits is sent together."""
        if status == "SUCCESS":
            self.shown.add(name)
        if self._sender.failed:
            return
        node = self._nodes.get(name)
        update = {
            "node_template_name": name,
            "node_name": name,
            "realized_dependencies": dependencies(node) if node else [],
            "status": status,
            "start_time": self._started.get(name),
            "end_time": None if status == "RUNNING" else _now(),
        }
        role = "error" if status == "FAILURE" else "result_summary"
        with self._lock:
            waiting = bool(self._updates)
            self._updates[name] = update
            self._attributes += [each.attribute(name, role) for each in told]
        if not waiting:
            self._sender.put(self._send_nodes)

    # The rest is done in the sender's thread, in the order in which it was put, and may raise NotTaken.

    def _register(self, made: dict[str, Any]) -> None:
        names = {"dag_hash": made["dag_hash"], "code_hash": made["code_hash"], "dag_name": made["name"]}
        known = self._call("GET", "/dag_templates/exists/", project_id=self._project, **names)
        if known is None:
            known = self._call("POST", "/dag_templates", made, project_id=self._project)
        elif isinstance(known, dict) and not known.get("is_active", True):  # archived in the UI, which then hides its runs
            self._call("PUT", f"/update_dag_templates/{number_of(known)}", {"is_active": True})
        self._template = number_of(known)

    def _begin(self, run: dict[str, Any]) -> None:
        self._run = number_of(self._call("POST", "/dag_runs", run, dag_template_id=self._template))

    def _say(self, status: str) -> None:
        self._call("PUT", f"/dag_runs/{self._run}/", {"run_status": status, "run_end_time": _now()})

    def _send_nodes(self) -> None:
        self._sender.pause()
        with self._lock:
            updates, attributes = list(self._updates.values()), self._attributes
            self._updates, self._attributes = {}, []
        self._call("PUT", "/dag_runs_bulk", {"attributes": attributes, "task_updates": updates}, dag_run_id=self._run)

    def _call(self, method: str, path: str, body: object = None, **query: object) -> Any:
        try:
            return self._server.call(method, path, body, **query)
        except NotTaken as error:
            if error.status != 404:
                raise
            raise NotTaken(f"its project is gone there ({error})") from error

    def _lost(self, reason: str) -> None:
        logger.warning(
            "The Hamilton UI at %s does not take this run any more: %s. The run itself goes on.", self._server.url, reason
        )


def _interruption() -> BaseException | None:
    """Ctrl-C, or an exit, that is on its way through."""
    raised = sys.exc_info()[1]
    return raised if isinstance(raised, KeyboardInterrupt | SystemExit) else None


def _now() -> str:
    return datetime.now(UTC).isoformat()

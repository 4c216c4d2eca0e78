"""Runs recorded in the Hamilton UI: the graph, every node's state and time, and what each result amounts to.

`hamilton_tracker` gives an adapter for `driver.Builder().with_adapters(...)`. It differs from Hamilton's own tracker in what a
run on people's data needs: no text of the data is sent unless that is asked for, and whatever becomes of the server, the run
goes on. Hamilton's own makes a run of each `execute`; here the executions of one driver with the same inputs are one run, so
that a graph that is executed in parts is seen whole.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from finetune_dataflow.tracking.client import NotTaken, Server

if TYPE_CHECKING:
    from hamilton import driver
    from hamilton.lifecycle.base import LifecycleAdapter

URL, PROJECT = "http://127.0.0.1:8241", "finetune-dataflow"

logger = logging.getLogger(__name__)


def hamilton_tracker(
    run_name: str,
    tags: Mapping[str, str],
    url: str = URL,
    project: str = PROJECT,
    capture_data: bool = False,
    outputs: Sequence[str] = (),
) -> LifecycleAdapter | None:
    """An adapter that records what a driver executes in the Hamilton UI at `url`, in the project of that name.

    The project is made where there is none. run_name: the tag `run`; tags: further ones, to find the run by. capture_data:
    send what Hamilton's own tracker does, which includes texts of the data. outputs: what the run is for; without them, what is
    asked for first. None, with a warning, where the UI does not answer at once or Hamilton's SDK is not installed. Raises
    UserError for a `url` that is no address.
    """
    server = Server(url)
    if importlib.util.find_spec("hamilton_sdk") is None:
        logger.warning("This run is not tracked: hamilton_sdk is missing. Install it: pip install 'finetune-dataflow[ui]'")
        return None
    try:
        number = server.project(project)
    except NotTaken as error:
        logger.warning("This run is not tracked: there is no Hamilton UI at %s (%s). Start it: run.py ui", server.url, error)
        return None
    from finetune_dataflow.tracking.run import RunTracker
    from finetune_dataflow.tracking.values import register

    register()
    return RunTracker(server, number, {"run": run_name, **tags}, capture_data, outputs)


def nodes_left(dr: driver.Driver, tracker: LifecycleAdapter | None, besides: Collection[str] = ()) -> list[str]:
    """The nodes of this dataflow that a tracked run has not shown yet, but for `besides`: asked for, they turn green, too.

    None where nothing is tracked. A user's own nodes are not among them: they are computed where something needs them.
    """
    from finetune_dataflow.tracking.graph import is_ours
    from finetune_dataflow.tracking.run import RunTracker

    if not isinstance(tracker, RunTracker):
        return []
    nodes = (each for each in dr.list_available_variables() if not each.is_external_input)
    ours = {each.name for each in nodes if is_ours(each.originating_functions)}
    return sorted(ours - tracker.shown - {*besides})

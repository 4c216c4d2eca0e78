"""Clusters of Ray and Dask: one of this machine, started for a sweep and shut down after it, or one that answers elsewhere."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from finetune_dataflow.errors import UserError, nearest
from finetune_dataflow.sweeps import probe_task
from finetune_dataflow.sweeps.storage import ANSWER_SECONDS, answered, first_line

EXECUTORS = {"local": "", "ray": "ray", "dask": "distributed"}  # and the module that each needs
PORTS = {"ray": 6379, "dask": 8786}
CONNECT_SECONDS = 30.0  # for a cluster to answer
PROBE_SECONDS = 60.0  # for its machines
OBJECTS = 80 * 2**20  # bytes of Ray's object store, for jobs of some kilobytes

Probe = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers. kind: ray or dask; address: empty for one of this machine.

    everywhere: calls a function of `probe_task` on each machine or worker, by name; what went wrong stands as a string.
    executor: Hamilton's executor for so many agents, of so many cores each, which calls the function given where it must stop.
    lost: what is raised where its workers, or itself, are lost.
    """

    kind: str
    address: str
    lost: tuple[type[BaseException], ...]
    everywhere: Callable[..., dict[str, dict[str, Any] | str]]
    executor: Callable[[int, Callable[[], None]], Any]

    @property
    def named(self) -> str:
        """What messages call it."""
        return (
            f"the {self.kind.capitalize()} cluster {self.address}"
            if self.address
            else f"the local {self.kind.capitalize()} cluster"
        )


def check_executor(kind: str, address: str) -> None:
    """Raise UserError for an executor that there is not, or whose package is not installed, or that has no address."""
    if kind not in EXECUTORS:
        raise UserError(f"--executor {kind!r} is unknown.{nearest(kind, EXECUTORS)} Expected local, ray or dask.")
    if address and kind == "local":
        raise UserError("--executor-address is of a cluster. Give --executor ray or --executor dask, too.")
    if EXECUTORS[kind] and find_spec(EXECUTORS[kind]) is None:
        raise UserError(f"--executor {kind} needs {kind.capitalize()}: pip install 'finetune-dataflow[{kind}]'.")


@contextmanager
def cluster(kind: str, address: str, agents: int) -> Iterator[Cluster]:
    """A cluster for the block: the one at the address, which must answer within CONNECT_SECONDS, or one for so many agents.

    Raises UserError that names the address and what was tried.
    """
    if address:
        _check_port(kind, address)
    with (_ray if kind == "ray" else _dask)(address, agents) as found:
        yield found


def _check_port(kind: str, address: str) -> None:
    """Raise UserError where nothing listens at an address."""
    if kind == "ray" and address == "auto":
        return
    found = re.fullmatch(r"(?:(\w+)://)?(\[[^\]]+\]|[^:/@\s]+)(?::(\d{1,5}))?", address)
    if found is None or int(found[3] or 1) > 65535:
        raise UserError(f"--executor-address {address!r}: expected host:port, {'ray' if kind == 'ray' else 'tcp'}://host:port.")
    scheme, host, port = found[1], found[2].strip("[]"), int(found[3] or (10001 if found[1] == "ray" else PORTS[kind]))
    expected = {"ray": ("ray",), "dask": ("tcp", "tls")}[kind]
    if scheme is not None and scheme not in expected:
        raise UserError(f"--executor-address {address!r}: expected {' or '.join(expected)}:// for --executor {kind}.")
    if scheme == "ray" and find_spec("grpc") is None:
        raise UserError(
            f"--executor-address {address}: Ray's client needs a package that is not installed: pip install 'ray[client]'."
        )
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS / 2):
            return
    except OSError as error:
        raise UserError(
            f"{kind.capitalize()} does not answer at {address}: no connection to {host}, port {port} "
            f"({error.strerror or error}). Nothing was begun."
        ) from error


ASKING = {
    "ray": "ray.init(address=sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False); ray.cluster_resources()",
    "dask": "logging.disable(); from distributed import Client; Client(sys.argv[1], timeout=20).scheduler_info()",
}


def _check_answer(kind: str, address: str) -> None:
    """Raise UserError where what listens is no such cluster. A process asks, because the libraries' own wait may never end."""
    hint = " From a machine outside of the cluster it is ray://host:10001." if kind == "ray" and "//" not in address else ""
    failing = f"{kind.capitalize()} does not answer at {address}: something listens there, but"
    script = f"import logging, sys\n{'import ray' if kind == 'ray' else ''}\n{ASKING[kind]}"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", script, address], capture_output=True, text=True, timeout=CONNECT_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{failing} no cluster was found there within {CONNECT_SECONDS:g} seconds.{hint} Nothing was begun."
        ) from error
    if asked.returncode:
        lines = [line for line in asked.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
        why = (lines or asked.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        raise UserError(f"{failing} it cannot be used ({why}).{hint} Nothing was begun.")


# Ray


@contextmanager
def _ray(address: str, agents: int) -> Iterator[Cluster]:
    _quiet_ray(local=not address)
    if address:
        _check_answer("ray", address)
    import ray

    # What Ray says of itself goes to its own log, in its temporary directory.
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, **common)
    else:
        # Otherwise Ray would join whatever cluster was started on this machine before.
        ray.init(
            address="local", num_cpus=max(agents, os.cpu_count() or 1), include_dashboard=False, _node_ip_address="127.0.0.1",
            object_store_memory=OBJECTS, **common,
        )  # fmt: skip
    try:
        yield Cluster("ray", address, (ray.exceptions.RayError, ConnectionError), _on_ray_nodes, _ray_executor)
    finally:
        ray.shutdown()


def _quiet_ray(local: bool) -> None:
    """Set what Ray reads when it is imported: it sends no word home; of this machine alone, it listens on 127.0.0.1."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if local:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's word for "not on the loopback alone"
        if "RAY_AUTH_MODE" not in os.environ:  # otherwise it writes a token into the home directory
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _on_ray_nodes(name: str, *given: Any) -> dict[str, dict[str, Any] | str]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(probe_task)
    nodes = {
        each["NodeID"]: each["NodeManagerHostname"] for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")
    }
    # Its own module goes along with the function: a machine without this package can say so.
    task = ray.remote(getattr(probe_task, name))
    asked = {
        node: task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*given)
        for node in nodes
    }
    ready, _ = ray.wait([*asked.values()], num_returns=len(asked), timeout=PROBE_SECONDS) if asked else ([], [])
    found: dict[str, dict[str, Any] | str] = {}
    for node, reference in asked.items():
        label = f"{nodes[node]} (node {node[:6]})"
        if reference not in ready:
            found[label] = f"it did not answer within {PROBE_SECONDS:g} seconds"
            continue
        try:
            found[label] = ray.get(reference)
        except ray.exceptions.RayError as error:
            found[label] = first_line(getattr(error, "cause", None) or error)
    return found


def _ray_executor(agents: int, stop: Callable[[], None]) -> Any:
    import ray

    from finetune_dataflow.sweeps.executors import ray_agents

    resources = [each["Resources"] for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")]
    of_one = -(-agents // len(resources))
    cpus = max(1, int(min(each["CPU"] for each in resources)) // of_one)
    gpus = int(sum(each.get("GPU", 0) for each in resources) >= agents)
    return ray_agents(cpus, gpus, stop)


# Dask


@contextmanager
def _dask(address: str, agents: int) -> Iterator[Cluster]:
    from distributed import CancelledError, Client, KilledWorker, LocalCluster
    from distributed.comm.core import CommClosedError

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if address:
            _check_answer("dask", address)
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        else:
            local = LocalCluster(
                n_workers=agents, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )  # fmt: skip
            stack.enter_context(local)
            client = Client(local, set_as_default=False)
        stack.enter_context(client)
        lost = (KilledWorker, CommClosedError, CancelledError, TimeoutError)
        yield Cluster("dask", address, lost, partial(_on_dask_workers, client), partial(_dask_executor, client))


def _on_dask_workers(client: Any, name: str, *given: Any) -> dict[str, dict[str, Any] | str]:
    import cloudpickle

    cloudpickle.register_pickle_by_value(probe_task)
    found = answered(
        lambda: client.run(getattr(probe_task, name), *given, on_error="return"), "A worker of the cluster", seconds=PROBE_SECONDS
    )
    return {each: first_line(said) if isinstance(said, BaseException) else said for each, said in found.items()}


def _dask_executor(client: Any, agents: int, stop: Callable[[], None]) -> Any:
    from finetune_dataflow.sweeps.executors import dask_agents

    return dask_agents(client, _spread(client.scheduler_info(n_workers=-1)["workers"]), stop)


def _spread(workers: dict[str, Any]) -> Sequence[str]:
    """The addresses of the workers so that neighbours are on different hosts as far as may be."""
    hosts: dict[str, list[str]] = {}
    for address, each in workers.items():
        hosts.setdefault(each["host"], []).append(address)
    rows = max(map(len, hosts.values()))
    return [addresses[row] for row in range(rows) for addresses in hosts.values() if row < len(addresses)]

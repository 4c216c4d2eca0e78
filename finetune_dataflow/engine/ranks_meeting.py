"""How ranks find each other: where a launcher has put this process, and the connections to rank 0.

A process is a rank where `mlx.launch` or `mpirun` has said so in its environment, and only there. Rank 0 listens where
MLX's own connections will be made a moment later, so that no further port has to be open.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_dataflow.engine.ranks_channel import Channel
from finetune_dataflow.errors import UserError

LIMIT = "FINETUNE_DATAFLOW_RANK_SECONDS"
LIMIT_SECONDS = 120.0
HELLO_SECONDS = 5.0  # for a connection's first line
MOST_CONNECTING = 20.0  # seconds for one connection
AGAIN = 0.2  # seconds between two attempts
LOCAL = "OMPI_COMM_WORLD_LOCAL_SIZE"
MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMIX_RANK", "PMIX_SIZE"), ("PMI_RANK", "PMI_SIZE"))

Address = tuple[str, int]


@dataclass(frozen=True)
class Place:
    """A rank's place among the others.

    backend: MLX's name of what carries gradients: ring, jaccl, nccl or mpi. hosts: where each rank is, where that is known.
    ring: the addresses of each rank's connections, of a ring. meeting: where rank 0 listens; None where MPI has to say it.
    here: how many ranks this machine has, as far as the launcher says.
    """

    rank: int
    size: int
    backend: str
    hosts: tuple[str, ...] = ()
    ring: tuple[tuple[Address, ...], ...] = ()
    meeting: Address | None = None
    here: int = 1

    def named(self, rank: int) -> str:
        """A rank with its host, where that is known."""
        return f"rank {rank} ({self.hosts[rank]})" if self.hosts else f"rank {rank}"


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Where a launcher has put this process; None where it was started alone.

    Raises UserError where what the launcher says cannot be read.
    """
    for rank, size in MPI:
        if rank in environment and size in environment:
            found = _place(environment, rank, size, "mpi")
            here = _whole(environment, LOCAL) if LOCAL in environment else 1
            return found if found is None else replace(found, here=max(here, 1))
    if "MLX_RANK" not in environment:
        return None
    if "MLX_IBV_DEVICES" in environment and "MLX_JACCL_COORDINATOR" in environment:
        devices = _read_json(environment, "MLX_IBV_DEVICES")
        meeting = _address(environment["MLX_JACCL_COORDINATOR"], "MLX_JACCL_COORDINATOR")
        return _place(environment, "MLX_RANK", len(devices), "jaccl", meeting)
    if "MLX_WORLD_SIZE" in environment and "NCCL_HOST_IP" in environment and "NCCL_PORT" in environment:
        meeting = _address(f"{environment['NCCL_HOST_IP']}:{environment['NCCL_PORT']}", "NCCL_HOST_IP and NCCL_PORT")
        return _place(environment, "MLX_RANK", "MLX_WORLD_SIZE", "nccl", meeting)
    if "MLX_HOSTFILE" not in environment:
        return None
    ring = tuple(
        tuple(_address(str(each), "MLX_HOSTFILE") for each in (node if isinstance(node, list) else [node]))
        for node in _read_json(environment, "MLX_HOSTFILE")
    )
    if not all(ring):
        raise UserError(f'MLX_HOSTFILE={environment["MLX_HOSTFILE"]}: a rank has no address. Expected [["host:port"], …].')
    found = _place(environment, "MLX_RANK", len(ring), "ring")
    if found is None:
        return None
    hosts = tuple(node[0][0] for node in ring)
    return replace(found, hosts=hosts, ring=ring, meeting=ring[0][0], here=hosts.count(hosts[found.rank]))


def _place(
    environment: Mapping[str, str], rank: str, size: str | int, backend: str, meeting: Address | None = None
) -> Place | None:
    number = _whole(environment, rank)
    count = size if isinstance(size, int) else _whole(environment, size)
    if count < 2:
        return None
    if number >= count:
        raise UserError(f"{rank}={number} is out of range. Expected less than {count}, the number of ranks.")
    return Place(number, count, backend, meeting=meeting)


def _whole(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise UserError(f"{name}={environment[name]!r} is out of range. Expected a whole number, 0 or more.")
    return int(environment[name])


def _read_json(environment: Mapping[str, str], name: str) -> Sequence[object]:
    """The list in the file that a variable names; of an empty file, which `mlx.launch -n 1` writes, an empty one."""
    try:
        text = Path(environment[name]).read_text(encoding="utf-8").strip()
        found = json.loads(text) if text else []
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{name}={environment[name]} cannot be read: {error}.") from error
    if not isinstance(found, list):
        raise UserError(f"{name}={environment[name]} holds no list of ranks.")
    return found


def _address(text: str, name: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{name}: {text!r} is no address. Expected host:port.")
    return host, int(port)


def limit_of(environment: Mapping[str, str]) -> float:
    """The seconds after which a rank that is silent counts as lost. Raises UserError for what is no positive number."""
    text = environment.get(LIMIT, "") or str(LIMIT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{LIMIT}={text!r} is out of range. Expected a number of seconds above 0.")
    return seconds


def met(place: Place, limit: float) -> Channel:
    """The channel between the ranks, as soon as all are there.

    Raises UserError where they are not within `limit` seconds, naming those that are missing.
    """
    if place.meeting is None:
        raise ValueError("the address of rank 0 is not known")
    connections = _all_others(place, place.meeting, limit) if place.rank == 0 else {0: _to_first(place, place.meeting, limit)}
    return Channel(place.rank, place.size, connections, limit)


def _all_others(place: Place, address: Address, limit: float) -> dict[int, socket.socket]:
    """Rank 0's connections to all others; the port is free again afterwards."""
    deadline, found = time.monotonic() + limit, dict[int, socket.socket]()
    with _listening(address, place, place.size) as listener:
        while len(found) < place.size - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with suppress(OSError):
                connection, _ = listener.accept()
                rank = _hello(connection, place.size)
                if rank is None or rank in found:
                    connection.close()
                else:
                    found[rank] = connection
    missing = [place.named(each) for each in range(1, place.size) if each not in found]
    for connection in found.values():
        with suppress(OSError):
            connection.sendall(json.dumps({"missing": missing}).encode() + b"\n")
    if missing:
        raise UserError(
            f"Rank 0 of {place.size} waited {limit:g} s at {address[0]}:{address[1]}, and {' and '.join(missing)} did not "
            f"answer. See that every machine runs the same command and reaches that address; {LIMIT} is how long is waited."
        )
    return found


def _hello(connection: socket.socket, size: int) -> int | None:
    """The number that a rank introduces itself with; None for whoever is no rank of this job."""
    connection.settimeout(HELLO_SECONDS)
    said = _line(connection)
    rank = said.get("rank")
    return rank if said.get("ranks") == size and isinstance(rank, int) and 0 < rank < size else None


def _to_first(place: Place, address: Address, limit: float) -> socket.socket:
    """The connection of another rank to rank 0, which has met all others by then."""
    deadline, why = time.monotonic() + limit, "it does not listen"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, timeout=min(left, MOST_CONNECTING))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(AGAIN, max(left, 0.0)))
            continue
        connection.sendall(json.dumps({"rank": place.rank, "ranks": place.size}).encode() + b"\n")
        connection.settimeout(limit + HELLO_SECONDS)
        said = _line(connection)
        missing = said.get("missing")
        if isinstance(missing, list) and missing:
            raise UserError(f"Rank 0 has not met {' and '.join(map(str, missing))} within {limit:g} s.")
        if missing is None:
            raise UserError(
                f"Rank 0 at {address[0]}:{address[1]} did not take in rank {place.rank} of {place.size}: it ended, or is of "
                "another job. Another one on this machine needs ports of its own: mlx.launch --starting-port."
            )
        return connection
    raise UserError(
        f"Rank {place.rank} of {place.size} did not reach rank 0 at {address[0]}:{address[1]} within {limit:g} s: {why}. "
        f"See that every machine runs the same command; {LIMIT} is how long is waited."
    )


def _line(connection: socket.socket) -> dict[str, object]:
    """The first line of a connection, and no byte more of it; empty where it is none of ours."""
    found = b""
    with suppress(OSError, ValueError):
        while not found.endswith(b"\n") and len(found) < 4096 and (byte := connection.recv(1)):
            found += byte
        said = json.loads(found)
        return said if isinstance(said, dict) else {}
    return {}


def _listening(address: Address, place: Place, most: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # MLX binds the same address after this
    try:
        listener.bind(address)
        listener.listen(most)
    except OSError as error:
        listener.close()
        raise UserError(
            f"Rank {place.rank} of {place.size} cannot listen at {address[0]}:{address[1]}: {error.strerror or error}. The "
            "address must be this machine's and the port free: mlx.launch --starting-port takes another."
        ) from error
    return listener


def check_ring(place: Place, channel: Channel) -> None:
    """See that every rank can be reached by the one before it, at every address that MLX will connect them by.

    MLX's own attempt holds Python's lock, and where an address does not answer it waits without end and a word.
    Raises the same UserError on all ranks, with every connection that cannot be made.
    """
    with ExitStack() as opened:
        _raise_any(channel.exchange("listening", _listen_all(place, opened)))
        after = (place.rank + 1) % place.size
        problems = [each for each in (_unreachable(place, after, address) for address in place.ring[after]) if each]
        _raise_any(channel.exchange("reached", " ".join(problems)))
    channel.exchange("ready", None)  # by now nobody listens here whom MLX could mistake for itself


def _raise_any(problems: Sequence[str]) -> None:
    if any(problems):
        raise UserError("\n".join(dict.fromkeys(each for each in problems if each)))


def _listen_all(place: Place, opened: ExitStack) -> str:
    try:
        for address in place.ring[place.rank]:
            opened.enter_context(_listening(address, place, 8))
    except UserError as error:
        return str(error)
    return ""


def _unreachable(place: Place, rank: int, address: Address) -> str:
    try:
        socket.create_connection(address, timeout=MOST_CONNECTING).close()
    except OSError as error:
        why = error.strerror or str(error)
        return f"Rank {place.rank} cannot reach {place.named(rank)} at {address[0]}:{address[1]}: {why}."
    return ""

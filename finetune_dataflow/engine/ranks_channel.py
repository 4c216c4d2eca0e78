"""What ranks tell each other besides gradients: small values, failures, and that they are still there.

Every rank has one TCP connection to rank 0. Both sides send JSON, a line each, and a sign of life every few seconds, from a
thread of its own: a rank that computes for minutes is heard of, one whose machine is gone is not. MLX's collectives wait
without end, and with a core at full load; here a rank that is early waits asleep, and a lost one has a name.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

GRACE = 10.0  # seconds that a collective may take to notice by itself that a rank is lost
MOST_BYTES = 2**28  # of a message; a longer one is none of ours


class RankLost(UserError):
    """A rank is gone, or cannot go on; the message names it and says why."""


class Channel:
    """The connections of one rank: to rank 0, or rank 0's to all others.

    limit: seconds of silence after which a rank counts as lost. Calls are the main thread's; a thread per connection reads,
    and one more gives the signs of life.
    """

    def __init__(self, rank: int, size: int, connections: Mapping[int, socket.socket], limit: float) -> None:
        """The connections are open, and nothing but this class reads from them from now on."""
        self.rank, self.size, self.limit = rank, size, limit
        self.rescue: Callable[[str], None] | None = None  # what is done before the process ends from within a collective
        self._connections = dict(connections)
        self._inbox: dict[int, deque[dict[str, Any]]] = {each: deque() for each in connections}
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._left: set[int] = set()
        self._problem, self._problem_since = "", 0.0
        self._changed, self._computing = threading.Condition(), threading.RLock()
        self._sending = {each: threading.Lock() for each in connections}
        self._in_collective, self._closed = False, threading.Event()
        for connection in self._connections.values():
            connection.settimeout(limit)
        self._readers = [threading.Thread(target=self._read, args=(each,), daemon=True) for each in connections]
        for thread in self._readers:
            thread.start()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """What every rank gives, in the order of the ranks. Returns on all of them when all have called it.

        Raises RankLost where one is gone or has said that it cannot go on.
        """
        if self.rank:
            self._send(0, {"topic": topic, "value": value})
            return list(self._receive(0, topic))
        values = [json.loads(json.dumps(value)), *(self._receive(each, topic) for each in range(1, self.size))]
        self._send_all({"topic": topic, "value": values})
        return values

    def announce(self, topic: str, value: Any = None) -> Any:
        """What rank 0 gives, on every rank; what others give does not count. Raises RankLost as `exchange` does."""
        if self.rank:
            return self._receive(0, topic)
        self._raise_problem()
        self._send_all({"topic": topic, "value": value})
        return json.loads(json.dumps(value))

    @contextmanager
    def collective(self) -> Iterator[None]:
        """For a collective of MLX: what it raises becomes RankLost, and a process that hangs in it is ended.

        Before it is ended, from another thread, `rescue` is called with the reason.
        """
        self._raise_problem()
        with self._computing:
            self._in_collective = True
        try:
            yield
        except RuntimeError as error:
            with self._changed:  # who it was is known a moment later
                self._changed.wait_for(lambda: self._problem, timeout=GRACE)
            self._raise_problem()
            raise RankLost(f"The connection between the ranks broke ({error}).") from error
        finally:
            with self._computing:
                self._in_collective = False

    def fail(self, why: str) -> None:
        """Tell the others that this rank cannot go on, and end."""
        self._end({"failed": self._problem or f"Rank {self.rank} of {self.size} cannot go on: {why}"})
        deadline = time.monotonic() + 1.0  # so that they read it before this end of the connection is gone
        for thread in self._readers:
            thread.join(max(0.0, deadline - time.monotonic()))

    def leave(self) -> None:
        """Tell the others that this rank is done, and end."""
        self._end({"left": True})

    def _end(self, last: dict[str, Any]) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._send_all(last)
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _receive(self, rank: int, topic: str) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._inbox[rank] or self._problem or rank in self._left)
            if not self._inbox[rank]:
                self._raise_problem()
                raise RankLost(f"Rank {rank} of {self.size} has ended before the others.")
            message = self._inbox[rank].popleft()
        if message["topic"] != topic:
            raise RankLost(f"Rank {rank} of {self.size} is at {message['topic']!r} where rank {self.rank} is at {topic!r}.")
        return message["value"]

    def _raise_problem(self) -> None:
        if self._problem:
            raise RankLost(self._problem)

    def _send_all(self, message: dict[str, Any]) -> None:
        for each in self._connections:
            self._send(each, message)

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        if rank in self._left:
            return
        try:
            with self._sending[rank]:
                self._connections[rank].sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self._lose(rank, f"its connection broke ({error.strerror or error})")

    def _read(self, rank: int) -> None:
        """Take in what a rank sends, until it is gone."""
        buffer = b""
        while True:
            try:
                found = self._connections[rank].recv(2**16)
            except TimeoutError:  # the other thread counts the seconds
                continue
            except OSError as error:
                return self._lose(rank, f"its connection broke ({error.strerror or error})")
            if not found:
                return self._lose(rank, "its connection closed")
            self._heard[rank] = time.monotonic()
            *lines, buffer = (buffer + found).split(b"\n")
            if len(buffer) > MOST_BYTES:
                return self._lose(rank, "it sends what is no message")
            for line in lines:
                try:
                    self._take(rank, json.loads(line))
                except (ValueError, KeyError, TypeError):
                    return self._lose(rank, "it sends what is no message")

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._fail(str(message["failed"]), rank)
        elif message.get("left"):
            with self._changed:
                self._left.add(rank)
                self._changed.notify_all()
        elif "topic" in message:
            with self._changed:
                self._inbox[rank].append(message)
                self._changed.notify_all()

    def _lose(self, rank: int, why: str) -> None:
        if rank not in self._left and not self._closed.is_set():
            self._fail(f"Rank {rank} of {self.size} was lost: {why}.", rank)

    def _fail(self, problem: str, told_by: int) -> None:
        """Note the first problem, and tell the ranks that cannot know of it."""
        with self._changed:
            self._left.add(told_by)
            first = not self._problem
            if first:
                self._problem, self._problem_since = problem, time.monotonic()
            self._changed.notify_all()
        if first:
            self._send_all({"failed": problem})

    def _watch(self) -> None:
        """Give signs of life, miss those of others, and end a process that hangs."""
        pause = min(5.0, self.limit / 20)
        before = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - before > self.limit / 2:  # this process itself was asleep
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            self._send_all({"alive": True})
            for each, heard in self._heard.items():
                if now - heard > self.limit:
                    self._lose(each, f"nothing was heard of it for {self.limit:g} s")
            if self._problem and now - self._problem_since > min(GRACE, self.limit):
                self._end_hanging()

    def _end_hanging(self) -> None:
        with self._computing:  # a collective that ends now waits here, and with it the process
            if not self._in_collective:
                return
            if self.rescue is not None:
                self.rescue(self._problem)
            else:
                os.write(2, f"Error: {self._problem}\n".encode())
            os._exit(2)

"""The Hamilton UI's server as a client sees it: requests that end soon, and a thread that sends what nobody waits for."""

from __future__ import annotations

import atexit
import http.client
import json
import queue
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urlsplit

from finetune_dataflow.errors import UserError

USER = "local"  # whose runs these are; the UI on this machine opens as the same one
CONNECT_SECONDS, ANSWER_SECONDS, LAST_SECONDS = 1.0, 5.0, 5.0
PAGE = 100  # projects that are asked for at once
SECONDS_BETWEEN = 1.0  # two messages about nodes, so that each is about several


class NotTaken(Exception):
    """The server could not be reached, or did not take a request; the message says which. `status`: its answer's, if any."""

    def __init__(self, message: str, status: int = 0) -> None:
        """`message`: a reason, as it goes on after a colon."""
        super().__init__(message)
        self.status = status


class Server:
    """A Hamilton UI at an address."""

    def __init__(self, url: str) -> None:
        """Raise UserError for what is no address."""
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._secure = parts.hostname or "", parts.port, parts.scheme == "https"
        except ValueError as error:
            raise UserError(f"--track-url {url!r} is no address of a Hamilton UI: {error}.") from error
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise UserError(f"--track-url {url!r} is no address of a Hamilton UI. Expected http://HOST:PORT.")
        self._prefix = f"{parts.path}/api/v1"

    def call(self, method: str, path: str, body: object = None, **query: object) -> Any:
        """What the server answers, as JSON. Raises NotTaken."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_SECONDS)
        content = b"" if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        target = f"{self._prefix}{path}{f'?{urlencode(query)}' if query else ''}"
        headers = {"x-api-user": USER, "Content-Type": "application/json"}
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_SECONDS)
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NotTaken(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if response.status // 100 != 2:
            raise NotTaken(f"it answered {response.status} {response.reason} to {method} {path}", response.status)
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise NotTaken(f"its answer to {method} {path} is no JSON") from error

    def project(self, name: str) -> int:
        """The number of the project of that name, which is made where there is none. Raises NotTaken."""
        self.call("GET", "/phone_home")  # makes the user at the first visit
        start = 0
        while True:
            found = _listed(self.call("GET", "/projects", limit=PAGE, offset=start))
            for each in found:
                if each.get("name") == name and each.get("role") == "write":
                    return int(each["id"])
            start += PAGE
            if len(found) < PAGE:
                break
        nobody: dict[str, list[str]] = {"user_ids_visible": [], "team_ids_visible": [], "team_ids_writable": []}
        visibility = {**nobody, "user_ids_writable": [USER]}
        wanted = {
            "name": name,
            "description": "Runs of finetune-dataflow.",
            "tags": {},
            "attributes": [],
            "visibility": visibility,
        }
        return number_of(self.call("POST", "/projects", wanted))


def _listed(answer: object) -> list[dict[str, Any]]:
    if not isinstance(answer, list) or not all(isinstance(each, dict) for each in answer):
        raise NotTaken("it is no Hamilton UI")
    return answer


def number_of(answer: object) -> int:
    """The number that the server gave to what was made. Raises NotTaken where it gave none."""
    if not isinstance(answer, dict) or not isinstance(answer.get("id"), int):
        raise NotTaken("it is no Hamilton UI")
    return int(answer["id"])


class Sender:
    """Does work, one piece after another, in a thread of its own; after the first that the server does not take, none.

    The thread is a daemon, so that a server keeps no process alive; what is left at its end is waited for a moment.
    """

    def __init__(self, lost: Callable[[str], None]) -> None:
        """`lost` is called with the reason when the server does not take something, once."""
        self._lost, self._failed, self._lock = lost, False, threading.Lock()
        self._hurry = threading.Event()
        self._queue: queue.SimpleQueue[Callable[[], None] | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="hamilton-ui", daemon=True).start()
        atexit.register(self.finish)

    @property
    def failed(self) -> bool:
        """Whether the server was lost, so that nothing is sent any more."""
        return self._failed

    def put(self, work: Callable[[], None]) -> None:
        """Have `work` done after all that was put before. It may raise NotTaken."""
        if not self._failed:
            self._queue.put(work)

    def pause(self) -> None:
        """Within a piece of work: let more gather for a moment, unless somebody waits."""
        self._hurry.wait(SECONDS_BETWEEN)

    def drained(self, seconds: float) -> bool:
        """Wait until all that was put is done or dropped; False where that takes longer than `seconds`."""
        if self._failed:
            return True
        done = threading.Event()
        self._queue.put(done)
        self._hurry.set()
        return done.wait(seconds)

    def finish(self) -> None:
        """Wait a last time, and give up what takes longer; at the end of the process this happens by itself."""
        if not self.drained(LAST_SECONDS):
            self.give_up(f"it did not take everything within {LAST_SECONDS:g} seconds")

    def give_up(self, reason: str) -> None:
        """Do nothing from now on, and say why, once."""
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            self._lost(reason)

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                self._hurry.clear()
                item.set()
            elif not self._failed:
                try:
                    item()
                except NotTaken as error:
                    self.give_up(str(error))

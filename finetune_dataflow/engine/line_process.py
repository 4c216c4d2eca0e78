"""A process that is told JSON lines and tells JSON lines, and for which nobody ever has to wait."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

MOST_AT_ONCE = 65536  # bytes


class LineProcess:
    """A process of its own session, which Ctrl-C on our terminal does not reach; where we are killed, its stdin ends.

    What is told is kept until the process takes it: one that is busy, or stands still, holds nobody up.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it; what it writes to stderr is added to `log`. Raises OSError where it cannot be started."""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
            )
        self._told, self._heard = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        for each in (self._told, self._heard):
            os.set_blocking(each.fileno(), False)
        self._untaken, self._half = bytearray(), b""
        self.ended = False

    def tell(self, value: object) -> None:
        """Give it a line, or as much as it takes at once; the rest follows with the next one, or while it is heard."""
        self._untaken += json.dumps(value).encode() + b"\n"
        self._write()

    def heard(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """What it told since the last time, waiting at most so many seconds until there is something to read or to write."""
        if seconds:
            self._wait(seconds)
        self._write()
        while not self.ended:
            try:
                found = os.read(self._heard.fileno(), MOST_AT_ONCE)
            except BlockingIOError:
                break
            self.ended = not found
            self._half += found
        *lines, self._half = self._half.split(b"\n")
        return [json.loads(each) for each in lines if each.startswith(b"{")]

    def leave(self, seconds: float) -> None:
        """Say that no more follows, and give it so many seconds to end; after that it is on its own."""
        self._told.close()
        self._heard.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _wait(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._heard, selectors.EVENT_READ)
            if self._untaken:
                selector.register(self._told, selectors.EVENT_WRITE)
            selector.select(seconds)

    def _write(self) -> None:
        while self._untaken:
            try:
                taken = os.write(self._told.fileno(), self._untaken[:MOST_AT_ONCE])
            except BlockingIOError:
                return
            except BrokenPipeError:  # it has ended, which its output says
                taken = len(self._untaken)
            del self._untaken[:taken]

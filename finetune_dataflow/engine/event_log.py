"""A log of events, one JSON object a line, that a plot can follow while it is written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType

from finetune_dataflow.engine.files import writing

logger = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, object]], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block the listener is told every event after it is written; what it raises ends whoever wrote the event."""
    before = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(before)


class EventLog:
    """A JSONL file that events are appended to, each by one write, so that no reader sees half a line."""

    def __init__(self, path: Path) -> None:
        """Open the log for appending; what it holds stays."""
        self.path = path
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> EventLog:
        """The log itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self._file.close()

    def write(self, **values: object) -> None:
        """Append one event. Raises UserError where the disk is full."""
        with writing(self.path):
            self._file.write((json.dumps(values) + "\n").encode())
        for listener in _listeners.get():
            listener(values)

    def size(self) -> int:
        """The bytes written so far, flushed to the disk."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Take back everything after the first `size` bytes; of a log that is shorter, the last line if it is half a line."""
        there = self._file.seek(0, os.SEEK_END)
        if there < size:
            logger.warning("%s was cut short from outside: events are missing in it.", self.path)
            size = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(size)

"""What the workers of `benchmarks/bench.py` have in common; the standard library is all it needs.

A worker reads lines and answers each with a line of JSON. `window SECONDS PHASE` trains until so many seconds have passed
and the step is done, `steps COUNT PHASE` so many steps; between them it waits inside its training loop, which goes on where
it was. Whatever else prints to the standard output goes to the standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_COUNTS = ("rows", "tokens", "supervised", "positions", "pairs")


def arguments(description: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The chosen options, and the settings that all engines share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("mode", choices=("windows", "loss", "growth"))
    parser.add_argument("--settings", type=Path, required=True, help="the JSON file that the conductor wrote")
    parser.add_argument("--same-blas", action="store_true", help="put this project's BLAS in front of MLX")
    chosen = parser.parse_args()
    return chosen, json.loads(chosen.settings.read_text(encoding="utf-8"))


def json_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def versions(*names: str) -> dict[str, str]:
    """The installed versions of some packages."""
    return {name: metadata.version(name) for name in names}


def reset_peak() -> None:
    """Start counting the resident peak anew, where the system can."""
    if _RESET_PEAK.exists():
        _RESET_PEAK.write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held resident since the count began."""
    if _STATUS.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found is not None:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Answers:
    """The standard output, kept for answers: everything else that is printed goes to the standard error."""

    def __init__(self) -> None:
        """Take the standard output."""
        sys.stdout.flush()
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def give(self, **values: Any) -> None:
        """Answer with one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


class Windows:
    """The windows of one training loop, which calls `step` before each of its steps.

    handlers: what answers other commands, by their first word; they run while the loop waits.
    loss: the last that the loop knows, in nats.
    """

    def __init__(self, answers: Answers, about: dict[str, Any], handlers: dict[str, Callable[[], dict[str, Any]]]) -> None:
        """Nothing is said before the first step, when all is prepared."""
        self._answers, self._handlers = answers, handlers
        self._ready: dict[str, Any] | None = {"ready": True, **about}
        self._running = False
        self.phase = ""
        self.loss: float | None = None

    def step(self, lengths: Iterable[int], supervised: Iterable[int]) -> None:
        """Wait for a window unless one is open, and count a step over rows of so many tokens, so many of them learned."""
        if self._running and self._is_over():
            seconds = time.perf_counter() - self._started
            self._answers.give(
                phase=self.phase, steps=self._steps, **self._counts, seconds=seconds, loss=self.loss, peak_bytes=peak_bytes()
            )
            self._running = False
        if not self._running:
            self._wait()
        self._steps += 1
        self._count([int(each) for each in lengths], sum(int(each) for each in supervised))

    def _is_over(self) -> bool:
        if self._last_step is not None:
            return self._steps >= self._last_step
        return time.perf_counter() - self._started >= self._seconds

    def _count(self, lengths: list[int], supervised: int) -> None:
        inputs = [length - 1 for length in lengths]
        pairs = sum(each * (each + 1) // 2 for each in inputs)
        for name, value in zip(_COUNTS, (len(lengths), sum(lengths), supervised, sum(inputs), pairs), strict=True):
            self._counts[name] += value

    def _wait(self) -> None:
        """Answer commands until one opens a window. The end of the input ends the process."""
        if self._ready is not None:
            self._answers.give(**self._ready)
            self._ready = None
        for line in iter(sys.stdin.readline, ""):
            command, *values = line.split()
            if command in ("window", "steps"):
                self._open(command, float(values[0]), values[1])
                return
            self._answers.give(**self._handlers[command]())
        raise SystemExit(0)

    def _open(self, command: str, size: float, phase: str) -> None:
        self._last_step = int(size) if command == "steps" else None
        self._seconds, self._steps, self._counts = size, 0, dict.fromkeys(_COUNTS, 0)
        self.phase, self._running = phase, True
        reset_peak()
        self._started = time.perf_counter()

"""One progress bar for anything that takes time; plain log lines where nobody watches a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
T = TypeVar("T")
QUIET_SECONDS = 10.0  # between two plain lines


class Bar:
    """A bar on a terminal; elsewhere a log line every ten seconds and at the end."""

    def __init__(self, total: int, description: str, done: int = 0) -> None:
        """Start with `done` of `total` steps behind."""
        self._total, self._description = total, description
        self._before = self._done = self._said_done = done
        self._figures = ""
        self._started = self._said = time.monotonic()
        interactive = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=description, leave=True, dynamic_ncols=True) if interactive else None

    def advance(self, steps: int = 1, figures: str = "") -> None:
        """Count `steps` more as done and show `figures` beside them."""
        self._done += steps
        self._figures = figures or self._figures
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(steps)
        elif time.monotonic() - self._said >= QUIET_SECONDS:
            self._say()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()
        elif self._said_done < self._done:
            self._say()

    def _say(self) -> None:
        self._said, self._said_done = time.monotonic(), self._done
        spent = self._said - self._started
        left = spent / max(self._done - self._before, 1) * (self._total - self._done)
        figures = f", {self._figures}" if self._figures else ""
        logger.info("%s: %d/%d, %.0f s, %.0f s left%s", self._description, self._done, self._total, spent, left, figures)


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """The items one by one, with a bar."""
    bar = Bar(len(items), description)
    for item in items:
        yield item
        bar.advance()
    bar.close()

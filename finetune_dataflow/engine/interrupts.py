"""Ctrl-C and a termination that wait for a good moment: the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Work that was interrupted at a good moment; the message says how it goes on."""


class Interrupts:
    """Whether an interruption was asked for."""

    requested = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # the second time at once
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def held_back() -> Iterator[Interrupts]:
    """Within the block the first Ctrl-C or SIGTERM only sets `requested`; a second one interrupts at once.

    Signals can be handled in the main thread alone; in another one nothing is held back.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, interrupts._ask) for number in heard}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

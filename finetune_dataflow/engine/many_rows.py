"""What helps where there are millions of rows."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from finetune_dataflow.engine.progress import Bar

CHUNK = 4096  # rows that are handled together
ROWS_WITH_BAR = 200_000  # below, a step over the rows takes about a second
T = TypeVar("T")


@contextmanager
def paused() -> Iterator[None]:
    """Look for no reference cycles within the block or function: the collector would look through all rows again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def watched(rows: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The rows one by one, with a bar where they are many."""
    if total < ROWS_WITH_BAR:
        yield from rows
        return
    bar = Bar(total, description)
    for number, row in enumerate(rows, start=1):
        yield row
        if number % CHUNK == 0:
            bar.advance(CHUNK)
    bar.advance(total % CHUNK)
    bar.close()


def lines_fingerprint(lines: Iterable[Sequence[object]], *further: object) -> str:
    """SHA-256 (hex) of JSON-like lines as one JSON list, made a few thousand lines at a time, and of further values after it."""
    digest = hashlib.sha256(b"[")
    remaining, before = iter(lines), ""
    while chunk := list(islice(remaining, CHUNK)):
        text = json.dumps(chunk, sort_keys=True, ensure_ascii=False)[1:-1]
        digest.update(f"{before}{text}".encode("utf-8", "surrogatepass"))
        before = ", "
    digest.update(b"]")
    for each in further:
        digest.update(json.dumps(each, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

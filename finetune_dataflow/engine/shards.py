"""Token columns as files: written shard by shard, read through memory maps, kept until they are not the newest any more.

A directory holds a raw little-endian file a column and `manifest.json`, which is written last: without it there is nothing.
The directory is made under another name and renamed when it is whole. What stands in it is named by everything that it
depends on (`prepared`), so columns that are there are right, or damaged; damaged ones are made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune_dataflow.engine.files import fingerprint as json_fingerprint
from finetune_dataflow.engine.files import flush_tree, write_json
from finetune_dataflow.engine.many_rows import paused
from finetune_dataflow.engine.tokens import DroppedRow, Stored, TokenColumns
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

FEWEST_ROWS = 50_000  # below, columns stay in memory
MOST_BYTES = 20 * 2**30  # of prepared columns; the longest unused are removed above it
MANIFEST, FORMAT = "manifest.json", 1
COLUMNS: dict[str, np.dtype[Any]] = {
    "rows": np.dtype("<i8"), "offsets": np.dtype("<i8"), "input_ids": np.dtype("<i4"), "labels": np.dtype("<i4"),
    "prompt_lengths": np.dtype("<i4"), "truncated": np.dtype("?"), "joint_differs": np.dtype("?"),
    "skipped_turns": np.dtype("<i4"),
}  # fmt: skip
MAPPED = ("input_ids", "labels")  # the columns of tokens; those of rows are small and are read


class DamagedError(Exception):
    """A directory does not hold whole columns; the message says what is wrong."""


def prepared(depends_on: object, make: Callable[[], Iterable[TokenColumns]]) -> TokenColumns:
    """The columns named by `depends_on` (JSON-like), from the user's cache directory, or made now and put there.

    A second process that wants the same waits for the first. Columns that are damaged are made again, and that is said.
    Raises UserError where they cannot be written (a full disk); nothing half-written stays.
    """
    parent = user_cache_directory() / "tokens"
    directory = parent / json_fingerprint([FORMAT, depends_on])[:32]
    with _cannot_write(parent), _only_one_process(parent, directory.name), paused():
        found = _kept(directory)
        if found is None:
            for left in parent.glob(f".{directory.name}.*"):  # a killed process's
                shutil.rmtree(left, ignore_errors=True)
            found = write(directory, make())
            _make_room(parent, directory)
    return found


def write(directory: Path, parts: Iterable[TokenColumns]) -> TokenColumns:
    """Write the columns of all parts, one after another, as the new `directory`; whole or not at all. OSError if it cannot be."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_files(temporary, parts)
        flush_tree(temporary)
        temporary.rename(directory)
        _flush_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return opened(directory)


def opened(directory: Path) -> TokenColumns:
    """The columns in `directory`, their tokens as read-only memory maps. Raises DamagedError where they are not whole."""
    manifest = _manifest(directory)
    columns: dict[str, NDArray[Any]] = {}
    maps: list[mmap.mmap] = []
    for name, dtype in COLUMNS.items():
        path = directory / f"{name}.bin"
        size = path.stat().st_size if path.is_file() else -1
        if size != manifest["bytes"][name]:
            raise DamagedError(f"{path.name} has {max(size, 0)} bytes of {manifest['bytes'][name]}")
        if name in MAPPED and size:
            with path.open("rb") as handle:
                maps.append(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            columns[name] = np.frombuffer(maps[-1], dtype)
        else:
            columns[name] = np.fromfile(path, dtype)
    offsets = columns["offsets"]
    if len(offsets) != len(columns["rows"]) + 1 or offsets[0] != 0 or offsets[-1] != len(columns["input_ids"]):
        raise DamagedError("offsets.bin does not fit the other columns")
    dropped = tuple(DroppedRow(row, reason) for row, reason in manifest["dropped"])
    return TokenColumns(**columns, dropped=dropped, stored=Stored(directory, tuple(maps), manifest["fingerprint"]))


def check_contents(directory: Path) -> None:
    """Raise DamagedError where a shard's bytes are not those that were written."""
    manifest = _manifest(directory)
    for name in COLUMNS:
        with (directory / f"{name}.bin").open("rb") as handle:
            for number, shard in enumerate(manifest["shards"]):
                if hashlib.sha256(handle.read(shard["bytes"][name])).hexdigest() != shard["sha256"][name]:
                    raise DamagedError(f"shard {number} of {name}.bin is not as it was written")


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} is of another format")
    return manifest


def _write_files(directory: Path, parts: Iterable[TokenColumns]) -> None:
    """Append every part to the columns' files as a shard, and write the manifest."""
    shards: list[dict[str, Any]] = []
    dropped: list[DroppedRow] = []
    tokens = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in COLUMNS}
        for part in parts:
            first = [] if shards else [0]
            offsets = np.concatenate([np.array(first, np.int64), part.offsets[1:] + tokens])
            shards.append(_write_shard(files, {**{name: getattr(part, name) for name in COLUMNS}, "offsets": offsets}))
            dropped += part.dropped
            tokens += len(part.input_ids)
        if not shards:
            shards.append(_write_shard(files, {**{name: np.zeros(0) for name in COLUMNS}, "offsets": np.zeros(1)}))
    manifest = {
        "format": FORMAT,
        "bytes": {name: sum(shard["bytes"][name] for shard in shards) for name in COLUMNS},
        "dropped": [[each.row, each.reason] for each in dropped],
        "shards": shards,
        "fingerprint": "",
    }
    write_json(directory / MANIFEST, manifest)
    written = opened(directory)
    # The fingerprint is over whole columns, as that of columns in memory, so it is known when all are written.
    write_json(directory / MANIFEST, {**manifest, "fingerprint": written.content_hash})


def _write_shard(files: Mapping[str, BinaryIO], columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Append a shard's part of each column; how many bytes that is, and their SHA-256."""
    parts = {name: np.ascontiguousarray(columns[name], dtype).tobytes() for name, dtype in COLUMNS.items()}
    for name, part in parts.items():
        files[name].write(part)
    return {
        "rows": len(columns["rows"]),
        "bytes": {name: len(part) for name, part in parts.items()},
        "sha256": {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()},
    }


def _kept(directory: Path) -> TokenColumns | None:
    """The columns of an earlier run, where they are whole; what is left of damaged ones is removed."""
    if not directory.exists():
        return None
    try:
        found = opened(directory)
    except (DamagedError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("The prepared tokens in %s are damaged (%s); they are made again.", directory, error)
        shutil.rmtree(directory)
        return None
    os.utime(directory)  # the longest unused are removed first
    return found


def _make_room(parent: Path, newest: Path) -> None:
    """Remove the columns that were not used for longest, until what is left is small enough; the newest always stays."""
    kept = sorted((each for each in parent.iterdir() if (each / MANIFEST).is_file()), key=lambda each: -each.stat().st_mtime)
    total = 0
    for directory in [newest, *(each for each in kept if each != newest)]:
        total += sum(each.stat().st_size for each in directory.iterdir())
        if total > MOST_BYTES and directory != newest:
            shutil.rmtree(directory, ignore_errors=True)  # whoever has mapped it keeps its pages


@contextmanager
def _only_one_process(parent: Path, name: str) -> Iterator[None]:
    """Wait for, then hold the lock on a name; the kernel frees it when the process ends, however it ends."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f"{name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process is preparing the same rows; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _cannot_write(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The prepared tokens cannot be written to {parent}: {error.strerror or error}. Make room there, or name another "
            "directory in FINETUNE_DATAFLOW_CACHE."
        ) from error


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

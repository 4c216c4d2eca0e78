"""Checkpoints of a fit: exact to the bit, and whole or not there, however the process that writes them ends.

A checkpoint is a directory `batch-00000120`, named after the batches done. It is written under a name that starts with a
dot, flushed to the disk and renamed; `state.json`, written last, holds the size and the SHA-256 of every other file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from finetune_dataflow.engine.files import flush_tree
from finetune_dataflow.engine.settings import require
from finetune_dataflow.errors import UserError

FORMAT = 1
STATE = "state.json"
PARAMETERS, OPTIMIZER, ACCUMULATED = "parameters.safetensors", "optimizer.safetensors", "accumulated.safetensors"

_AGAIN, _WRITING, _DELETED = "-again", ".writing-", ".deleted-"
_NAME = re.compile(rf"batch-([0-9]{{8,}})({_AGAIN})?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """All that a fit needs to go on as if nothing had happened. Arrays go by flat names such as `layers.0.weight`.

    step: updates done. accumulated: the sums of gradients of an unfinished accumulation window, or empty. state: values that
    JSON can hold, also infinity and NaN, with `batches`, the batches done. It comes back as JSON gives it: floats are exact,
    tuples are lists, keys are strings.
    """

    step: int
    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    accumulated: dict[str, mx.array]
    state: dict[str, Any]


class _Damaged(Exception):
    """Why a directory cannot be read as a checkpoint: the end of a sentence."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` into `directory` and return its path, by then safe on the disk; it replaces one of the same batches.

    Afterwards the newest `keep` checkpoints stay. The one just written is the newest: what has more batches, or is damaged,
    was passed over when the fit went on, and goes. Raises UserError where the system refuses the writing (a full disk, a
    missing right); the checkpoints that were there are then still there.
    """
    require("keep_checkpoints", keep, keep >= 1, "a whole number, 1 or more")
    path = directory / _name(checkpoint.state["batches"])
    state = json.loads(json.dumps(checkpoint.state))  # a value JSON cannot hold fails here, before anything is written
    temporary = directory / f"{_WRITING}{path.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _finish_interrupted(directory)
        temporary.mkdir()
        _write(temporary, checkpoint, state)
        flush_tree(temporary)
        _publish(temporary, path)
    except OSError as error:
        raise UserError(_refusal(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(path, keep)
    return path


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest readable checkpoint in `directory`, its arrays in memory; None where there is none.

    What is damaged, incomplete or no checkpoint is passed over with a warning that says why. Raises UserError where
    `directory` itself cannot be read.
    """
    for path in _foreign(directory):
        logger.warning("%s is not a checkpoint and is passed over.", path)
    for path in _found(directory):
        try:
            return _read(path)
        except _Damaged as damage:
            logger.warning("The checkpoint %s is passed over: %s.", path, damage)
    return None


def has_checkpoint(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint whose files have their right sizes; their contents are not read."""
    return any(_looks_whole(path) for path in _found(directory))


def _name(batches: int) -> str:
    if not isinstance(batches, int) or batches < 0:
        raise ValueError(f"state['batches'] is {batches!r}. Expected a whole number, 0 or more.")
    return f"batch-{batches:08d}"


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"The checkpoints in {directory} cannot be read: {error.strerror}.") from error


def _found(directory: Path) -> list[Path]:
    """The directories named as checkpoints, the newest first; links are none."""
    named = [(match, path) for path in _entries(directory) if (match := _NAME.fullmatch(path.name)) and _is_directory(path)]
    named.sort(key=lambda each: (int(each[0][1]), each[0][2] is not None), reverse=True)
    return [path for _, path in named]


def _foreign(directory: Path) -> list[Path]:
    ours = set(_found(directory))
    return [path for path in _entries(directory) if path not in ours and not path.name.startswith(".")]


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _write(temporary: Path, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    parts = {PARAMETERS: checkpoint.parameters, OPTIMIZER: checkpoint.optimizer, ACCUMULATED: checkpoint.accumulated}
    written = {}
    for name, arrays in parts.items():
        if arrays or name != ACCUMULATED:
            # Given a path, MLX says of a full disk only how many bytes are left over; a file of Python's says why.
            with (temporary / name).open("xb") as file:
                mx.save_safetensors(file, arrays)
            with (temporary / name).open("rb") as file:
                written[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}
    document = {"format": FORMAT, "step": checkpoint.step, "state": state, "files": written}
    document["sha256"] = _document_digest(document)
    (temporary / STATE).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished checkpoint its name. One that has it already goes only when the new one is safe beside it."""
    taken = os.path.lexists(path)
    temporary.rename(path.with_name(f"{path.name}{_AGAIN}") if taken else path)
    _flush(path.parent)
    if taken:
        _finish_interrupted(path.parent)


def _finish_interrupted(directory: Path) -> None:
    """Do what a kill may have left undone: complete a replacement, delete what was half-written or half-deleted."""
    for path in _entries(directory):
        if path.name.startswith((f"{_WRITING}batch-", f"{_DELETED}batch-")):
            _delete(path)
    for path in _found(directory):
        if path.name.endswith(_AGAIN):
            old = path.with_name(path.name.removesuffix(_AGAIN))
            if os.path.lexists(old):
                _retire(old)
            path.rename(old)
            _flush(directory)


def _prune(saved: Path, keep: int) -> None:
    found = _found(saved.parent)
    older = [path for path in found[found.index(saved) + 1 :] if _looks_whole(path)]
    for path in found:
        if path != saved and path not in older[: keep - 1]:
            try:
                _retire(path)
            except OSError as error:
                logger.warning("The old checkpoint %s cannot be deleted: %s.", path, error.strerror)


def _retire(path: Path) -> None:
    """Delete a checkpoint that a kill in the middle must not leave as half of one: it loses its name first."""
    nameless = path.with_name(f"{_DELETED}{path.name}")
    path.rename(nameless)
    _flush(path.parent)
    _delete(nameless)


def _delete(path: Path) -> None:
    try:
        if _is_directory(path):
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s is left over and cannot be deleted: %s.", path, error.strerror)


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
        if sys.platform == "darwin":
            with suppress(OSError):  # some drives have no such call
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # there fsync leaves the data in the drive's own cache
    finally:
        os.close(handle)


def _refusal(path: Path, error: OSError) -> str:
    said = f"The checkpoint {path.name} cannot be written to {path.parent}: {error.strerror or error}."
    intact = _newest_intact(path.parent)
    if intact is None:
        return f"{said} There is no previous checkpoint."
    return f"{said} The previous checkpoint, {intact.name}, is intact: when this is mended, the same command goes on from there."


def _newest_intact(directory: Path) -> Path | None:
    if not directory.is_dir():
        return None
    return next((path for path in _found(directory) if _is_intact(path)), None)


def _read(path: Path) -> Checkpoint:
    """The checkpoint in `path`; _Damaged where anything about it is not as it was written."""
    document = _checked_document(path)
    parts = {name: _arrays(path / name, told) for name, told in document["files"].items()}
    return Checkpoint(
        step=document["step"],
        parameters=parts[PARAMETERS],
        optimizer=parts[OPTIMIZER],
        accumulated=parts.get(ACCUMULATED, {}),
        state=document["state"],
    )


def _arrays(path: Path, told: dict[str, Any]) -> dict[str, mx.array]:
    _check_content(path, told)
    try:
        # By path: a process that had MLX 0.32 load from an open file sometimes aborts when it ends.
        arrays = cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
        mx.eval(arrays)  # MLX reads them when they are used, and the file may be gone by then
    except RuntimeError as error:
        raise _Damaged(f"{path.name} cannot be loaded ({error})") from error
    return arrays


def _check_content(path: Path, told: dict[str, Any]) -> None:
    with _raising_damaged(path.name), _open_regular(path) as file:
        if _digest(file) != told["sha256"]:
            raise _Damaged(f"the checksum of {path.name} is wrong")


def _looks_whole(path: Path) -> bool:
    try:
        _checked_document(path)
    except _Damaged:
        return False
    return True


def _is_intact(path: Path) -> bool:
    try:
        for name, told in _checked_document(path)["files"].items():
            _check_content(path / name, told)
    except _Damaged:
        return False
    return True


def _checked_document(path: Path) -> dict[str, Any]:
    """What `state.json` in `path` says; _Damaged unless it is as it was written and the files it names have their sizes."""
    with _raising_damaged(STATE), _open_regular(path / STATE) as file:
        try:
            document = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise _Damaged(f"{STATE} is not JSON ({error})") from error
    if not isinstance(document, dict) or "format" not in document:
        raise _Damaged(f"{STATE} does not say its format")
    if document["format"] != FORMAT:
        raise _Damaged(f"its format is {document['format']!r}, and this version reads {FORMAT}")
    if document.pop("sha256", None) != _document_digest(document):
        raise _Damaged(f"the checksum of {STATE} is wrong")
    if _name(document["state"]["batches"]) != path.name.removesuffix(_AGAIN):
        raise _Damaged(f"it was written as {_name(document['state']['batches'])}")
    _check_files(path, document["files"])
    return document


def _check_files(path: Path, told: dict[str, dict[str, Any]]) -> None:
    with _raising_damaged(path.name):
        there = {each.name: each.lstat() for each in path.iterdir() if not each.name.startswith(".")}
    missing, foreign = {STATE, *told} - set(there), set(there) - {STATE, *told}
    if missing:
        raise _Damaged(f"{min(missing)} is missing")
    if foreign:
        raise _Damaged(f"{min(foreign)} does not belong to it")
    for name, each in told.items():
        if not stat.S_ISREG(there[name].st_mode):
            raise _Damaged(f"{name} is not a regular file")
        if there[name].st_size != each["bytes"]:
            raise _Damaged(f"{name} has {there[name].st_size} bytes instead of {each['bytes']}")


@contextmanager
def _raising_damaged(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Damaged(f"{name} cannot be read ({error.strerror or error})") from error


@contextmanager
def _open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file of a checkpoint, never what a link leads to, and never a pipe that would be waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Damaged(f"{path.name} is not a regular file")
        yield file


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _document_digest(document: dict[str, Any]) -> str:
    """SHA-256 (hex) of the document without its own checksum, in the order of its keys, which reading keeps."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
